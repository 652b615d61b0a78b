"""Base of the configs of tower and projector."""

from typing import Any, Self


class Config:
    """Dataclass read from the keys of a dict, like mlx-lm's BaseModelArgs, whose import takes a second."""

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> Self:
        """Make a config from the keys that it knows."""
        return cls(**{key: value for key, value in params.items() if key in cls.__dataclass_fields__})

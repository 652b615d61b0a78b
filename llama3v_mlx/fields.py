"""Validate the values of a JSON object, declared as a table of key to `Field`."""

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class CheckpointError(ValueError):
    """Raised for an unusable checkpoint; the message says which one, why, and what to do."""


class Field:
    """Valid values of a key; `str` describes them."""

    def accepts(self, value: Any) -> bool:
        raise NotImplementedError

    def check(self, name: str, value: Any) -> None:
        """Raise CheckpointError, naming the value, if it is not valid."""
        if not self.accepts(value):
            raise CheckpointError(f"{name} is {reprlib.repr(value)}; it must be {self}")


@dataclass(frozen=True)
class Number(Field):
    """Range of a number."""

    low: float
    high: float = sys.float_info.max
    whole: bool = False
    above: bool = False  # greater than `low`, not equal to it

    def accepts(self, value: Any) -> bool:
        is_number = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        low = f"over {self.low}" if self.above else f"of {self.low} or more"
        high = "" if self.high == sys.float_info.max else f" and at most {self.high}"
        return f"a {'whole ' if self.whole else ''}number {low}{high}"


@dataclass(frozen=True)
class Flag(Field):
    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Text(Field):
    def accepts(self, value: Any) -> bool:
        return isinstance(value, str)

    def __str__(self) -> str:
        return "a text"


@dataclass(frozen=True)
class Object(Field):
    def accepts(self, value: Any) -> bool:
        return isinstance(value, dict)

    def __str__(self) -> str:
        return "an object"


@dataclass(frozen=True)
class Choice(Field):
    """One of several values of one type."""

    values: tuple

    def accepts(self, value: Any) -> bool:
        return type(value) is type(self.values[0]) and value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


@dataclass(frozen=True)
class Items(Field):
    """A list."""

    item: Field

    def accepts(self, value: Any) -> bool:
        return isinstance(value, list) and all(map(self.item.accepts, value))

    def __str__(self) -> str:
        return f"a list, each item {self.item}"


def check_object(name: str, value: Any) -> dict:
    """Return a JSON object; raise CheckpointError if it is something else."""
    Object().check(name, value)
    return value


def check_fields(where: str, given: Any, fields: Mapping[str, Field], required: tuple[str, ...] = ()) -> dict:
    """Check an object of a JSON file.

    Args:
        where: the file and the key of the object in it, for messages: "config.json: vision_config".
        given: the object; keys that are null count as missing.
        fields: its known keys.
        required: those that must be there.

    Returns:
        The known keys that are there.

    Raises:
        CheckpointError: if it is not an object, lacks a required key, or a value is not valid.
    """
    present = {key: value for key, value in check_object(where, given).items() if value is not None}
    if missing := [key for key in required if key not in present]:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}")
    known = {key: value for key, value in present.items() if key in fields}
    for key, value in known.items():
        fields[key].check(f"{where}.{key}" if ": " in where else f"{where}: {key}", value)
    return known

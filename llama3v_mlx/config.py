"""Validate Hugging Face configs and convert them to the form that mlx-lm reads.

transformers 5 writes `rope_parameters` and `dtype` where 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`.
mlx-lm's Llama only knows the older form, and silently assumes a missing rope_theta to be 10000.
"""

import json
import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """Raised for an unusable checkpoint; the message says which one, why, and what to do."""


@dataclass(frozen=True)
class Number:
    """Valid range of a number in a config."""

    low: float
    high: float = sys.float_info.max
    whole: bool = False
    above: bool = False  # greater than `low`, not equal to it

    def check(self, name: str, value: Any) -> None:
        """Raise CheckpointError, naming the value, if it is out of range or not a number."""
        is_number = isinstance(value, int if self.whole else (int, float)) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high or (self.above and value == self.low):
            raise CheckpointError(f"{name} is {reprlib.repr(value)}; it must be {self}")

    def __str__(self) -> str:
        low = f"over {self.low}" if self.above else f"of {self.low} or more"
        high = "" if self.high == sys.float_info.max else f" and at most {self.high}"
        return f"a {'whole ' if self.whole else ''}number {low}{high}"


SIZE, TOKEN_ID = Number(1, 2**31 - 1, whole=True), Number(0, 2**31 - 1, whole=True)
POSITIVE = Number(0, above=True)

# Required keys of a Llama config, and the other keys that mlx-lm's Llama accepts, apart from the rope's.
REQUIRED = {key: SIZE for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
REQUIRED |= {"vocab_size": SIZE, "rms_norm_eps": POSITIVE}
OPTIONAL = {key: SIZE for key in ("num_key_value_heads", "head_dim", "max_position_embeddings")}
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")

# Rope types that mlx-lm computes like transformers: required and optional keys of each.
ROPES = {
    "default": ({}, {}),
    "linear": ({"factor": POSITIVE}, {}),
    "llama3": (
        {key: POSITIVE for key in ("factor", "low_freq_factor", "high_freq_factor")}
        | {"original_max_position_embeddings": SIZE},
        {},
    ),
    "yarn": (
        {"factor": POSITIVE, "original_max_position_embeddings": SIZE},
        {"beta_fast": POSITIVE, "beta_slow": POSITIVE},
    ),
}
ROPE_THETA = Number(1, above=True)

# The reference's sampling (`chat` with sampling=True), and Hugging Face's without it.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 100, "repetition_penalty": 1.05}
GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
SAMPLING_RANGES = {
    "temperature": Number(0),
    "top_p": Number(0, 1, above=True),
    "top_k": Number(0, whole=True),
    "min_p": Number(0, 1),
    "repetition_penalty": POSITIVE,
}


def read_json(path: Path) -> dict:
    """Read a JSON object from a file; raise CheckpointError if that fails."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: cannot be read as JSON ({one_line(e)})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value


def read_dtype(path: Path, *configs: Any) -> str | None:
    """Return the first dtype named in a checkpoint's configs (the model's, then those nested in it).

    Raises:
        CheckpointError: if `dtype` and `torch_dtype` of one config differ.
    """
    for config in configs:
        names = {}
        for key in ("dtype", "torch_dtype"):
            if isinstance(config, dict) and config.get(key) is not None:
                names[key] = str(config[key]).removeprefix("torch.")
        _check_equal(f"{path}: ", names)
        if names:
            return next(iter(names.values()))
    return None


def read_token_ids(path: Path, config: dict, key: str, default: int) -> list[int]:
    """Return the ids under a key whose value may be one id, a list of ids, or null for the default."""
    ids = default if config.get(key) in (None, []) else config[key]
    ids = ids if isinstance(ids, list) else [ids]
    for each in ids:
        TOKEN_ID.check(f"{path}: {key}", each)
    return ids


def llama_config(path: Path, config: Any, nested: str = "") -> dict:
    """Convert a Llama config written by transformers 4 or 5 to the arguments of mlx-lm's `llama.ModelArgs`.

    Args:
        path: the file, for error messages.
        config: Llama's config; other keys are ignored.
        nested: key of `config` in the file; empty if it is the whole file.

    Raises:
        CheckpointError: if a key is missing, malformed, or has a meaning that mlx-lm's Llama does not implement.
    """
    where = f"{path}: {nested and nested + '.'}"
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: {nested} is {reprlib.repr(config)}; it must be an object")
    given = {key: value for key, value in config.items() if value is not None}
    rope = _rope(where, given)
    if missing := [key for key in (*REQUIRED, "rope_theta") if key not in {**given, **rope}]:
        raise CheckpointError(f"{path}: {nested and nested + ' '}lacks {', '.join(missing)}")
    text = {}
    for key, number in {**REQUIRED, **OPTIONAL}.items():
        if key in given:
            number.check(where + key, given[key])
            text[key] = given[key]
    for key in FLAGS:
        text[key] = given.get(key, False)
        if not isinstance(text[key], bool):
            raise CheckpointError(f"{where}{key} is {reprlib.repr(text[key])}; it must be true or false")
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"{where}hidden_act is {reprlib.repr(given['hidden_act'])}, not Llama's silu")
    return {"model_type": "llama", **text, **rope}


def _rope(where: str, config: dict) -> dict:
    """Return `rope_scaling` and, if the config has one, `rope_theta`, from any of the keys that may hold them."""
    _check_whole_rotary(where, config)
    thetas = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    scalings = {}
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key, {})
        if not isinstance(given, dict):
            raise CheckpointError(f"{where}{key} is {reprlib.repr(given)}; it must be an object")
        given = {name: value for name, value in given.items() if value is not None}
        if "rope_theta" in given:
            thetas[f"{key}.rope_theta"] = given.pop("rope_theta")
        if given:
            scalings[key] = _scaling(f"{where}{key}.", given)
    for name, theta in thetas.items():
        ROPE_THETA.check(where + name, theta)
    _check_equal(where, thetas)
    _check_equal(where, scalings)
    rope = {"rope_scaling": next(iter(scalings.values()), None)}
    return {**rope, "rope_theta": next(iter(thetas.values()))} if thetas else rope


def _scaling(where: str, given: dict) -> dict | None:
    """Validate a rope_scaling; return None for the default rope."""
    types = {key: given[key] for key in ("rope_type", "type") if key in given}
    _check_equal(where, types)
    key, kind = next(iter(types.items()), ("rope_type", "default"))
    if not isinstance(kind, str) or kind not in ROPES:
        raise CheckpointError(f"{where}{key} is {reprlib.repr(kind)}; it must be one of {', '.join(ROPES)}")
    _check_whole_rotary(where, given)
    required, optional = ROPES[kind]
    scaling = {key: value for key, value in given.items() if key not in ("rope_type", "type", "partial_rotary_factor")}
    if missing := [key for key in required if key not in scaling]:
        raise CheckpointError(f"{where.removesuffix('.')} of type {kind} lacks {', '.join(missing)}")
    for key, value in scaling.items():
        if key not in required and key not in optional:
            raise CheckpointError(f"{where}{key} is not supported for rope type {kind}")
        {**required, **optional}[key].check(where + key, value)
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise CheckpointError(f"{where}high_freq_factor must be greater than low_freq_factor")
    return None if kind == "default" else {"rope_type": kind, **scaling}


def _check_whole_rotary(where: str, config: dict) -> None:
    if config.get("partial_rotary_factor", 1) != 1:
        factor = reprlib.repr(config["partial_rotary_factor"])
        raise CheckpointError(f"{where}partial_rotary_factor is {factor}; mlx-lm's Llama only rotates whole heads")


def _check_equal(where: str, values: dict[str, Any]) -> None:
    """Raise CheckpointError if the same setting has different values under different keys."""
    for key, value in values.items():
        first = next(iter(values))
        if value != values[first]:
            said = f"{first} is {reprlib.repr(values[first])}, but {key} is {reprlib.repr(value)}"
            raise CheckpointError(f"{where}{said}; they must be equal")


def older_rope(config: dict) -> dict:
    """Return the settings that any model's config has only in `rope_parameters`, under the keys of transformers 4.

    Passed to mlx-lm's `load` as `model_config`: most of its models read those keys, and fall back to a default.
    """
    given = config.get("rope_parameters")
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        return {}  # absent, or one per layer type, which those models read themselves
    apart = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in given.items() if key not in apart and value is not None}
    older = {key: given[key] for key in apart if given.get(key) is not None}
    older["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return {key: value for key, value in older.items() if config.get(key) is None}


def sampling_config(path: Path, config: dict) -> dict:
    """Complete a generation config: keys that are missing or null get the reference's sampling.

    A missing `do_sample` is true, because the released files lack it and the reference samples by default. If it is
    false, the only other default is Hugging Face's, no repetition penalty.

    Raises:
        CheckpointError: if a value has the wrong type or is out of range.
    """
    own = {key: value for key, value in config.items() if value is not None}
    if not isinstance(own.get("do_sample", True), bool):
        raise CheckpointError(f"{path}: do_sample is {reprlib.repr(own['do_sample'])}; it must be true or false")
    for key, number in SAMPLING_RANGES.items():
        if key in own:
            number.check(f"{path}: {key}", own[key])
    return {**(SAMPLING if own.get("do_sample", True) else GREEDY), **own}


def one_line(error: Exception) -> str:
    """Return an error's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__

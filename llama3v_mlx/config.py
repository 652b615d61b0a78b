"""Validate Hugging Face configs and convert them to the form that mlx-lm reads.

transformers 5 writes `rope_parameters` and `dtype` where 4 wrote `rope_theta`, `rope_scaling` and `torch_dtype`.
mlx-lm's Llama only knows the older form, and silently assumes a missing rope_theta to be 10000.
"""

import json
import reprlib
from pathlib import Path
from typing import Any

from .fields import CheckpointError, Choice, Flag, Items, Number, Object, Text, check_fields, check_object
from .files import check_file

SIZE, TOKEN_ID = Number(1, 2**31 - 1, whole=True), Number(0, 2**31 - 1, whole=True)
POSITIVE = Number(0, 1e18, above=True)  # MLX takes no larger integer

DEPTH = Number(1, 1000, whole=True)  # layers; a module is built for each before the weights are looked at

# Required keys of a Llama config, and the other keys that mlx-lm's Llama accepts, apart from the rope's.
REQUIRED = {key: SIZE for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
REQUIRED |= {"num_hidden_layers": DEPTH, "rms_norm_eps": POSITIVE, "max_position_embeddings": SIZE}
OPTIONAL = {key: SIZE for key in ("num_key_value_heads", "head_dim")}
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")

# Transformer of SigLIP: keys that its vision and text configs share, and the others of each.
TOWER = {key: SIZE for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
TOWER |= {"num_hidden_layers": DEPTH, "layer_norm_eps": POSITIVE, "hidden_act": Text()}
PIXELS = Number(1, 4096, whole=True)
VISION = TOWER | {"model_type": Text(), "num_channels": Number(3, 3, whole=True), "vision_use_head": Flag()}
VISION |= {"image_size": PIXELS, "patch_size": PIXELS}
SIGLIP_TEXT = TOWER | {"projection_size": SIZE, "vocab_size": SIZE, "max_position_embeddings": SIZE}
QUERIES = Number(1, 2**14, whole=True)
PROJECTOR = {key: SIZE for key in ("hidden_size", "vision_hidden_size", "num_attention_heads")}
PROJECTOR |= {"num_queries": QUERIES, "layer_norm_eps": POSITIVE, "num_blocks": DEPTH}
PROJECTOR |= {"projector_type": Choice(("resampler", "self-attention"))}
SLICES = Number(1, 1000, whole=True)
IMAGE = {"scale_resolution": PIXELS, "patch_size": PIXELS, "max_slice_nums": SLICES, "square": Flag()}
STRUCTURE = ("image_start", "image_end", "slice_start", "slice_end", "newline")
PROMPT_TOKENS = {key: TOKEN_ID for key in ("image", *STRUCTURE)}
QUANTIZATION = {"group_size": Choice((16, 32, 64, 128)), "bits": Choice((2, 3, 4, 5, 6, 8))}
QUANTIZATION |= {"mode": Choice(("affine", "mxfp4", "nvfp4", "mxfp8"))}

# Adapters in mlx-lm's form.
ADAPTER = {"fine_tune_type": Choice(("lora", "dora", "full")), "num_layers": Number(-1, DEPTH.high, whole=True)}
ADAPTER |= {"lora_parameters": Object()}
LORA = {"rank": Number(1, 2**16, whole=True), "scale": Number(-1e6, 1e6), "dropout": Number(0, 0.999)}
LORA |= {"keys": Items(Text())}

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
ROPE_THETA = Number(1, 1e18, above=True)

# The reference's sampling (`chat` with sampling=True), and Hugging Face's without it.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 100, "repetition_penalty": 1.05}
GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
SAMPLING_RANGES = {
    "do_sample": Flag(),
    "temperature": Number(0, 1e18),
    "top_p": Number(0, 1, above=True),
    "top_k": Number(0, whole=True),
    "min_p": Number(0, 1),
    "repetition_penalty": POSITIVE,
}


def read_json(path: Path) -> dict:
    """Read a JSON object from a file; raise CheckpointError if that fails."""
    try:
        check_file(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
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
    given = {key: value for key, value in check_object(f"{path}: {nested}", config).items() if value is not None}
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
        Flag().check(where + key, text[key])
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
        given = {name: value for name, value in check_object(where + key, given).items() if value is not None}
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


def check_model_config(path: Path, config: dict) -> dict:
    """Check the parts of a config in our layout besides Llama's, and that they fit together; return the config.

    Raises:
        CheckpointError: naming the key, if a value is missing, malformed, or does not fit the others.
    """
    text = config["text_config"]
    parts = {
        "vision_config": (VISION, ("hidden_size", "image_size", "patch_size")),
        "projector_config": (PROJECTOR, ("hidden_size", "vision_hidden_size", "num_queries", "num_attention_heads")),
        "image_config": (IMAGE, ()),
        "prompt_tokens": (PROMPT_TOKENS, ("image",)),
    }
    checked = {key: check_fields(f"{path}: {key}", config[key], *table) for key, table in parts.items()}
    vision, projector, image, tokens = checked.values()
    structure = [key for key in STRUCTURE if key in tokens]
    if structure and len(structure) < len(STRUCTURE):
        raise CheckpointError(f"{path}: prompt_tokens lacks {', '.join(set(STRUCTURE) - set(structure))}")
    for key, token in tokens.items():
        Number(0, text["vocab_size"] - 1, whole=True).check(f"{path}: prompt_tokens.{key}", token)
    _check_equal(
        f"{path}: ",
        {"projector_config.hidden_size": projector["hidden_size"], "text_config.hidden_size": text["hidden_size"]},
    )
    _check_equal(
        f"{path}: ",
        {
            "projector_config.vision_hidden_size": projector["vision_hidden_size"],
            "vision_config.hidden_size": vision["hidden_size"],
        },
    )
    patch = {"image_config.patch_size": image.get("patch_size", 14), "vision_config.patch_size": vision["patch_size"]}
    _check_equal(f"{path}: ", patch)
    for key, widths in {"vision_config": vision, "projector_config": projector, "text_config": text}.items():
        check_heads(f"{path}: {key}", widths)
    if projector["hidden_size"] % 4:
        raise CheckpointError(
            f"{path}: projector_config.hidden_size is {projector['hidden_size']}, not a multiple of 4"
        )
    if config.get("quantization") is not None:
        check_quantization(f"{path}: quantization", config["quantization"])
    return {**config, **checked}


def check_heads(where: str, config: dict) -> None:
    """Raise CheckpointError if a transformer's heads do not divide its width, or a tower is narrower than a patch."""
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if width and heads and width % heads and not config.get("head_dim"):
        raise CheckpointError(f"{where}.hidden_size is {width}, which {heads} heads do not divide")
    if heads and (groups := config.get("num_key_value_heads")) and heads % groups:
        raise CheckpointError(f"{where}.num_attention_heads is {heads}, which {groups} key-value heads do not divide")
    if config.get("patch_size", 0) > config.get("image_size", PIXELS.high):
        raise CheckpointError(f"{where}.patch_size is larger than image_size")


def check_quantization(where: str, quantization: Any) -> None:
    """Raise CheckpointError for malformed quantization settings: the common ones, or a module's own."""
    check_fields(where, quantization, QUANTIZATION, ("group_size", "bits"))
    for module, own in quantization.items():
        if module not in QUANTIZATION and own not in (None, True, False):
            check_fields(f"{where}.{module}", own, QUANTIZATION, ("group_size", "bits"))


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
    check_fields(str(path), own, SAMPLING_RANGES)
    return {**(SAMPLING if own.get("do_sample", True) else GREEDY), **own}


def some(noun: str, items: list[str], most: int = 10) -> str:
    """Format a list as its length and its first items."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return f"{len(items)} {noun}{'s' if len(items) > 1 else ''}: {', '.join(items[:most])}{more}"


def one_line(error: Exception) -> str:
    """Return an error's text without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__

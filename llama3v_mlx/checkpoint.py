"""Checkpoints on disk: find one, read its config in either layout, load its tensors strictly.

Two layouts are supported: Hugging Face's (the released llama3v and MiniCPM-Llama3-V-2.5 folders) and ours, written by
`convert`. Only safetensors, JSON and the chat template are read; no code from a checkpoint is ever run.
"""

import os
import reprlib
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from .config import (
    PIXELS,
    QUERIES,
    SIZE,
    SLICES,
    check_model_config,
    llama_config,
    one_line,
    read_dtype,
    read_json,
    read_token_ids,
    sampling_config,
    some,
)
from .device import check_kernels, check_threads
from .fields import CheckpointError, Flag, check_fields, check_object
from .files import check_file, list_folder
from .hub import HubError, download
from .prompt_tokens import EOT, PromptTokens
from .tokenizer import token_ids

MODEL_TYPE = "llama3v"
RELEASED_TYPES = ("llama3v", "minicpmv")
CONFIG, INDEX, GENERATION_CONFIG = "config.json", "model.safetensors.index.json", "generation_config.json"
DOWNLOADED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json")
DOWNLOADED += ("preprocessor_config.json", "processor_config.json", "spiece.model")  # SigLIP's

# Names of the bundled models in stores and conversations, independent of where the package is installed.
BUNDLED = {f"demo:{name}": Path(__file__).parent / "demo" / name for name in ("checkpoint", "siglip")}


# Required keys of a config in our layout, besides `text_config`.
OUR_KEYS = ("vision_config", "projector_config", "image_config", "prompt_tokens", "bos_token_id", "eos_token_id")
# Defaults of keys that the released llama3v config lacks: those of MiniCPM-Llama3-V-2.5, which has the same structure.
_VISION_DEFAULTS = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def find_checkpoint(path_or_hf_repo: str | Path, revision: str | None = None, more: float = 0.0) -> Path:
    """Find the folder of a checkpoint: a local one, or a Hub repository downloaded into Hugging Face's cache.

    Args:
        path_or_hf_repo: a folder, or owner/name.
        revision: a branch, tag or commit of the repository.
        more: what the caller will write to the same disk, as a share of the download.

    Raises:
        CheckpointError: if there is no such folder, and the repository cannot be downloaded; or if the folder has no
            config, or a revision of it is asked for.
    """
    path = BUNDLED.get(str(path_or_hf_repo)) or Path(path_or_hf_repo).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path}: has no {CONFIG}; give a checkpoint folder")
        if revision is not None:
            raise CheckpointError(f"{path}: is a folder here, which has no revision {revision}")
        return path
    name = str(path_or_hf_repo)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name}: no such folder, and not a Hub repository (owner/name)")

    try:
        path = download(name, revision, DOWNLOADED, more)
    except HubError as e:
        raise CheckpointError(str(e)) from e
    return find_checkpoint(path)


def name_of(path_or_hf_repo: str | Path) -> str:
    """Name of a checkpoint in stores: a folder's full path, a repository's name, or one of `BUNDLED`."""
    path = Path(path_or_hf_repo).expanduser()
    if not path.is_dir():
        return str(path_or_hf_repo)
    return next((name for name, folder in BUNDLED.items() if path == folder), str(path.resolve()))


def read_config(folder: Path) -> dict:
    """Read the config of a checkpoint, translated to our layout if it is in the released one.

    Raises:
        CheckpointError: if it is missing, damaged, of another model, or not supported.
    """
    path = folder / CONFIG
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in RELEASED_TYPES:
        raise CheckpointError(f"{path}: model_type is {kind!r}; expected {' or '.join(RELEASED_TYPES)}")
    dtype = read_dtype(path, config, config.get("text_config"), config.get("vision_config"))
    if config.get("text_config") is not None:
        return _our_config(path, config, dtype)
    if config.get("quantization_config") or config.get("quantization"):
        raise CheckpointError(f"{path}: is quantized already, by another program; give the original checkpoint")
    text = llama_config(path, config)
    if config.get("query_num") is None:
        raise CheckpointError(f"{path}: lacks query_num")
    if kind == "minicpmv" and str(config.get("version", "2.5")) != "2.5":
        raise CheckpointError(f"{path}: MiniCPM-V {config['version']} is not supported; only 2.5 is")

    known = {"query_num": QUERIES, "patch_size": PIXELS, "image_size": SIZE, "slice_mode": Flag()}
    given = check_fields(str(path), config, known)
    slicing = {"scale_resolution": PIXELS, "max_slice_nums": SLICES}
    slices = check_fields(f"{path}: slice_config", config.get("slice_config") or {}, slicing)
    patch_size = given.get("patch_size", 14)
    vision = {**_VISION_DEFAULTS, "image_size": 70 * patch_size, "patch_size": patch_size}
    own = check_object(f"{path}: vision_config", config.get("vision_config") or {})
    vision |= {key: value for key, value in own.items() if value is not None} | {"model_type": "idefics2"}
    ids = token_ids(folder, PromptTokens.TEXTS.values())
    made = make_config(
        folder,
        dtype=dtype or "float16",
        text=text,
        bos=read_token_ids(path, config, "bos_token_id", 128000)[0],
        eos=read_token_ids(path, config, "eos_token_id", 128001),
        vision=vision,
        projector={"projector_type": "resampler", "num_queries": given["query_num"]},
        image={
            "scale_resolution": slices.get("scale_resolution", given.get("image_size", 448)),
            "patch_size": patch_size,
            "max_slice_nums": slices.get("max_slice_nums", 9) if given.get("slice_mode", True) else 1,
        },
        prompt_tokens=dict(zip(PromptTokens.TEXTS, ids, strict=True)),
    )
    return check_model_config(path, made)


def _our_config(path: Path, config: dict, dtype: str | None) -> dict:
    """Check a config in our layout, and translate its Llama config for mlx-lm."""
    if missing := [key for key in OUR_KEYS if config.get(key) is None]:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}")
    llama = llama_config(path, config["text_config"], "text_config")
    newer = ("rope_parameters", "dtype", "torch_dtype")
    text = {key: value for key, value in config["text_config"].items() if key not in newer}
    config = {key: value for key, value in config.items() if key not in newer}
    config["text_config"] = {**text, **llama}
    config["eos_token_id"] = read_token_ids(path, config, "eos_token_id", 128001)
    config["bos_token_id"] = read_token_ids(path, config, "bos_token_id", 128000)[0]
    config = check_model_config(path, config)
    return config if dtype is None else {**config, "dtype": dtype}


def make_config(
    tokenizer: Path,
    dtype: str,
    text: dict,
    bos: int,
    eos: list[int],
    vision: dict,
    projector: dict,
    image: dict,
    prompt_tokens: dict,
) -> dict:
    """Make a config in our layout; `tokenizer` is the tokenizer's folder, the projector's widths are derived."""
    width = text["hidden_size"]
    return {
        "model_type": MODEL_TYPE,
        "processor_type": MODEL_TYPE,
        "architectures": ["Llama3V"],
        "dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": list(dict.fromkeys([*eos, *token_ids(tokenizer, [EOT])])),
        "text_config": text,
        "vision_config": vision,
        "projector_config": {
            "hidden_size": width,
            "vision_hidden_size": vision["hidden_size"],
            "num_attention_heads": max(1, width // 128),
            **projector,
        },
        "image_config": image,
        "prompt_tokens": prompt_tokens,
    }


def read_generation_config(folder: Path, config: dict) -> dict:
    """Sampling parameters and stop tokens: the folder's file over the reference's values, see `sampling_config`."""
    path = folder / GENERATION_CONFIG
    sampling = sampling_config(path, read_json(path) if os.path.lexists(path) else {})
    # The released file names <|end_of_text|> alone, but turns end with <|eot_id|>.
    return {**sampling, "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}


def read_tensors(folder: Path) -> dict[str, mx.array]:
    """Load all tensors of a checkpoint lazily, by name, in the order of its files.

    Raises:
        CheckpointError: if a shard is missing or damaged, or has a tensor of another one.
    """
    tensors: dict[str, mx.array] = {}
    for path in shard_paths(folder):
        shard = read_shard(path)
        if twice := shard.keys() & tensors.keys():
            raise CheckpointError(
                f"{path}: {some('tensor', sorted(twice))} of another file of the folder; are these two checkpoints?"
            )
        tensors |= shard
    return tensors


def shard_paths(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint: those that its index names, or all.

    Raises:
        CheckpointError: if there are none, one is missing, or the index names a file outside the folder.
    """
    index = folder / INDEX
    if not os.path.lexists(index):
        if paths := list_folder(folder, "*.safetensors"):
            return paths
        raise CheckpointError(f"{folder}: has no safetensors files; only safetensors weights are read")
    weight_map = check_object(f"{index}: weight_map", read_json(index).get("weight_map"))
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\0" in shard:
            shown = reprlib.repr(shard)
            raise CheckpointError(f"{index}: weight_map has {shown} for {name}; it must be the name of a file")
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(f"{folder}: {some('missing shard', missing)}; copy or download the folder again")
    return [folder / shard for shard in shards]


def read_shard(path: Path) -> dict[str, mx.array]:
    """Load the tensors of a safetensors file lazily, in the order of their data, after `check_shard`."""
    names = check_shard(path)
    check_threads()
    check_kernels()
    try:
        loaded = mx.load(str(path), format="safetensors")
        return {name: loaded[name] for name in names}
    except (RuntimeError, ValueError, KeyError) as e:  # what MLX's own parser does not accept
        raise CheckpointError(f"{path}: not a safetensors file that MLX can read ({one_line(e)})") from e


def check_shard(path: Path) -> list[str]:
    """Check a safetensors file against its header, before MLX reads it.

    Returns:
        The names of its tensors, in the order of their data.

    Raises:
        CheckpointError: if it is not a safetensors file, is damaged, or its size does not match its header.
    """
    try:
        check_file(path)
        with safe_open(path, framework="np") as file:
            return file.offset_keys()
    except FileNotFoundError as e:
        raise CheckpointError(f"{path}: no such file") from e
    except (OSError, SafetensorError) as e:
        raise CheckpointError(
            f"{path}: not a safetensors file, damaged or cut short ({one_line(e)}); download it again"
        ) from e


def cast(tensors: dict[str, mx.array], dtype: mx.Dtype | None) -> dict[str, mx.array]:
    """Cast floating-point tensors lazily; None keeps them."""
    if dtype is None:
        return tensors
    return {n: t.astype(dtype) if mx.issubdtype(t.dtype, mx.floating) else t for n, t in tensors.items()}


def check_tensors(path: Path, model: nn.Module | dict, tensors: Mapping[str, mx.array]) -> None:
    """Check tensors, without reading them, against the parameters of a model or another tree.

    Raises:
        CheckpointError: naming `path` and up to ten tensors that are missing, unknown, or of the wrong shape or type.
    """
    expected = dict(tree_flatten(model.parameters() if isinstance(model, nn.Module) else model))
    wrong = [f"{name} missing" for name in expected if name not in tensors]
    wrong += [f"{name} unknown" for name in tensors if name not in expected]
    for name, parameter in expected.items():
        given = tensors.get(name, parameter)
        if given.shape != parameter.shape:
            wrong.append(f"{name} {list(given.shape)} instead of {list(parameter.shape)}")
        elif _kind(given) != _kind(parameter):
            wrong.append(f"{name} of {given.dtype} instead of {parameter.dtype}")
    if wrong:
        raise CheckpointError(f"{path}: {some('wrong tensor', wrong)}; is this the right checkpoint?")


def _kind(tensor: mx.array) -> object:
    """Dtypes that may replace each other: floating-point ones, or only the same."""
    return "floating" if mx.issubdtype(tensor.dtype, mx.floating) else tensor.dtype

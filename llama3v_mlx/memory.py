"""How much memory a checkpoint needs, known from its headers before a tensor is read, and what fits this machine."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from .checkpoint import find_checkpoint, read_config, read_tensors
from .device import memory, memory_limit, on_gpu
from .image import ImageConfig
from .models.llama3v import ModelArgs, rename, tile_batch_size, tile_bytes
from .prompt import PromptTokens

PREFILL_STEP = 2048  # tokens that mlx-lm reads at once
SMALL_MEMORY = 9 * 10**9  # bytes; a Mac of 8 GB has less
BITS, GROUP_SIZE = (8, 6, 5, 4, 3, 2), 64  # of `llama3v convert -q`


class MemoryLimitError(ValueError):
    """A model that does not fit the memory; the message says what would."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes, loaded and in use."""

    vision: int  # weights of tower and projector
    language: int  # weights of Llama
    parameters: int  # of Llama, a number
    cache: int  # keys and values
    tiles: int  # activations while images are encoded
    prefill: int  # activations while a prompt is read
    item_bytes: int  # of a floating value
    low_memory: bool = False  # tower and projector are not in memory together with Llama

    @property
    def total(self) -> int:
        if self.low_memory:
            return max(self.vision + self.tiles, self.language + self.cache + self.prefill)
        return self.vision + self.language + self.cache + max(self.tiles, self.prefill)

    def quantized(self, bits: int) -> "Footprint":
        """The same checkpoint with a Llama of so many bits per weight, and a scale and a bias for each group."""
        return replace(self, language=int(self.parameters * (bits / 8 + 2 * self.item_bytes / GROUP_SIZE)))

    def __str__(self) -> str:
        parts = {"weights": self.vision + self.language, "cache": self.cache}
        parts["activations"] = max(self.tiles, self.prefill)
        return f"{_gb(self.total)} ({', '.join(f'{name} {_gb(size)}' for name, size in parts.items())})"


def footprint(
    folder: Path,
    *,
    images: int | None = None,
    text_tokens: int = 0,
    max_image_tiles: int | None = None,
    kv_bits: int | None = None,
    dtype: mx.Dtype | None = None,
    low_memory: bool = False,
) -> Footprint:
    """What the checkpoint in a folder takes. Only headers are read.

    Args:
        folder: the checkpoint, of either layout.
        images: how many a prompt has; None: as much as the context has room for.
        text_tokens: of prompt and answer together.
        max_image_tiles, dtype, low_memory: see `load`.
        kv_bits: bits per value of a quantized cache.

    Raises:
        CheckpointError: if the checkpoint cannot be used.
    """
    options = {"images": images, "text_tokens": text_tokens, "max_image_tiles": max_image_tiles, "kv_bits": kv_bits}
    return footprint_of(read_config(folder), read_tensors(folder).items(), dtype, low_memory=low_memory, **options)


def footprint_of(
    config: dict,
    tensors: Iterable[tuple[str, mx.array]],
    dtype: mx.Dtype | None = None,
    *,
    images: int | None = None,
    text_tokens: int = 0,
    max_image_tiles: int | None = None,
    kv_bits: int | None = None,
    low_memory: bool = False,
) -> Footprint:
    """`footprint` of a config in our layout and of named tensors, which are not evaluated."""
    args, text = ModelArgs.from_dict(config), config["text_config"]
    dtype = dtype or (None if on_gpu() else mx.float32)
    weights, parameters, item_bytes = {True: 0, False: 0}, 0, 1
    for name, tensor in tensors:
        name, size = rename(name), tensor.dtype.size
        is_language, is_floating = name.startswith("language_model."), mx.issubdtype(tensor.dtype, mx.floating)
        if is_floating:
            size = (dtype or tensor.dtype).size
            item_bytes = max(item_bytes, size)
        weights[is_language] += tensor.size * size
        if is_language and name.endswith(".scales"):
            parameters += tensor.size * config["quantization"]["group_size"]
        elif is_language and is_floating and not name.endswith(".biases"):
            parameters += tensor.size

    image = ImageConfig(**config["image_config"]).with_max_tiles(max_image_tiles)
    slices = image.max_slice_nums if image.max_slice_nums > 1 else 0
    block = PromptTokens(**config["prompt_tokens"]).block(
        (slices, 1) if slices else None, config["projector_config"]["num_queries"]
    )
    tokens = context = text.get("max_position_embeddings") or 8192
    if images is not None:
        tokens = min(context, images * len(block) + text_tokens)
    patches = (image.scale_resolution // image.patch_size) ** 2
    at_once = min((1 + slices) * (1 if images is None else images), tile_batch_size(args, patches, item_bytes))

    heads, step = text["num_attention_heads"], min(tokens, PREFILL_STEP)
    kv_heads = text.get("num_key_value_heads") or heads
    kv_bytes = kv_bits / 8 + 2 * item_bytes / GROUP_SIZE if kv_bits else item_bytes
    activations = step * (3 * text["intermediate_size"] + 6 * text["hidden_size"]) + 4 * text["vocab_size"]
    if not on_gpu():  # without a fused kernel, the scores of all heads
        activations += 2 * heads * step**2
    return Footprint(
        vision=weights[False],
        language=weights[True],
        parameters=parameters,
        cache=math.ceil(2 * text["num_hidden_layers"] * kv_heads * (text["hidden_size"] // heads) * kv_bytes * tokens),
        tiles=at_once * tile_bytes(args, patches, item_bytes),
        prefill=activations * item_bytes,
        item_bytes=item_bytes,
        low_memory=low_memory,
    )


def check_memory(path_or_hf_repo: str | Path, *, revision: str | None = None, **options) -> Footprint:
    """Compare what a checkpoint takes with what this machine has for it, before it is loaded.

    That is the recommended working set of a GPU, or else the system's memory.

    Args:
        path_or_hf_repo, revision: see `load`.
        options: see `footprint`.

    Raises:
        MemoryLimitError: if it does not fit; the message says what would.
        CheckpointError: if the checkpoint cannot be used.
    """
    folder, limit = find_checkpoint(path_or_hf_repo, revision), memory_limit()
    need = footprint(folder, **options)
    if need.total <= limit:
        return need
    frugal = replace(need, low_memory=True)
    ways = []
    if frugal.total <= limit:
        ways.append(f"--low-memory ({_gb(frugal.total)})")
    if options.get("max_image_tiles") != 1:
        few = footprint(folder, **{**options, "max_image_tiles": 1})
        if few.total <= limit:
            ways.append(f"--max-image-tiles 1 ({_gb(few.total)})")
    for model, more in ((need, ""), (frugal, " with --low-memory")):
        fitting = [bits for bits in BITS if model.quantized(bits).total <= limit]
        if fitting and model.quantized(fitting[0]).language < need.language:
            size = model.quantized(fitting[0]).total
            ways.append(f"llama3v convert -q --q-bits {fitting[0]} of the original{more} ({_gb(size)})")
            break
    what = f"what fits: {', or '.join(ways)}" if ways else "nothing here makes it fit"
    raise MemoryLimitError(
        f"{path_or_hf_repo} takes {need} of memory, and {_gb(limit)} can be used here; {what}; --force loads it anyway"
    )


def is_small() -> bool:
    """Whether this machine has 8 GB or less, so that tower and projector had better not stay in its memory."""
    return memory() < SMALL_MEMORY


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

"""Memory requirements of a checkpoint, computed from its headers before any tensor is read."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from .checkpoint import find_checkpoint, read_config, read_tensors
from .device import memory, memory_limit, on_gpu
from .drafting.draft_model import read_draft_config
from .models.llama3v import PREFILL_STEP, ModelArgs, tile_batch_size, tile_bytes
from .models.released import rename
from .prompt_tokens import PromptTokens
from .tiling import ImageConfig

CONTEXT = 8192  # tokens, of a config that does not say
SMALL_MEMORY = 9 * 10**9  # bytes; an 8 GB Mac has less
BITS, GROUP_SIZE = (8, 6, 5, 4, 3, 2), 64  # choices and default of `llama3v convert -q`


class MemoryLimitError(ValueError):
    """Raised when a model does not fit in memory; the message says what would."""


@dataclass(frozen=True)
class Footprint:
    """Memory of a loaded model in use, in bytes."""

    vision: int  # weights of tower and projector
    language: int  # weights of Llama
    parameters: int  # number of parameters of Llama
    cache: int  # key-value cache
    tiles: int  # activations while images are encoded
    prefill: int  # activations of the prefill
    item_bytes: int  # size of a floating-point value
    draft: int = 0  # weights and key-value cache of a draft model
    low_memory: bool = False  # tower and projector are never in memory together with Llama

    @property
    def total(self) -> int:
        """Peak memory in bytes; images are encoded before the prefill."""
        if self.low_memory:
            return self.draft + max(self.vision + self.tiles, self.language + self.cache + self.prefill)
        return self.draft + self.vision + self.language + self.cache + max(self.tiles, self.prefill)

    def quantized(self, bits: int) -> "Footprint":
        """Footprint with Llama quantized to `bits` per weight, plus a scale and a bias per group."""
        return replace(self, language=int(self.parameters * (bits / 8 + 2 * self.item_bytes / GROUP_SIZE)))

    def __str__(self) -> str:
        parts = {"weights": self.vision + self.language, "cache": self.cache}
        parts["activations"] = max(self.tiles, self.prefill)
        if self.draft:
            parts["draft model"] = self.draft
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
    draft_model: str | Path | None = None,
) -> Footprint:
    """Compute the footprint of the checkpoint in a folder. Only headers are read.

    Args:
        folder: a checkpoint in either layout.
        images: number of images in a prompt; None: as many as fit in the context.
        text_tokens: text tokens of prompt and answer together.
        max_image_tiles, dtype, low_memory: see `load`.
        kv_bits: bits per value of a quantized key-value cache.
        draft_model: see `load_draft_model`.

    Raises:
        CheckpointError: if a checkpoint cannot be used.
    """
    options = {"images": images, "text_tokens": text_tokens, "max_image_tiles": max_image_tiles, "kv_bits": kv_bits}
    config = read_config(folder)
    need = footprint_of(config, read_tensors(folder).items(), dtype, low_memory=low_memory, **options)
    if draft_model is None:
        return need
    # It reads no visual tokens; with any number of images, all of the context may be text.
    context = config["text_config"].get("max_position_embeddings") or CONTEXT
    return _with_draft(need, draft_model, context if images is None else min(context, text_tokens), dtype)


def _with_draft(need: Footprint, draft_model: str | Path, tokens: int, dtype: mx.Dtype | None) -> Footprint:
    """Add a draft model that reads `tokens`, or as many as fit in its context."""
    folder = find_checkpoint(draft_model)
    config = read_draft_config(folder)
    weights, item_bytes = 0, 1
    for tensor in read_tensors(folder).values():
        size = _item_size(tensor, dtype)
        weights += tensor.size * size
        if mx.issubdtype(tensor.dtype, mx.floating):
            item_bytes = max(item_bytes, size)
    tokens = min(tokens, config["max_position_embeddings"])
    cache, prefill = _llama_memory(config, tokens, item_bytes)
    return replace(need, draft=weights + cache, prefill=max(need.prefill, prefill))


def _item_size(tensor: mx.array, dtype: mx.Dtype | None) -> int:
    """Size in bytes of a value of a tensor that is loaded as `dtype`; None: by `load`'s default."""
    if not mx.issubdtype(tensor.dtype, mx.floating):
        return tensor.dtype.size
    return (dtype or (tensor.dtype if on_gpu() else mx.float32)).size


def _llama_memory(text: dict, tokens: int, item_bytes: int, kv_bits: int | None = None) -> tuple[int, int]:
    """Bytes of a Llama's key-value cache of `tokens`, and of the activations of their prefill."""
    heads, step = text["num_attention_heads"], min(tokens, PREFILL_STEP)
    kv_heads = text.get("num_key_value_heads") or heads
    width = text.get("head_dim") or text["hidden_size"] // heads
    kv_bytes = kv_bits / 8 + 2 * item_bytes / GROUP_SIZE if kv_bits else item_bytes
    activations = step * (3 * text["intermediate_size"] + 6 * text["hidden_size"]) + 4 * text["vocab_size"]
    if not on_gpu():  # without a fused kernel, the attention scores of all heads
        activations += 2 * heads * step**2
    cache = math.ceil(2 * text["num_hidden_layers"] * kv_heads * width * kv_bytes * tokens)
    return cache, activations * item_bytes


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
    """Compute the footprint from a config in our layout and named tensors, which are not evaluated.

    The other arguments are those of `footprint`.
    """
    args, text = ModelArgs.from_dict(config), config["text_config"]
    vision = language = parameters = 0
    item_bytes = 1
    for name, tensor in tensors:
        name, size = rename(name), _item_size(tensor, dtype)
        is_floating = mx.issubdtype(tensor.dtype, mx.floating)
        if is_floating:
            item_bytes = max(item_bytes, size)
        if not name.startswith("language_model."):
            vision += tensor.size * size
            continue
        language += tensor.size * size
        if name.endswith(".scales"):
            parameters += tensor.size * config["quantization"]["group_size"]
        elif is_floating and not name.endswith(".biases"):
            parameters += tensor.size

    image = ImageConfig(**config["image_config"]).with_max_tiles(max_image_tiles)
    slices = image.max_slice_nums if image.max_slice_nums > 1 else 0
    block = PromptTokens(**config["prompt_tokens"]).block(
        (slices, 1) if slices else None, config["projector_config"]["num_queries"]
    )
    tokens = context = text.get("max_position_embeddings") or CONTEXT
    if images is not None:
        tokens = min(context, images * len(block) + text_tokens)
    patches = (image.scale_resolution // image.patch_size) ** 2
    at_once = min((1 + slices) * (1 if images is None else images), tile_batch_size(args, patches, item_bytes))

    cache, prefill = _llama_memory(text, tokens, item_bytes, kv_bits)
    return Footprint(
        vision=vision,
        language=language,
        parameters=parameters,
        cache=cache,
        tiles=at_once * tile_bytes(args, patches, item_bytes),
        prefill=prefill,
        item_bytes=item_bytes,
        low_memory=low_memory,
    )


def check_memory(path_or_hf_repo: str | Path, *, revision: str | None = None, **options) -> Footprint:
    """Check that a checkpoint fits in memory before it is loaded.

    The limit is the GPU's recommended working set, or the system's memory without a GPU.

    Args:
        path_or_hf_repo, revision: see `load`.
        options: see `footprint`.

    Raises:
        MemoryLimitError: if it does not fit; the message says what would fit.
        CheckpointError: if the checkpoint cannot be used.
    """
    folder, limit = find_checkpoint(path_or_hf_repo, revision), memory_limit()
    need = footprint(folder, **options)
    if need.total <= limit:
        return need
    frugal = replace(need, low_memory=True)
    ways = []
    if need.draft and (without := need.total - need.draft) <= limit:
        ways.append(f"leaving out --draft-model {options['draft_model']} ({_gb(without)})")
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
            ways.append(f"llama3v convert -q --q-bits {fitting[0]} on the original checkpoint{more} ({_gb(size)})")
            break
    what = f"what fits: {', or '.join(ways)}" if ways else "no option makes it fit"
    raise MemoryLimitError(
        f"{path_or_hf_repo} needs {need} of memory, but only {_gb(limit)} is usable here; {what}; --force loads it "
        "anyway"
    )


def num_answers(need: Footprint, most: int) -> int:
    """Number of answers, 1 to `most`, that can be generated at once; `need` has the cache of one of them."""
    room = memory_limit() - need.total + need.cache
    return max(1, min(most, room // (2 * need.cache)))  # mlx-lm copies the batch's caches when an answer joins


def is_small() -> bool:
    """Return True if this machine has 8 GB or less, which calls for `low_memory`."""
    return memory() < SMALL_MEMORY


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"

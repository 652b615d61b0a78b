"""Llama3-V model: SigLIP tower, projector and mlx-lm's Llama."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama
from mlx_lm.models.base import BaseModelArgs

from ..device import memory_limit, on_gpu
from ..prompt_tokens import PromptTokens
from ..tiling import TiledImage
from .projector import ProjectorConfig, build_projector
from .released import relayout, rename
from .siglip import VisionConfig, VisionTower, encode_by_size

# Tiles per tower batch: enough to fill a GPU; fewer where their activations would exceed a share of the memory.
TILE_BATCH_SIZE = 16
TILE_MEMORY_SHARE = 1 / 16
PREFILL_STEP = 2048  # tokens of a prompt that Llama reads at once, as in mlx-lm


@dataclass
class ModelArgs(BaseModelArgs):
    """Config of a converted checkpoint, as mlx-lm reads it; the nested configs are validated in `config.py`."""

    model_type: str
    text_config: dict
    vision_config: dict
    projector_config: dict
    prompt_tokens: dict
    image_config: dict = field(default_factory=dict)

    @classmethod
    def from_dict(cls, params: dict) -> "ModelArgs":
        """Read config.json; mlx-lm calls this on any checkpoint of this model type.

        Raises:
            ValueError: if it is not a converted checkpoint's.
        """
        if "text_config" not in params:
            raise ValueError("this checkpoint is not converted; llama3v convert --hf-path … --mlx-path … does it")
        return super().from_dict(params)


class Model(nn.Module):
    """Llama3-V, with the interface of an mlx-lm vision model."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.prompt_tokens = PromptTokens(**args.prompt_tokens)
        self.vision_tower = VisionTower(VisionConfig.from_dict(args.vision_config))
        self.projector = build_projector(ProjectorConfig.from_dict(args.projector_config))
        self.language_model = llama.Model(llama.ModelArgs.from_dict(args.text_config))
        # Reads tower and projector lazily from disk; set to free their memory between images (--low-memory).
        self.reload_vision: Callable[[], dict[str, mx.array]] | None = None

    def __call__(self, inputs: mx.array, cache=None, input_embeddings: mx.array | None = None) -> mx.array:
        """Logits (B, L, vocab_size) of token ids (B, L), or of embeddings (B, L, hidden_size) instead of ids."""
        return self.language_model(inputs, cache, input_embeddings)

    def encode_image(self, images: Sequence[TiledImage]) -> list[mx.array]:
        """Encode images as visual tokens, one (tiles·num_queries, hidden_size) array each.

        Tiles of equal size are batched across images; no tile's result depends on another's. Rows are evaluated, and
        the memory that computing them took is released.
        """
        if not images:
            return []
        patch = self.vision_tower.config.patch_size
        patches = max((tile.shape[0] // patch) * (tile.shape[1] // patch) for image in images for tile in image.tiles)
        dtype = self.vision_tower.post_layernorm.weight.dtype
        rows = encode_by_size(images, self.encode_tiles, tile_batch_size(self.args, patches, dtype.size))
        mx.eval(rows)
        self.release_vision()
        return rows

    def release_vision(self) -> None:
        """Release memory after encoding images: buffers and, with `reload_vision`, tower and projector."""
        if self.reload_vision is not None:
            self.load_weights(list(self.reload_vision().items()), strict=False)
        mx.clear_cache()

    def encode_tiles(self, tiles: np.ndarray) -> mx.array:
        """Visual tokens (B, num_queries, hidden_size) of uint8 tiles (B, height, width, 3) of one size."""
        patch = self.vision_tower.config.patch_size
        _, H, W, _ = tiles.shape
        return self.projector(self.vision_tower(mx.array(tiles)), (H // patch, W // patch))

    def encode_steps(self, tiles: np.ndarray) -> Iterator[mx.array]:
        """Run `encode_tiles` layer by layer, yielding unevaluated arrays; the last one is the visual tokens."""
        patch = self.vision_tower.config.patch_size
        _, H, W, _ = tiles.shape
        for x in self.vision_tower.steps(mx.array(tiles)):
            yield x
        yield self.projector(x, (H // patch, W // patch))

    def embed_inputs(self, inputs: mx.array, pixel_values: Sequence[TiledImage] = ()) -> mx.array:
        """Embed a prompt in which each image is one run of placeholder ids; return (L, hidden_size).

        A run has the length of the image's whole block and is replaced by it: visual tokens, and the embeddings of
        <image>, </image>, <slice>, </slice> and newlines, exactly the sequence of training.

        Args:
            inputs: ids (L,).
            pixel_values: the prompt's images, in order.

        Raises:
            ValueError: if runs and images differ in number or length.
        """
        return self.splice(inputs, [image.grid for image in pixel_values], self.encode_image(pixel_values))

    def splice(
        self, inputs: mx.array, grids: Sequence[tuple[int, int] | None], visual_tokens: Sequence[mx.array]
    ) -> mx.array:
        """`embed_inputs` for encoded images, given their (columns, rows) grids and visual tokens."""
        ids = self.prompt_tokens.expand(np.array(inputs), grids, self.projector.config.num_queries)
        embeddings = self.language_model.model.embed_tokens(mx.array(ids))
        if not len(grids):
            return embeddings
        places = mx.array(np.flatnonzero(ids == self.prompt_tokens.image))
        embeddings[places] = mx.concatenate(list(visual_tokens)).astype(embeddings.dtype)
        return embeddings

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Convert tensors from any released layout, or from ours, to this model's names and layouts."""
        return dict(pair for name, tensor in weights.items() for pair in relayout(rename(name), tensor))

    @staticmethod
    def quant_predicate(path: str, module: nn.Module) -> bool:
        """Quantize Llama only: tower and projector are small, and faster in half precision.

        8 bits move the demo's visual tokens 3 times as far as float16 does, and the features of a random so400m 9 to 25
        times (`benchmarks/quantize.py --tower`). MLX has no group size of 32 or more for its fc2 of 4304 columns.
        """
        return path.startswith("language_model.")

    @property
    def layers(self) -> list[nn.Module]:
        return self.language_model.layers

    def make_cache(self) -> list:
        return self.language_model.make_cache()

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        self.language_model.shard(group)


def tile_bytes(args: ModelArgs, patches: int, item_bytes: int) -> int:
    """Upper bound of the activations of a tile with `patches` patches in tower and projector, in bytes, measured."""
    vision, projector = VisionConfig.from_dict(args.vision_config), ProjectorConfig.from_dict(args.projector_config)
    tower = patches * (4 * vision.hidden_size + 3 * vision.intermediate_size)
    scores = 0 if on_gpu() else 2 * vision.num_attention_heads * patches**2  # a GPU's fused kernel never stores them
    return item_bytes * max(tower + scores, 10 * patches * projector.hidden_size)


def tile_batch_size(args: ModelArgs, patches: int, item_bytes: int) -> int:
    """Number of tiles with `patches` patches per tower batch."""
    room = int(TILE_MEMORY_SHARE * memory_limit())
    return max(1, min(TILE_BATCH_SIZE, room // tile_bytes(args, patches, item_bytes)))

"""SigLIP's vision transformer in the two variants that Llama3-V uses, and SigLIP's text tower.

`idefics2`: the tower of the released weights. It accepts tiles of any size, with the position ids of `strip_ids`.
`siglip_vision_model`: Google's own tower, with one image size, one position row per patch, and a pooling head. The
transformer blocks are the same.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..tiling import TiledImage
from . import linux_cpu
from .base import Config


@dataclass
class VisionConfig(Config):
    """Keys and defaults of Hugging Face's `vision_config`; the defaults are so400m's."""

    model_type: str = "idefics2"  # or "siglip_vision_model"
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 980  # pixels; the position table has (image_size // patch_size)² rows
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    vision_use_head: bool = True  # Google's tower only

    def __post_init__(self):
        if self.hidden_act != "gelu_pytorch_tanh":
            raise ValueError(f"vision_config: hidden_act {self.hidden_act!r} is not SigLIP's gelu_pytorch_tanh")
        if self.model_type == "siglip":
            self.model_type = "siglip_vision_model"
        if self.model_type not in ("idefics2", "siglip_vision_model"):
            raise ValueError(f"vision_config: unknown model_type {self.model_type!r}")

    @property
    def side(self) -> int:
        """Patches along one side of the position table."""
        return self.image_size // self.patch_size


@lru_cache(maxsize=256)
def strip_ids(num_patches: int, side: int) -> mx.array:
    """Compute position ids (num_patches,) of a strip of patches: i·side // num_patches, with float32 rounding at ties.

    Equal to the released tower's `bucketize(arange(0, 1 - 1e-6, 1/N), arange(1/side, 1, 1/side), right=True)` in torch
    on an x86 CPU. If i·side is divisible by N, float32 rounding decides between two ids.
    """
    bounds = _torch_arange(1 / side, 1 / side, side - 1)
    fractions = _torch_arange(0.0, 1 / num_patches, num_patches)
    return mx.array(np.searchsorted(bounds, fractions, side="right").astype(np.int32))


def _torch_arange(start: float, step: float, count: int) -> np.ndarray:
    """Reproduce the float32 values of torch.arange: two vectors of 8 at a time, each from its rounded start."""
    i = np.arange(count)
    lane = i % 8
    in_vector = (start + (i - lane) * step).astype(np.float32) + lane * step
    return np.where(i < count - count % 16, in_vector, start + i * step).astype(np.float32)


class Embeddings(nn.Module):
    """Patch and position embeddings: uint8 (B, H, W, 3) → (B, h·w, hidden_size), patches in row-major order."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        patch, channels = config.patch_size, config.num_channels
        self.patch_embedding = nn.Conv2d(channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(config.side**2, config.hidden_size)

    def position_ids(self, num_patches: int) -> mx.array:
        """Rows of the position table, int32 (num_patches,)."""
        if self.config.model_type == "siglip_vision_model":
            return mx.arange(num_patches)
        return strip_ids(num_patches, self.config.side)

    def __call__(self, pixels: mx.array) -> mx.array:
        B, H, W, C = pixels.shape
        p = self.config.patch_size
        h, w = H // p, W // p
        # The convolution's windows do not overlap, so it is a matrix product over flattened patches.
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        x = pixels[:, : h * p, : w * p].astype(weight.dtype)
        x = x.reshape(B, h, p, w, p, C).swapaxes(2, 3).reshape(B, h * w, p * p * C)
        # value / 127.5 - 1, in -1…1, equals c·(value - 128) / 128 + (c - 1); (value - 128) / 128 is exact in any dtype.
        x, c = (x - 128) * (1 / 128), 128 / 127.5
        weight = weight.reshape(weight.shape[0], -1)
        bias = bias + ((c - 1) * weight.astype(mx.float32).sum(axis=1)).astype(bias.dtype)
        x = mx.addmm(bias, x, weight.T, alpha=c)  # (B, h·w, D)
        return x + self.position_embedding(self.position_ids(h * w))


class Attention(nn.Module):
    """Multi-head self-attention, (B, L, hidden_size) → (B, L, hidden_size), with biases and without a mask."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = (D // self.num_heads) ** -0.5
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def __call__(self, x: mx.array) -> mx.array:
        B, L, D = x.shape
        q, k, v = (
            proj(x).reshape(B, L, self.num_heads, -1).swapaxes(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # No mask: tiles are batched by size, and a mask would rule out Metal's fused kernel for head_dim 72.
        x = linux_cpu.attention(q, k, v, scale=self.scale)
        return self.out_proj(x.swapaxes(1, 2).reshape(B, L, D))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(linux_cpu.gelu(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Pre-norm transformer block, (B, L, hidden_size) → (B, L, hidden_size)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class PoolingAttention(nn.Module):
    """Multi-head attention with torch's packed in_proj, for one query."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.in_proj = nn.Linear(D, 3 * D)
        self.out_proj = nn.Linear(D, D)

    def __call__(self, query: mx.array, x: mx.array) -> mx.array:
        B, _, D = x.shape
        weights, biases = mx.split(self.in_proj.weight, 3), mx.split(self.in_proj.bias, 3)
        q, k, v = (
            mx.addmm(b, y, w.T).reshape(B, y.shape[1], self.num_heads, -1).swapaxes(1, 2)
            for y, w, b in zip((query, x, x), weights, biases, strict=True)
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
        return self.out_proj(y.swapaxes(1, 2).reshape(B, -1, D))


class PoolingHead(nn.Module):
    """SigLIP's attention pooling: a learned probe attends to all patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.probe = mx.zeros((1, 1, config.hidden_size))
        self.attention = PoolingAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        probe = mx.broadcast_to(self.probe, (x.shape[0], 1, x.shape[2]))
        y = self.attention(probe, x)
        return (y + self.mlp(self.layernorm(y)))[:, 0]


class VisionTower(nn.Module):
    """Vision transformer from tiles of one size to patch features."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.model_type == "siglip_vision_model" and config.vision_use_head:
            self.head = PoolingHead(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Compute patch features after `post_layernorm`.

        Args:
            pixels: uint8 (B, height, width, 3) RGB. A remainder narrower than a patch is ignored.

        Returns:
            (B, (height // patch)·(width // patch), hidden_size), row-major, in the dtype of the weights.
        """
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))

    def steps(self, pixels: mx.array) -> Iterator[mx.array]:
        """Run the tower layer by layer, yielding unevaluated arrays; the last one is the patch features."""
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
            yield x
        yield self.post_layernorm(x)

    def pool(self, features: mx.array) -> mx.array:
        """Pool patch features (B, L, hidden_size) to image embeddings (B, hidden_size); Google's tower only."""
        return self.head(features)


def encode_by_size(
    images: Sequence[TiledImage], encode: Callable[[np.ndarray], mx.array], batch_size: int
) -> list[mx.array]:
    """Apply `encode` to the tiles of images in batches of equal size; return the rows of each image in tile order."""
    tiles = [tile for image in images for tile in image.tiles]
    by_size = defaultdict(list)
    for i, tile in enumerate(tiles):
        by_size[tile.shape].append(i)
    rows: list[mx.array] = [None] * len(tiles)
    for indices in by_size.values():
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            for i, y in zip(batch, encode(np.stack([tiles[i] for i in batch])), strict=True):
                rows[i] = y
    remaining = iter(rows)
    return [mx.concatenate([next(remaining) for _ in image.tiles]) for image in images]


@dataclass
class TextConfig(Config):
    """Keys and defaults of Hugging Face's SiglipTextConfig; the defaults are the base model's."""

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    projection_size: int | None = None  # None: hidden_size

    def __post_init__(self):
        if self.hidden_act != "gelu_pytorch_tanh":
            raise ValueError(f"text_config: hidden_act {self.hidden_act!r} is not SigLIP's gelu_pytorch_tanh")


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTower(nn.Module):
    """Text transformer from token ids, padded to `max_position_embeddings` as in training, to embeddings."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_size or config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        """Embed ids (B, L) as (B, projection_size), from the last position. Padding is attended to like any token."""
        return self.head(self.final_layer_norm(self.encoder(self.embeddings(ids)))[:, -1])


class SigLIP(nn.Module):
    """Google's SigLIP: a vision and a text tower with a shared embedding space.

    The logits' scale and bias stay float32: rounding them to half precision changes probabilities by 1 %.
    """

    def __init__(self, vision: VisionConfig, text: TextConfig | None):
        super().__init__()
        self.vision_tower = VisionTower(vision)
        if text is not None:
            self.text_tower = TextTower(text)
            self.logit_scale = mx.zeros((1,))
            self.logit_bias = mx.zeros((1,))

    def set_dtype(self, dtype: mx.Dtype, *args, **kwargs) -> None:
        """Cast the towers, but not the logits' scale and bias; see `nn.Module.set_dtype`."""
        logits = {name: self[name].astype(mx.float32) for name in ("logit_scale", "logit_bias") if name in self}
        super().set_dtype(dtype, *args, **kwargs)
        self.update(logits)

    def logits(self, image_embeddings: mx.array, text_embeddings: mx.array) -> mx.array:
        """Compute float32 logits (images, texts); the sigmoid is the probability that image and text match."""
        images, texts = image_embeddings.astype(mx.float32), text_embeddings.astype(mx.float32)
        images = images / mx.linalg.norm(images, axis=-1, keepdims=True)
        texts = texts / mx.linalg.norm(texts, axis=-1, keepdims=True)
        return images @ texts.T * mx.exp(self.logit_scale) + self.logit_bias


def siglip_loss(logits: mx.array) -> mx.array:
    """SigLIP's pairwise sigmoid loss of logits (n, n) with matching pairs on the diagonal (arXiv:2303.15343, eq. 1).

    Each pair is a binary classification, so there is no normalization over the batch as in CLIP.
    """
    signs = 2 * mx.eye(logits.shape[0]) - 1
    return -nn.log_sigmoid(signs * logits).sum() / logits.shape[0]

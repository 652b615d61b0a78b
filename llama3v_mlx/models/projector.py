"""Projectors from patch features to visual tokens, between the SigLIP tower and Llama."""

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .base import Config
from .siglip import Attention


@dataclass
class ProjectorConfig(Config):
    """Projector configuration; the defaults are those of the released weights."""

    hidden_size: int = 4096  # Llama's width
    vision_hidden_size: int = 1152  # the tower's width
    num_queries: int = 96  # visual tokens per tile; for self-attention, patches per tile
    num_attention_heads: int = 32  # released rule: hidden_size // 128
    layer_norm_eps: float = 1e-6
    projector_type: str = "resampler"  # or "self-attention"
    num_blocks: int = 2  # self-attention only


class Resampler(nn.Module):
    """Cross-attention of learned queries to a tile's patch features: (B, h·w, vision) → (B, num_queries, hidden)."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.config = config
        D, eps = config.hidden_size, config.layer_norm_eps
        self.num_heads = config.num_attention_heads
        self.scale = (D // self.num_heads) ** -0.5
        self.query = mx.zeros((config.num_queries, D))
        self.kv_proj = nn.Linear(config.vision_hidden_size, D, bias=False)
        self.ln_q = nn.LayerNorm(D, eps=eps)
        self.ln_kv = nn.LayerNorm(D, eps=eps)
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)
        self.ln_post = nn.LayerNorm(D, eps=eps)
        self.proj = nn.Linear(D, D, bias=False)

    def __call__(self, features: mx.array, grid: tuple[int, int]) -> mx.array:
        """Project the patch features of tiles of one size to visual tokens.

        Args:
            features: (B, h·w, vision_hidden_size), row-major.
            grid: (h, w) in patches.

        Returns:
            (B, num_queries, hidden_size), in the dtype of `features`.
        """
        B, L, _ = features.shape
        h, w = grid
        if h * w != L:
            raise ValueError(f"{L} patch features do not form a grid of {h}x{w}")
        values = self.ln_kv(self.kv_proj(features))
        # Only the keys have position embeddings, not the queries or values.
        keys = values + sincos_2d(h, w, self.config.hidden_size).astype(values.dtype)
        q = self._heads(self.q_proj(self.ln_q(self.query))[None])
        q = mx.broadcast_to(q, (B, *q.shape[1:]))
        k, v = self._heads(self.k_proj(keys)), self._heads(self.v_proj(values))
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale)  # (B, heads, queries, 128)
        y = y.swapaxes(1, 2).reshape(B, self.config.num_queries, -1)
        return self.proj(self.ln_post(self.out_proj(y)))

    def _heads(self, x: mx.array) -> mx.array:
        B, L, _ = x.shape
        return x.reshape(B, L, self.num_heads, -1).swapaxes(1, 2)


class SelfAttentionBlock(Attention):
    """Residual block x + attention(norm(x)) over all patches of a tile."""

    def __init__(self, config: ProjectorConfig):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        return x + super().__call__(self.norm(x))


class SelfAttention(nn.Module):
    """Projector of the original article: a linear map to Llama's width and two blocks of self-attention.

    Its weights were never released. Each patch becomes one visual token.
    """

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.vision_hidden_size, config.hidden_size)
        self.blocks = [SelfAttentionBlock(config) for _ in range(config.num_blocks)]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def __call__(self, features: mx.array, grid: tuple[int, int]) -> mx.array:
        """Project patch features (B, h·w, vision_hidden_size) to visual tokens (B, h·w, hidden_size)."""
        x = self.linear(features)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@lru_cache(maxsize=32)
def sincos_2d(h: int, w: int, dim: int) -> mx.array:
    """Compute the resampler's position embeddings (h·w, dim), float32: sin and cos of the column, then of the row.

    With d = 0…dim/4-1 and omega_d = 10000^(-d / (dim/4)), the four quarters of row y·w + x are sin(x·omega),
    cos(x·omega), sin(y·omega), cos(y·omega), as in the released model.
    """
    quarter = dim // 4
    omega = 10000.0 ** -(np.arange(quarter, dtype=np.float32) / quarter)
    columns, rows = (np.arange(n, dtype=np.float32)[:, None] * omega for n in (w, h))
    x = np.concatenate([np.sin(columns), np.cos(columns)], axis=1)  # (w, dim/2)
    y = np.concatenate([np.sin(rows), np.cos(rows)], axis=1)  # (h, dim/2)
    shape = (h, w, dim // 2)
    code = np.concatenate([np.broadcast_to(x[None], shape), np.broadcast_to(y[:, None], shape)], axis=-1)
    return mx.array(code.reshape(h * w, dim), dtype=mx.float32)


def build_projector(config: ProjectorConfig) -> nn.Module:
    """Create the projector of type `config.projector_type`."""
    if config.projector_type == "resampler":
        return Resampler(config)
    if config.projector_type == "self-attention":
        return SelfAttention(config)
    raise ValueError(f"projector_config: unknown projector_type {config.projector_type!r}")

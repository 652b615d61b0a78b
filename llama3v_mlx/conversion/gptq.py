"""GPTQ: quantize a matrix so that its products with calibration inputs change least (arXiv 2210.17323).

mlx-lm's own takes 2, 4 and 8 bits, and the Hessians of all layers at once, which is 35 GB for an 8B. This one takes
one matrix at a time and all of MLX's bits. It sets each group's scale to the best of several, rounds the columns that
matter most first, and corrects for what the quantization of earlier layers did to the inputs (as arXiv 2504.02692).
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .shard_writer import row_slices
from .verify import Tensor

DAMPING = 0.01  # added to the Hessian's diagonal, as a share of its mean
SHRINKS = tuple(1 - i / 40 for i in range(20))  # candidate ranges of a group, relative to that of its weights
BLOCK = 64  # columns rounded before the others are updated


@dataclass
class Inputs:
    """Statistics of a matrix's inputs: x in the quantized model, y in the original one."""

    hessian: mx.array = field(default_factory=lambda: mx.zeros(()))  # float32 (in, in), the sum of x·xᵀ
    drift: mx.array = field(default_factory=lambda: mx.zeros(()))  # float32 (in, in), the sum of (y - x)·xᵀ

    def add(self, x: mx.array, y: mx.array) -> None:
        """Add inputs (…, in) of the same tokens."""
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        self.hessian = self.hessian + x.T @ x
        self.drift = self.drift + (y - x).T @ x


def quantize(
    weight: Tensor, inputs: Inputs | None, group_size: int, bits: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize a matrix in MLX's affine format, some rows at a time.

    Args:
        weight: (out, in), read in float32.
        inputs: of calibration; None for an embedding, which is rounded to nearest.
        group_size: weights of a row that share a scale and a bias.
        bits: 2, 3, 4, 5, 6 or 8.
        dtype: of scales and biases.

    Returns:
        Packed weight, scales and biases, as from `mx.quantize`.
    """
    width = weight.shape[1]
    blocks = order = factor = None
    if inputs is not None:
        hessian = inputs.hessian + DAMPING * mx.maximum(mx.diag(inputs.hessian).mean(), 1e-12) * mx.eye(width)
        starts = range(0, width, group_size)
        blocks = mx.stack([hessian[i : i + group_size, i : i + group_size] for i in starts])
        order = mx.argsort(-mx.diag(hessian))
        factor = _inverse_factor(hessian[order][:, order])
        del hessian
    packed = []
    for rows in row_slices(weight.shape, mx.float32.size):
        w = weight.rows(rows)
        if inputs is not None:  # the matrix whose products with x are closest to those of `weight` with y
            w = w + ((w @ inputs.drift)[:, order] @ factor.T @ factor)[:, mx.argsort(order)]
        scales, biases = _fit_groups(w.reshape(len(w), -1, group_size), blocks, bits, dtype)
        if factor is None:
            codes = _codes(w.reshape(len(w), -1, group_size), scales[..., None], biases[..., None], bits)
            codes = codes.reshape(w.shape)
        else:
            codes = _round_columns(w[:, order], factor, scales, biases, order // group_size, bits)
            codes = codes[:, mx.argsort(order)]
        packed.append((pack(codes, bits), scales.astype(dtype), biases.astype(dtype)))
        mx.eval(packed[-1])
    return tuple(mx.concatenate(parts) for parts in zip(*packed, strict=True))


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack integers (out, in) of `bits` bits as MLX does: each row a little-endian stream of bits, in uint32."""
    rows = np.array(codes.astype(mx.uint8))
    stream = np.unpackbits(rows[..., None], axis=-1, count=bits, bitorder="little").reshape(len(rows), -1)
    return mx.array(np.packbits(stream, axis=-1, bitorder="little").view(np.uint32))


def _fit_groups(x: mx.array, blocks: mx.array | None, bits: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scales and biases (out, groups) in float32, representable in `dtype`, of least error when rounding to nearest.

    Args:
        x: weights (out, groups, group_size).
        blocks: the Hessian's blocks (groups, group_size, group_size), which weight the error; None for equal weights.
        bits, dtype: see `quantize`.
    """
    best = mx.full(x.shape[:2], mx.inf), mx.zeros(x.shape[:2]), mx.zeros(x.shape[:2])
    for shrink in SHRINKS:
        scales, biases = _grid(shrink * x.min(axis=-1), shrink * x.max(axis=-1), bits, dtype)
        s, b = scales[..., None], biases[..., None]
        error = x - (_codes(x, s, b, bits) * s + b)
        weighted = error if blocks is None else (error.swapaxes(0, 1) @ blocks).swapaxes(0, 1)
        candidate = (weighted * error).sum(axis=-1), scales, biases
        is_better = candidate[0] < best[0]
        best = tuple(mx.where(is_better, new, old) for new, old in zip(candidate, best, strict=True))
        mx.eval(best)
    return best[1:]


def _grid(low: mx.array, high: mx.array, bits: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """Scales and biases of a range as `mx.quantize` sets them: the larger end and 0 are represented exactly."""
    flipped = mx.abs(low) > mx.abs(high)
    scales = mx.maximum((high - low) / (2**bits - 1), 1e-7)
    scales = mx.where(flipped, scales, -scales)
    edge = mx.where(flipped, low, high)
    steps = mx.round(edge / scales)
    scales = mx.where(steps == 0, scales, edge / mx.where(steps == 0, 1, steps))
    biases = mx.where(steps == 0, 0, edge)
    return scales.astype(dtype).astype(mx.float32), biases.astype(dtype).astype(mx.float32)


def _codes(x: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    return mx.clip(mx.round((x - biases) / mx.where(scales == 0, 1, scales)), 0, 2**bits - 1)


def _inverse_factor(hessian: mx.array) -> mx.array:
    """Upper-triangular U with UᵀU the inverse of the Hessian: its reversed Cholesky factor, inverted and reversed."""
    with mx.stream(mx.cpu):  # MLX has neither on a GPU
        lower = mx.linalg.cholesky(hessian[::-1, ::-1])
        factor = mx.linalg.tri_inv(lower)[::-1, ::-1]
        mx.eval(factor)
    return factor


def _round_columns(
    weight: mx.array, factor: mx.array, scales: mx.array, biases: mx.array, groups: mx.array, bits: int
) -> mx.array:
    """Round columns from left to right, each time correcting the later ones for the error; return the codes.

    Args:
        weight: (out, in), its columns in the order of rounding.
        factor: (in, in), from `_inverse_factor`.
        scales, biases: (out, groups).
        groups: (in,), the group of each column.
        bits: of a code.
    """
    codes = []
    width = weight.shape[1]
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        s, b = scales[:, groups[start:end]], biases[:, groups[start:end]]
        block_codes, errors = _round_block(weight[:, start:end], factor[start:end, start:end], s, b, bits)
        codes.append(block_codes.astype(mx.uint8))
        if end < width:
            weight[:, end:] -= errors @ factor[start:end, end:]
        mx.eval(weight, codes[-1])
    return mx.concatenate(codes, axis=1)


def _round_block(
    x: mx.array, factor: mx.array, scales: mx.array, biases: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """Codes of a block of columns, and its errors divided by the factor's diagonal."""
    codes, errors = [], []
    for k in range(x.shape[1]):
        w, s, b = x[:, k], scales[:, k], biases[:, k]
        codes.append(_codes(w, s, b, bits))
        errors.append((w - (codes[-1] * s + b)) / factor[k, k])
        x = x - errors[-1][:, None] * factor[k]
    return mx.stack(codes, axis=1), mx.stack(errors, axis=1)

"""GPTQ: quantize a matrix so that its products with calibration inputs change least (arXiv 2210.17323).

mlx-lm's own takes 2, 4 and 8 bits, and the Hessians of all layers at once, which is 35 GB for an 8B. This one takes
one matrix at a time and all of MLX's bits. It rounds the columns that matter most first, and corrects for what the
quantization of earlier layers did to the inputs (as arXiv 2504.02692). Searching for better scales did not help.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from .shard_writer import row_slices
from .verify import Tensor

DAMPINGS = (0.01, 0.1, 1)  # added to the Hessian's diagonal, as shares of its mean; the first that suffices
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

    Raises:
        ArithmeticError: if inputs are not finite.
    """
    how = {"group_size": group_size, "bits": bits}
    if inputs is not None:
        order = mx.argsort(-mx.diag(inputs.hessian))
        factor = _inverse_factor(inputs.hessian[order][:, order])
    packed = []
    for rows in row_slices(weight.shape, mx.float32.size):
        w = weight.rows(rows)
        if inputs is None:
            packed.append(mx.quantize(w.astype(dtype), **how))
        else:
            # the matrix whose products with x are closest to those of `weight` with y, columns in order
            w = w[:, order] + (w @ inputs.drift)[:, order] @ factor.T @ factor
            _, scales, biases = mx.quantize(w[:, mx.argsort(order)].astype(dtype), **how)
            codes = _round_columns(w, factor, scales, biases, order // group_size, bits)
            packed.append((pack(codes[:, mx.argsort(order)], bits), scales, biases))
        mx.eval(packed[-1])
    return tuple(mx.concatenate(parts) for parts in zip(*packed, strict=True))


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack integers (out, in) of `bits` bits as MLX does: each row a little-endian stream of bits, in uint32."""
    rows = np.array(codes.astype(mx.uint8))
    stream = np.unpackbits(rows[..., None], axis=-1, count=bits, bitorder="little").reshape(len(rows), -1)
    return mx.array(np.packbits(stream, axis=-1, bitorder="little").view(np.uint32))


def _inverse_factor(hessian: mx.array) -> mx.array:
    """Upper-triangular U with UᵀU the inverse of the damped Hessian: its reversed Cholesky factor, inverted, reversed.

    Raises:
        ArithmeticError: if the Hessian is not finite.
    """
    mean = mx.maximum(mx.diag(hessian).mean(), 1e-12)
    for damping in DAMPINGS:
        with mx.stream(mx.cpu):  # MLX has neither on a GPU
            lower = mx.linalg.cholesky((hessian + damping * mean * mx.eye(len(hessian)))[::-1, ::-1])
            if not (mx.diag(lower) > 0).all().item():  # not positive definite in float32; MLX does not say so
                continue
            factor = mx.linalg.tri_inv(lower)[::-1, ::-1]
            mx.eval(factor)
            return factor
    raise ArithmeticError("the inputs are not finite")


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
        s, b = (array[:, groups[start:end]].astype(mx.float32) for array in (scales, biases))
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
        codes.append(mx.clip(mx.round((w - b) / s), 0, 2**bits - 1))
        errors.append((w - (codes[-1] * s + b)) / factor[k, k])
        x = x - errors[-1][:, None] * factor[k]
    return mx.stack(codes, axis=1), mx.stack(errors, axis=1)

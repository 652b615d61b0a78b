"""GPTQ: quantize a matrix so that its products with calibration inputs change least (arXiv 2210.17323).

mlx-lm's own takes 2, 4 and 8 bits, and the Hessians of all layers at once, which is 35 GB for an 8B. This one takes
one matrix at a time and all of MLX's bits. It rounds the columns that matter most first, and corrects for what the
quantization of earlier layers did to the inputs (as arXiv 2504.02692). Searching for better scales did not help.
"""

import functools

import mlx.core as mx

from .shard_writer import row_slices
from .verify import Tensor

DAMPINGS = (0.01, 0.1, 1)  # added to the Hessian's diagonal, as shares of its mean; the first that suffices
TOKENS = 2048  # whose inputs are added to the Hessian at once: each sum reads and writes all of it
ROWS_BYTES = 256 << 20  # of a matrix's rows that are rounded at once, so that an 8B's layer takes each in one piece
PANEL = 1024  # columns of a triangular matrix that are multiplied at once
COLUMNS = 16  # rounded one after the other; more are split into halves, which one matrix product corrects


class Inputs:
    """Statistics of a matrix's inputs: x in the quantized model, y in the original one."""

    def __init__(self) -> None:
        self.hessian = mx.zeros(())  # float32 (in, in), the sum of x·xᵀ
        self.drift = mx.zeros(())  # float32 (in, in), the sum of (y - x)·xᵀ
        self._waiting: list[tuple[mx.array, mx.array]] = []

    def add(self, x: mx.array, y: mx.array) -> None:
        """Add inputs (…, in) of the same tokens."""
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        mx.eval(x, y)
        self._waiting.append((x, y))
        if sum(len(x) for x, _ in self._waiting) >= TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            x, y = map(mx.concatenate, zip(*self._waiting, strict=True))
            self._waiting = []
            self.hessian = self.hessian + x.T @ x
            mx.eval(self.hessian)
            self.drift = self.drift + (y - x).T @ x
            mx.eval(self.drift)

    @functools.cached_property
    def order(self) -> mx.array:
        """Columns (in,) in the order of rounding: those with the largest inputs first."""
        self._flush()
        return mx.argsort(-mx.diag(self.hessian))

    @functools.cached_property
    def factor(self) -> mx.array:
        """Upper-triangular U (in, in) with UᵀU the inverse of the damped Hessian, its columns in order.

        Raises:
            ArithmeticError: if the inputs are not finite.
        """
        # U is the Cholesky factor of the reversed Hessian, inverted and reversed.
        back, diagonal = self.order[::-1], mx.arange(len(self.order))
        mean = mx.maximum(mx.diag(self.hessian).mean(), 1e-12)
        for damping in DAMPINGS:
            damped = self.hessian[back][:, back].at[diagonal, diagonal].add(damping * mean)
            # MLX has neither on a GPU. On a CPU they are LAPACK's, in float32: on a Mac, Accelerate's.
            lower = mx.linalg.cholesky(damped, stream=mx.cpu)
            del damped  # each of these is 0.8 GB for an 8B
            pivots = mx.diag(lower)
            if not ((pivots > 0) & (pivots < mx.inf)).all().item():  # not positive definite; MLX does not say so
                continue
            inverse = mx.linalg.tri_inv(lower, stream=mx.cpu)
            del lower
            factor = mx.contiguous(inverse[::-1, ::-1])
            mx.eval(factor)
            return factor
        raise ArithmeticError("the inputs are not finite")

    @functools.cached_property
    def _drift_times_inverse(self) -> mx.array:
        return self._times_inverse(self.drift)

    def follow(self, weight: mx.array) -> mx.array:
        """The matrix (out, in) whose products with x are closest to those of `weight` with y."""
        if len(weight) < len(self.order):
            return weight + self._times_inverse(weight @ self.drift)
        return weight + weight @ self._drift_times_inverse  # with many rows, or used by several matrices

    def _times_inverse(self, a: mx.array) -> mx.array:
        """Multiply (…, in) by the inverse of the damped Hessian; zeros below U's diagonal are left out."""
        u, a = self.factor, a[:, self.order]
        parts = [slice(start, start + PANEL) for start in range(0, len(u), PANEL)]
        a = mx.concatenate([a[:, part.start :] @ u[part, part.start :].T for part in parts], axis=1)
        a = mx.concatenate([a[:, : part.stop] @ u[: part.stop, part] for part in parts], axis=1)
        return a[:, mx.argsort(self.order)]


def quantize(
    weight: Tensor, inputs: Inputs | None, group_size: int, bits: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Quantize a matrix in MLX's affine format, many rows at a time.

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
    packed = []
    for rows in row_slices(weight.shape, mx.float32.size, ROWS_BYTES):
        w = weight.rows(rows)
        if inputs is None:
            packed.append(mx.quantize(w.astype(dtype), **how))
        else:
            w = inputs.follow(w)
            _, scales, biases = mx.quantize(w.astype(dtype), **how)
            grids = (scales.T.astype(mx.float32), biases.T.astype(mx.float32), inputs.order // group_size)
            codes, _ = _round(w.T[inputs.order], inputs.factor, *grids, 2**bits - 1)
            packed.append((pack(codes[mx.argsort(inputs.order)], bits), scales, biases))
        mx.eval(packed[-1])
    return tuple(mx.concatenate(parts) for parts in zip(*packed, strict=True))


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack uint8 codes (in, out) of `bits` bits as MLX does: each of `out` rows a little-endian stream, in uint32."""
    codes = codes.reshape(-1, 32, codes.shape[1]).astype(mx.uint32)
    words = [mx.zeros_like(codes[:, 0]) for _ in range(bits)]  # of 32 codes
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | (codes[:, i] << shift)
        if shift + bits > 32:
            words[word + 1] = codes[:, i] >> (32 - shift)
    return mx.stack(words, axis=1).reshape(-1, codes.shape[2]).T


def _round(
    x: mx.array, factor: mx.array, scales: mx.array, biases: mx.array, groups: mx.array, most: int
) -> tuple[mx.array, mx.array]:
    """Round columns one after the other, each time correcting the later ones for the error.

    Args:
        x: columns in the order of rounding, (columns, out), so that each is contiguous.
        factor: (columns, columns), their part of `Inputs.factor`.
        scales, biases: (groups, out).
        groups: (columns,), the group of each column.
        most: the largest code.

    Returns:
        Codes, uint8, and errors divided by the factor's diagonal, both (columns, out).
    """
    if len(x) > COLUMNS:
        half = len(x) // 2
        codes, errors = _round(x[:half], factor[:half, :half], scales, biases, groups[:half], most)
        x = x[half:] - factor[:half, half:].T @ errors
        more = _round(x, factor[half:, half:], scales, biases, groups[half:], most)
        return mx.concatenate([codes, more[0]]), mx.concatenate([errors, more[1]])
    scales, biases, codes, errors = scales[groups], biases[groups], [], []
    for k in range(len(x)):
        codes.append(mx.clip(mx.round((x[0] - biases[k]) / scales[k]), 0, most))
        errors.append((x[0] - (codes[-1] * scales[k] + biases[k])) / factor[k, k])
        x = x[1:] - factor[k, k + 1 :, None] * errors[-1]
    codes, errors = mx.stack(codes).astype(mx.uint8), mx.stack(errors)
    mx.async_eval(codes, errors)
    return codes, errors

"""Fast float32 vision tower on a Linux CPU; other backends have their own kernels.

MLX's CPU backend runs everything but matrix products on one thread and computes exp one number at a time. So exp uses
operations that compilers vectorize, softmax is normalized after its product with the values, which has fewer elements,
and a batch is split among as many streams as there are cores. The tower's outputs are the same within 1e-6.
"""

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import HAS_OPENBLAS, reserve_blas
from ..device import cores, on_gpu

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # from glibc's malloc.h
HEADS_AT_ONCE = 4  # so that their scores fit in a core's cache
_BLAS_LOCK = threading.RLock()
_THREAD = threading.local()


def applies(x: mx.array) -> bool:
    """Return True if `x` is float32 and MLX runs on a Linux CPU."""
    return sys.platform == "linux" and x.dtype == mx.float32 and not on_gpu()


def gelu(x: mx.array) -> mx.array:
    """Elementwise GELU, tanh approximation."""
    return _gelu(x) if applies(x) else nn.gelu_approx(x)


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
    """Unmasked attention softmax(q·kᵀ·scale)·v of (B, H, L, D) arrays."""
    if not applies(q):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    shape = q.shape
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q * scale, k, v))
    v = mx.concatenate([v, mx.ones((*v.shape[:2], 1))], axis=-1)  # the last column sums the weights
    parts = []
    for i in range(0, len(q), HEADS_AT_ONCE):
        chunk = slice(i, i + HEADS_AT_ONCE)
        scores = q[chunk] @ k[chunk].swapaxes(1, 2)
        weights = _exp_of_minus(scores.max(axis=-1, keepdims=True) - scores)
        parts.append(weights @ v[chunk])
    y = mx.concatenate(parts)
    return (y[..., :-1] / y[..., -1:]).reshape(shape)


def in_streams(encode: Callable[[mx.array], mx.array], batch: np.ndarray, most: int) -> mx.array:
    """Apply `encode` to a batch in parts of at most `most`, one per core in parallel; return the evaluated result.

    Meanwhile each matrix product uses one thread, because the streams run in parallel.
    """
    streams = _streams()
    count = -(-len(batch) // len(streams))  # smallest possible share of each core
    parts = np.array_split(batch, -(-len(batch) // min(most, count)))
    results = []
    with _blas_threads(1):
        for i in range(0, len(parts), len(streams)):
            together = []
            for stream, part in zip(streams, parts[i : i + len(streams)], strict=False):
                with mx.stream(stream):
                    together.append(encode(mx.array(part)))
            mx.eval(together)  # with more at once, MLX would run one stream after the other
            results += together
    return mx.concatenate(results)


def all_threads() -> contextlib.AbstractContextManager[None]:
    """Use all cores for each matrix product, regardless of OpenBLAS's initial number of threads."""
    return _blas_threads(None)


@contextlib.contextmanager
def _blas_threads(count: int | None) -> Iterator[None]:
    """Set OpenBLAS's number of threads (None: one per core), and restore it afterwards.

    The number is global to the process, so a lock keeps a second Python thread from saving the first one's setting as
    the original. Does nothing without OpenBLAS.
    """
    if not HAS_OPENBLAS:
        yield
        return
    blas = ctypes.CDLL("libopenblas.so.0")
    with _BLAS_LOCK:
        before = blas.openblas_get_num_threads()
        try:
            blas.openblas_set_num_threads(count or blas.openblas_get_num_procs())
            yield
        finally:
            blas.openblas_set_num_threads(before)


def _streams() -> list[mx.Stream]:
    """Return one stream per core, created once per Python thread because MLX binds streams to threads."""
    if not hasattr(_THREAD, "streams"):
        _keep_memory()
        if HAS_OPENBLAS:
            reserve_blas(cores())
        _THREAD.streams = [mx.new_stream(mx.cpu) for _ in range(cores())]
    return _THREAD.streams


@functools.cache
def _keep_memory() -> None:
    """Keep freed memory in the process: zeroing pages again after glibc returned them would take half of the time.

    This cannot be undone: glibc has no call to read these settings, two of them disable its adaptive thresholds for
    good, and the number of arenas is fixed at first use. Results are unaffected; `malloc_trim(0)` frees the memory.
    """
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        ctypes.CDLL(None).mallopt(option, value)


def _exp(x: mx.array) -> mx.array:
    """Compute exp(x), x ≥ 0, as the 16th power of its Taylor polynomial at x/16; its inverse is exp(-x) within 1e-6.

    x ≥ 0 needs no branches, so that compilers vectorize it; a large x becomes inf, and its inverse 0.
    """
    y = x * (1 / 16)
    e = y * (1 / 5040) + 1 / 720
    for n in (120, 24, 6, 2, 1, 1):
        e = e * y + 1 / n
    for _ in range(4):
        e = e * e
    return e


@mx.compile
def _exp_of_minus(x: mx.array) -> mx.array:
    return 1 / _exp(x)


@mx.compile
def _gelu(x: mx.array) -> mx.array:
    a = mx.abs(x)
    return 0.5 * (x + a) - a / (1 + _exp(1.5957691216 * a * (1 + 0.044715 * a * a)))  # 2·sqrt(2/pi)

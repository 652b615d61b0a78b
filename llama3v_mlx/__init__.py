"""Llama3-V on Apple Silicon with MLX: images and text in, text out.

from llama3v_mlx import generate, load
model, processor = load("path/or/repo")
print(generate(model, processor, "What is this image?", image="photo.jpg"))
"""

import contextlib
import ctypes
import importlib
import mmap
import os
import resource
import sys
from types import ModuleType

__version__ = "0.2.0"

# Public names and their modules, imported on first use so that `--help` stays instant.
_PUBLIC = {
    "load": "generation",
    "check_memory": "memory",
    "generate": "generation",
    "load_draft_model": "drafting.draft_model",
    "stream_generate": "generation",
    "register": "generation",
    "Llama3V": "generation",
    "Model": "models.llama3v",
    "ModelArgs": "models.llama3v",
    "Processor": "prompt",
    "load_image": "image",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # The import of the command `generate` does not hide the function.
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


_MLX_LM_FILES = 4096  # the hard limit of open files that mlx-lm sets when it is imported


def _allow_few_open_files() -> None:
    """Keep that from being an error where the hard limit is lower, and only root may raise it."""
    hard, setrlimit = resource.getrlimit(resource.RLIMIT_NOFILE)[1], resource.setrlimit
    if hard == resource.RLIM_INFINITY or hard >= _MLX_LM_FILES:
        return

    def within(kind: int, limits: tuple[int, int]) -> None:
        setrlimit(kind, tuple(min(limit, hard) for limit in limits) if kind == resource.RLIMIT_NOFILE else limits)

    resource.setrlimit = within


_allow_few_open_files()

# OpenBLAS's kernels by the CPU features that they need, the fastest first.
_KERNELS = {
    "Cooperlake": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_bf16"},
    "SkylakeX": {"avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "Haswell": {"avx2", "fma"},
}


_BLAS_BUFFER_BYTES = (128 << 20) + (1 << 16)  # of address space, per thread


def _choose_kernels() -> None:
    """Tell OpenBLAS which kernels to use, unless the user has: on a CPU newer than itself it takes those of 2004.

    Debian 12's 0.3.21 does so on Xeons of 2023, where its float32 matmul is then 8 times slower.
    """
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            flags = next((set(line.split()) for line in file if line.startswith("flags")), set())
    except OSError:
        return
    if kernels := next((name for name, needed in _KERNELS.items() if needed <= flags), None):
        os.environ.setdefault("OPENBLAS_CORETYPE", kernels)


def _prefer_openblas() -> bool:
    """Load OpenBLAS so that its `cblas_*` take precedence over the reference BLAS in MLX's Linux CPU wheel.

    Only works before `mlx.core` is imported. Per core, float32 products of over 100 rows are 40 to 50 times as fast, of
    4 rows 4 times, and of 1 row, when tokens are generated, 1.4 times.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return False
    _choose_kernels()
    try:
        reserve_blas(1)
    except (OSError, MemoryError):
        return False
    return True


def reserve_blas(threads: int) -> None:
    """Load OpenBLAS and have it allocate its buffers: if memory ran out later, a matrix product would never end.

    Args:
        threads: number of threads that will compute products at the same time.

    Raises:
        MemoryError: if there is not enough memory.
        OSError: if OpenBLAS is not installed.
    """
    try:
        mmap.mmap(-1, threads * _BLAS_BUFFER_BYTES).close()
    except OSError as e:
        raise MemoryError("OpenBLAS's buffers") from e
    blas = ctypes.CDLL("libopenblas.so.0", ctypes.RTLD_GLOBAL)
    with contextlib.suppress(AttributeError):  # a build that does not export them
        blas.blas_memory_alloc.restype, blas.blas_memory_free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        for buffer in [blas.blas_memory_alloc(0) for _ in range(threads)]:
            blas.blas_memory_free(buffer)  # stays allocated, for the next product


HAS_OPENBLAS = _prefer_openblas()

if os.environ.get("LLAMA3V_DEVICE"):
    from .device import select

    # A command says what is wrong with the value in one line, `load` in its exception.
    with contextlib.suppress(ValueError):
        select()

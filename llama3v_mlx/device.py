"""The device that MLX computes on. `LLAMA3V_DEVICE=cpu` or `gpu` selects it for this process and its children."""

import functools
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx

DEVICE = "LLAMA3V_DEVICE"
# For tests: the CPU takes all GPU branches, such as half precision.
PRETEND = "LLAMA3V_PRETEND_GPU"
_THREADS = 8  # four that read files, and a few streams
_TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")  # as C++ looks for the temporary folder


def select() -> None:
    """Set MLX's default device to the one named by `LLAMA3V_DEVICE`, if that is set.

    Raises:
        ValueError: if the value is not a device, or the device is not available.
    """
    name = os.environ.get(DEVICE)
    if not name:
        return
    if name not in ("cpu", "gpu"):
        raise ValueError(f"{DEVICE} is {name!r}; it must be cpu or gpu")
    device = mx.Device(getattr(mx, name))
    if not mx.is_available(device):
        raise ValueError(f"{DEVICE} is gpu, but MLX has no GPU here; unset it, or set it to cpu")
    mx.set_default_device(device)


@functools.cache
def check_threads() -> None:
    """Check that MLX's threads, which compute and read files, can be started; if not, MLX would abort or hang.

    Raises:
        RuntimeError: if there is no memory for their stacks.
    """
    done = threading.Event()
    try:
        for _ in range(_THREADS):
            threading.Thread(target=done.wait, daemon=True).start()
    finally:
        done.set()


@functools.cache
def check_kernels() -> None:
    """Have MLX compile no kernels on a CPU whose temporary folder does not allow it; they are then computed in steps.

    MLX builds libraries in `mlx` there and loads those that it finds: after another user's process it could write
    none, and would run what that user has put there.
    """
    if name() != "cpu":
        return
    temporary = (os.environ[variable] for variable in _TEMPORARY if variable in os.environ)
    folder = Path(next(temporary, "/tmp"), "mlx")
    try:
        folder.mkdir(exist_ok=True)
        executable = not os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0)
        usable = executable and folder.lstat().st_uid == os.geteuid() and os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        mx.disable_compile()


def on_gpu() -> bool:
    """Return True to compute as on a GPU: in half precision and without `models.linux_cpu`."""
    return os.environ.get(PRETEND) == "1" or mx.default_device() == mx.Device(mx.gpu)


def name() -> str:
    """Name of MLX's default device: cpu or gpu."""
    return mx.default_device().type.name


def chip() -> str:
    """Name of the chip of MLX's default device."""
    if mx.default_device() == mx.Device(mx.gpu):
        return str(mx.device_info()["device_name"])
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(names, platform.machine())
    return platform.processor() or platform.machine()


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit() -> int:
    """Usable memory in bytes: the GPU's recommended working set, otherwise the machine's memory."""
    return int(mx.device_info().get("max_recommended_working_set_size", 0)) or memory()


def matmul_peak(dtype: mx.Dtype) -> float:
    """Measure the floating-point operations per second of a large square matrix product.

    The matrices have 256 to 8192 rows: the smallest size that keeps the device busy for 10 ms.
    """
    n, best = 128, 0.0
    while best < 0.01 and n < 8192:
        n *= 2
        a, b = mx.random.normal((2, n, n)).astype(dtype)
        mx.eval(a @ b)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            mx.eval([a @ (b + i) for i in range(2)])
            times.append((time.perf_counter() - start) / 2)
        best = min(times)
    return 2 * n**3 / best

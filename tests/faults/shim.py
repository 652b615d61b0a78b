"""Build and control `shim.c`, which makes the n-th system call of a command fail or be hit by a signal."""

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

OFF, COUNT, FAIL, FAIL_ALL, SHORT, SIGNAL = range(6)
_LOADED, _STATE = "LLAMA3V_FAULTS_SHIM", "LLAMA3V_FAULTS_STATE"


def start_with_shim(folder: Path) -> None:
    """Start this program again with the shim preloaded, if a C compiler is installed and that has not been done."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if _LOADED in os.environ or sys.platform != "linux" or compiler is None:
        return
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"], check=True)
    opened = os.open(library, os.O_RDONLY)
    os.set_inheritable(opened, True)
    # LD_PRELOAD cannot name a path with spaces; the program keeps its number, also for what it starts.
    library = f"/proc/{os.getpid()}/fd/{opened}"
    environment = os.environ | {_LOADED: library, "LD_PRELOAD": library, _STATE: str(folder / "state")}
    os.execve(sys.executable, [sys.executable, "-m", "tests.faults", *sys.argv[1:]], environment)


@functools.cache
def shim() -> ctypes.CDLL | None:
    """The preloaded shim, or None."""
    if _LOADED not in os.environ:
        return None
    os.environ.pop("LD_PRELOAD", None)  # not for what the commands start, but see `disturb_started`
    atexit.register(shutil.rmtree, Path(os.environ[_STATE]).parent, ignore_errors=True)
    library = ctypes.CDLL(os.environ[_LOADED])
    library.faults_seen.restype = ctypes.c_long
    library.faults_log.restype = ctypes.c_char_p
    library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
    return library


def disturb_started() -> None:
    """Disturb also what this process will start."""
    os.environ["LD_PRELOAD"] = os.environ[_LOADED]


def arm(folder: Path, mode: int, at: int = 0, error: int = 0, kept: Path | None = None) -> None:
    """Count the calls that change files under `folder`, and let the one numbered `at` fail; for a child to call.

    Files are kept in the folder `kept`, by the number of the call, as they were flushed, replaced or removed.
    """
    shim().faults_arm(os.fsencode(folder), os.fsencode(kept or ""), mode, at, error)


def seen() -> tuple[int, list[list[str]]]:
    """Number of calls since `arm`, also of a child that has ended, and each: [number, call, path, other path]."""
    count = shim().faults_seen()
    return count, [line.split("\t") for line in os.fsdecode(shim().faults_log()).splitlines()]

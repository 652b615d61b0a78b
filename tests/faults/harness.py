"""Run a command in a forked child with bounded time and memory, and judge how it ended.

The parent imports what the commands import but computes nothing, so that a fork of it is safe and takes milliseconds.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import io
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

CPU_SECONDS, WALL_SECONDS = 10, 40  # per command; wall time only to end one that waits forever
OUTLIVE_SECONDS = 20
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl: a process whose parent has ended becomes a child of this one
ADDRESS_SPACE = 4 << 30  # bytes above what the parent has mapped
RESIDENT = 1 << 30  # bytes above what the parent holds
ALLOWED = "\n\r\t\xa0\u202f\u200b\u200c\u200d"  # characters that a terminal does not obey; tqdm writes \r
CRASHED = 99  # exit status of a child in which `main` raised something
PREFIX = "llama3v_mlx."
IMPORTED = ("generate", "chat", "embed", "search", "train", "convert", "synthesize", "evaluate", "generation")
IMPORTED += ("conversation", "features.encoder", "features.pipeline", "conversion.shard_writer", "conversion.assemble")
IMPORTED += ("ask_folder", "features.library", "features.query", "training.loop", "training.prepare")
IMPORTED += ("serving.prefix_cache", "evaluation.report")


def warm_up() -> None:
    """Import what the commands need, without computing anything with MLX."""
    for name in IMPORTED:
        importlib.import_module(PREFIX + name)
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer  # noqa: F401
    from mlx_lm.tuner import utils  # noqa: F401
    from PIL import Image
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    Image.init()


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int  # exit status, or minus a signal
    out: str
    errors: str
    cpu_seconds: float
    timed_out: bool
    resident: int  # peak, bytes
    reads: tuple[str, ...] = ()  # files opened in the folder that must not be read
    outlived: bool = False  # by something that it had started, by seconds


def run_child(
    action: Callable[[], None],
    folder: Path,
    stdin: bytes = b"",
    seconds: float = WALL_SECONDS,
    secret: Path | None = None,
) -> Ended:
    """Run `action` in a forked child, in `folder`; it may exit like a command.

    Args:
        action: called in the child.
        folder: working directory, in which the child's output and temporary files are kept.
        stdin: given to the child.
        seconds: wall time after which the child and what it started are killed.
        secret: a folder of which the child must open no file.
    """
    with tempfile.TemporaryDirectory(prefix="io-", dir=folder.parent) as place, watching(secret) as opened:
        streams = [Path(place) / name for name in ("in", "out", "errors")]
        for path, data in zip(streams, (stdin, b"", b""), strict=True):
            path.write_bytes(data)
        sys.stdout.flush()
        sys.stderr.flush()
        others = _children()
        pid = os.fork()
        if not pid:
            _be_child(action, folder, streams)
        code, usage, timed_out = _wait(pid, seconds)
        outlived = not _end_rest(others, OUTLIVE_SECONDS)
        out, errors = (path.read_bytes().decode(errors="replace") for path in streams[1:])
        return Ended(
            code, out, errors, usage.ru_utime + usage.ru_stime, timed_out, usage.ru_maxrss << 10, opened(), outlived
        )


@dataclass(frozen=True)
class Task:
    """An action of a batch; see `run_child` for the fields."""

    action: Callable[[], None]
    folder: Path
    stdin: bytes = b""
    secret: Path | None = None


def run_batch(tasks: Sequence[Task], folder: Path) -> list[Ended]:
    """As `run_child` for each task, but in one child, and in another from the task after one that ends it."""
    ended: list[Ended] = []
    while len(ended) < len(tasks):
        rest = tasks[len(ended) :]
        with tempfile.TemporaryDirectory(prefix="batch-", dir=folder) as name:
            place = Path(name)
            for i, task in enumerate(rest):
                if task.stdin:
                    (place / f"{i}.0").write_bytes(task.stdin)
            whole = run_child(lambda: _run_each(rest, place), folder, seconds=WALL_SECONDS * len(rest))  # noqa: B023
            rows = [json.loads(line) for line in (place / "ended").read_text().splitlines()]
            for i in range(min(len(rows) + 1, len(rest))):
                out, errors = ((place / f"{i}.{n}").read_bytes().decode(errors="replace") for n in (1, 2))
                if i < len(rows):
                    ended.append(Ended(out=out, errors=errors, timed_out=False, **rows[i]))
                else:
                    ended.append(replace(whole, out=out, errors=errors))
    return ended


def _run_each(tasks: Sequence[Task], place: Path) -> None:
    faulthandler.cancel_dump_traceback_later()
    faulthandler.register(signal.SIGALRM, file=2, chain=True)  # where it hangs; then the signal ends it
    with (place / "ended").open("w", buffering=1) as rows:
        for i, task in enumerate(tasks):
            _enter(task.folder, [place / f"{i}.0" if task.stdin else os.devnull, place / f"{i}.1", place / f"{i}.2"])
            signal.alarm(WALL_SECONDS)
            before = resource.getrusage(resource.RUSAGE_SELF)
            with watching(task.secret) as opened:
                code = _exit_status(task.action)
                after = resource.getrusage(resource.RUSAGE_SELF)
                cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                grown = after.ru_maxrss if after.ru_maxrss > before.ru_maxrss else 0  # it is the highest so far
                row = {"code": code, "cpu_seconds": cpu_seconds, "reads": opened(), "resident": grown << 10}
            rows.write(json.dumps(row) + "\n")


def _enter(folder: Path, streams: Sequence[Path | str]) -> None:
    """Work in a folder, with files as stdin, stdout and stderr."""
    for descriptor, path in enumerate(streams):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    encoding = {"encoding": "utf-8", "line_buffering": True}
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), errors="surrogateescape", **encoding)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), **encoding)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace", **encoding)
    os.chdir(folder)
    tempfile.tempdir = str(folder)


def _be_child(action: Callable[[], None], folder: Path, streams: Sequence[Path]) -> None:
    code = CRASHED
    try:
        os.setsid()
        _enter(folder, streams)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit_memory(ADDRESS_SPACE)
        faulthandler.dump_traceback_later(WALL_SECONDS - 5, file=2)  # where it hangs
        code = _exit_status(action)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _exit_status(action: Callable[[], None]) -> int:
    code = CRASHED
    try:
        action()
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def limit_memory(more: int) -> None:
    """Limit the address space to what is mapped now and `more` bytes."""
    mapped = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, resource.RLIM_INFINITY))


def _wait(pid: int, seconds: float) -> tuple[int, resource.struct_rusage, bool]:
    ended = os.pidfd_open(pid)
    timed_out = not select.select([ended], [], [], seconds)[0]
    os.close(ended)
    if timed_out:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage, timed_out


def _end_rest(others: set[int], seconds: float) -> bool:
    """Wait for the end of all that a child has started, in whatever session, and then kill it.

    Args:
        others: children of this process that were there before.
        seconds: how long to wait.

    Returns:
        Whether nothing had to be killed.
    """
    deadline = time.monotonic() + seconds
    while rest := _children() - others:
        is_late = time.monotonic() > deadline
        for pid in rest:
            if is_late:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0 if is_late else os.WNOHANG)
        if is_late:
            return False
        time.sleep(0.01)
    return True


def _children() -> set[int]:
    """Processes whose parent is this one, or has ended and was started by one of them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@contextlib.contextmanager
def watching(secret: Path | None) -> Iterator[Callable[[], tuple[str, ...]]]:
    """Watch a folder with Linux's inotify, which sees what C++ and Rust open as well as Python."""
    if secret is None or sys.platform != "linux":
        yield lambda: ()
        return
    libc, open_and_stay = ctypes.CDLL(None, use_errno=True), 0x20
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if libc.inotify_add_watch(descriptor, os.fsencode(secret), open_and_stay) < 0:
        raise OSError(ctypes.get_errno(), f"{secret}: cannot be watched")

    def opened() -> tuple[str, ...]:
        names = []
        with contextlib.suppress(BlockingIOError):
            data = os.read(descriptor, 1 << 16)
            while data:
                (length,) = struct.unpack_from("12xI", data)
                names.append(data[16 : 16 + length].rstrip(b"\0").decode(errors="replace"))
                data = data[16 + length :]
        return tuple(name for name in names if name)

    try:
        yield opened
    finally:
        os.close(descriptor)


def command(module: str, *args: object) -> Callable[[], None]:
    """Return `python -m llama3v_mlx.MODULE ARGS…` as an action."""
    return lambda: importlib.import_module(PREFIX + module).main([*map(str, args)])


def complaint(
    ended: Ended, names: Sequence[str] = (), resident: int = RESIDENT, seconds: float = CPU_SECONDS
) -> str | None:
    """Say what is wrong with how a command ended; None if nothing is.

    It must succeed, or end with status 1 and exactly one `error:` line, which names one of `names`.
    """
    if ended.outlived:
        return "what it had started goes on"
    if ended.reads:
        return f"read {', '.join(ended.reads)} outside the folder"
    if ended.timed_out or ended.cpu_seconds > seconds:
        where = ended.errors[-1500:] if ended.timed_out else ""
        return f"took {ended.cpu_seconds:.1f} s of CPU time" + f" and was still running: {where}" * ended.timed_out
    if ended.resident > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + resident:
        return f"took {ended.resident / 1e6:.0f} MB of memory"
    if "Traceback (most recent call last)" in ended.errors or ended.code == CRASHED:
        return f"traceback: {(ended.errors.strip().splitlines() or ['no output'])[-1]}"
    said = ended.errors + ended.out
    if obeyed := next((i for i, c in enumerate(said) if not c.isprintable() and c not in ALLOWED), None):
        return f"printed {said[max(0, obeyed - 40) : obeyed + 40]!r}"
    lines = [line for line in ended.errors.split("\n") if line.startswith("error: ")]
    if ended.code == 0:
        return f"succeeded with {lines[0]!r}" if lines else None
    if ended.code != 1 or len(lines) != 1:
        return f"exit status {ended.code}, {len(lines)} error lines: {ended.errors[-300:]!r}"
    if "(--debug shows where)" in lines[0]:
        return f"internal error: {lines[0]}"
    if names and not any(name in lines[0] for name in names):
        return f"does not name the file: {lines[0]}"
    return None


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a prepared file or folder for one case."""
    if source.is_dir():
        return Path(shutil.copytree(source, target, symlinks=True))
    return Path(shutil.copyfile(source, target))

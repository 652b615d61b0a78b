"""System calls that fail, are cut short, or are hit by a signal; and what a loss of power leaves.

Each command is run once undisturbed, which counts its calls and gives the result to compare with. Then, case by case,
the n-th call is disturbed, what existed before is checked, and the same command is run again.
"""

import contextlib
import errno
import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from . import shim
from .harness import CRASHED, WALL_SECONDS, Ended, command, complaint, limit_memory, run_child
from .material import Material

Action = Callable[[], None]


@dataclass(frozen=True)
class Written:
    """A command that writes, and what it writes."""

    action: Callable[[Material, Path], Action]
    result: Callable[[Material, Path], object]  # equal after any disturbance and another run
    prepare: Callable[[Material, Path], object] = lambda material, place: None  # what exists before
    kept: Callable[[Material, Path, object], str | None] = lambda material, place, wanted: None  # after a disturbance
    stdin: Callable[[Path], str] = lambda place: ""


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files below a folder, by relative path; of tensors, whose order in a file MLX leaves open."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    from safetensors import SafetensorError, deserialize

    data = path.read_bytes()
    if path.suffix == ".safetensors":
        with contextlib.suppress(SafetensorError):
            tensors = sorted((name, t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(data))
            data = repr(tensors).encode()
    return hashlib.sha256(data).hexdigest()


def _convert(material: Material, place: Path) -> Action:
    return command("convert", "--hf-path", material / "tiny", "--mlx-path", place / "out", "-q")


def _converted(material: Material, place: Path, wanted: object = None) -> dict[str, str]:
    return hashes(place)


def _whole_or_absent(material: Material, place: Path, wanted: object) -> str | None:
    made = {f"out/{name}": digest for name, digest in hashes(place / "out").items() if name != ".writing"}
    return f"out is not whole: {sorted(wanted.items() ^ made.items())[:3]}" if made and made != wanted else None


def _train(stage: str) -> Callable[[Material, Path], Action]:
    def train(material: Material, place: Path) -> Action:
        return command("train", *material.train(stage), "--out", place / "run", "--resume")

    return train


def _trained(material: Material, place: Path) -> object:
    """Files but for what contains times, and the steps of the metrics."""
    found = hashes(place)
    found.pop("run/metrics.jsonl", None)
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    return found, [[row["step"], row.get("loss")] for row in map(json.loads, lines)]


def _fuse(material: Material, place: Path) -> Action:
    adapters = ("--adapter-path", material / "finetune", "--out", place / "out")
    return command("train", "--fuse", "--model", material / "mlx", *adapters)


def _chat(material: Material, place: Path) -> Action:
    return command("chat", "--model", material / "tiny", "--max-tokens", 3, "--temp", 0, "--force")


def _old_or_new(material: Material, place: Path, wanted: object) -> str | None:
    old = _sha256(material / "saved.safetensors")
    found = hashes(place).get("saved.safetensors")
    return None if found in (old, wanted["saved.safetensors"]) else "the saved conversation is neither old nor new"


class Teacher:
    """Writes conversations that depend on the images only."""

    def write(self, tasks: list) -> list[tuple[str, bool]]:
        return [(f"Question: What is {name}?\nAnswer: A disk.", True) for name, _, _ in tasks]


def _synthesize(material: Material, place: Path) -> Action:
    def run() -> None:
        from llama3v_mlx import synthesize

        synthesize.make_teacher = lambda args: Teacher()
        files = ("--captions", material / "captions.jsonl", "--out", place / "rows.jsonl")
        command("synthesize", "--teacher", "none", *files, "--batch-size", 2)()

    return run


def _embed(material: Material, place: Path) -> Action:
    paths = (material / "images", "--model", material / "siglip", "--out", place / "store", "--batch-size", 1)
    return command("embed", *paths, "--workers", 1)


def _embedded(material: Material, place: Path) -> object:
    """Rows by path, as exported."""
    export = place / "export"
    ended = run_child(command("embed", "--out", place / "store", "--export", export), place)
    if ended.code:
        return ended.errors
    import numpy as np

    rows = np.load(export / "embeddings.npy")
    entries = [json.loads(line) for line in (export / "index.jsonl").read_text().splitlines()]
    shutil.rmtree(export)
    return sorted((json.dumps(entry), row.tobytes().hex()) for entry, row in zip(entries, rows, strict=True))


def _prompt_cache(material: Material, place: Path) -> Action:
    def store() -> None:
        import mlx.core as mx

        from llama3v_mlx.cli import run
        from llama3v_mlx.serving.prefix_cache import PrefixCache
        from llama3v_mlx.serving.prompts import Block

        def work() -> None:
            cache = PrefixCache(10**6, place / "cache", "model")
            blocks = [Block(f"{i:064}", 16 * i, 16 * (i + 1)) for i in range(3)]
            held, array = cache.fetch(blocks, 48)
            if held and not mx.array_equal(array[0, 0, 0, 0, :, 0], mx.arange(held) // 16):
                raise ArithmeticError("wrong values")
            cache.store(blocks, lambda start, end: mx.full((2, 2, 1, 1, 16, 4), start // 16))
            while cache.save_one():
                pass

        run(work)

    return store


def _old_saved(material: Material, place: Path) -> None:
    shutil.copy(material / "saved.safetensors", place)


WRITTEN = {
    "convert": Written(_convert, _converted, kept=_whole_or_absent),
    "fuse": Written(_fuse, _converted, kept=_whole_or_absent),
    "pretrain": Written(_train("pretrain"), _trained),
    "finetune": Written(_train("finetune"), _trained),
    "chat": Written(
        _chat,
        _converted,
        prepare=_old_saved,
        kept=_old_or_new,
        stdin=lambda place: f"What is a disk?\n/save {place / 'saved'}\n",
    ),
    "synthesize": Written(_synthesize, _converted),
    "embed": Written(_embed, _embedded),
    "prompt-cache": Written(_prompt_cache, lambda material, place: None),  # it checks the values itself
}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EACCES, errno.EROFS)
MODES = [(shim.FAIL, code) for code in ERRORS] + [
    (shim.FAIL_ALL, errno.ENOSPC),
    (shim.FAIL_ALL, errno.EIO),
    (shim.SHORT, 0),
]
SIGNALS = [(shim.SIGNAL, code) for code in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
KINDS = tuple(f"{what}:{name}" for what in ("calls", "signals", "power", "kills", "memory") for name in WRITTEN)


def case(kind: str, number: int, material: Material, place: Path) -> tuple[str, str | None]:
    """Disturb one call of a command and run it again; consecutive numbers go through all calls and modes."""
    what, _, name = kind.partition(":")
    written = WRITTEN[name]
    count, seconds, wanted = _undisturbed(name, written, material, place.parent)
    here = _new(material, place / name, written)
    if what in ("kills", "memory"):
        share = random.Random(f"{kind} {number}").random()
        if what == "kills":
            ended = replace(_run(written, material, here, seconds=share * seconds), timed_out=False)
            return f"killed after {share:.0%} of its time", _judge(written, material, here, ended, wanted)
        room = int(4e5 * 1000**share)  # 0.4 to 400 MB
        ended = _run(written, material, here, memory=room)
        if _is_beyond_python(ended):
            ended = replace(ended, code=-signal.SIGKILL, timed_out=False)
        return f"with {room / 1e6:.1f} MB more", _judge(written, material, here, ended, wanted)
    modes = {"calls": MODES, "signals": SIGNALS, "power": [(shim.SIGNAL, signal.SIGKILL)]}[what]
    at, (mode, code) = number % count + 1, modes[number // count % len(modes)]
    ended = _run(written, material, here, mode, at, code)
    _, log = shim.seen()
    if what == "power":
        lose_power(here, log)
    hit = next((" ".join(line) for line in log if line[0] in ("failed", "signal")), "")
    described = f"call {at} of {count}, {errno.errorcode.get(code, code) if what == 'calls' else code}: {hit}"
    return described, _judge(written, material, here, ended, wanted)


def _judge(written: Written, material: Material, place: Path, ended: Ended, wanted: object) -> str | None:
    names = (str(place), "out of memory", "failed to map segment")
    problem = complaint(ended, names) if ended.timed_out or ended.code in (0, 1, CRASHED) else _interrupted(ended)
    problem = problem or written.kept(material, place, wanted)
    if problem:
        return problem
    if ended.code == 0:
        found = written.result(material, place)
        if found == wanted:
            return None  # the call did not matter
        if not written.stdin(place):  # a chat goes on after Ctrl-C
            return f"succeeded, but the result differs: {_difference(found, wanted)}"
    again = _run(written, material, place)
    if ended.code != 1 and "exists already" in again.errors:  # stopped after the last step, the new name
        (place / "out" / ".writing").unlink(missing_ok=True)
    elif again.code:
        return f"the second run failed: {again.errors[-400:]!r}"
    found = written.result(material, place)
    return None if found == wanted else f"the second run's result differs: {_difference(found, wanted)}"


def _is_beyond_python(ended: Ended) -> bool:
    """Whether a shortage of memory ended a command where Python cannot catch it.

    MLX aborts if it cannot start a thread or if an allocation fails on a thread of its own, OpenBLAS waits for ever for
    its buffers, and the loader of libraries exits. Nothing may be half-written even then.
    """
    aborted = ended.code == -signal.SIGABRT and "terminate called" in ended.errors
    return aborted or ended.timed_out or ended.code == -signal.SIGSEGV or "thread-local data" in ended.errors


def _interrupted(ended: Ended) -> str | None:
    if ended.code not in (130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP) or "Traceback" in ended.errors:
        return f"exit status {ended.code}: {ended.errors[-300:]!r}"
    return None


def _difference(found: object, wanted: object) -> str:
    if isinstance(found, dict):
        return str(sorted(set(found.items()) ^ set(wanted.items()))[:4])
    if isinstance(found, tuple):
        return " and ".join(_difference(*pair) for pair in zip(found, wanted, strict=True) if pair[0] != pair[1])
    return f"{str(found)[:300]} instead of {str(wanted)[:300]}"


_references: dict[str, tuple[int, float, object]] = {}


def _undisturbed(name: str, written: Written, material: Material, folder: Path) -> tuple[int, float, object]:
    """Number of calls of an undisturbed run, its seconds, and its result."""
    if name not in _references:
        place = _new(material, folder / "undisturbed" / name, written)
        tic = time.monotonic()
        ended = _run(written, material, place, shim.COUNT)
        seconds = time.monotonic() - tic
        count, _ = shim.seen()
        if ended.code or not count:
            raise RuntimeError(f"{name}: nothing was disturbed, but exit status {ended.code}: {ended.errors}")
        _references[name] = count, seconds, written.result(material, place)
    return _references[name]


def _new(material: Material, place: Path, written: Written) -> Path:
    place.mkdir(parents=True)
    written.prepare(material, place)
    return place


def _run(
    written: Written,
    material: Material,
    place: Path,
    mode: int = shim.OFF,
    at: int = 0,
    code: int = 0,
    seconds: float = WALL_SECONDS,
    memory: int | None = None,
) -> Ended:
    """Run a command in a child; see `shim.arm`. It is killed after `seconds`, and may map `memory` bytes more."""
    action = written.action(material, place)

    def disturbed() -> None:
        shim.arm(place, mode, at, code)
        if memory is not None:
            limit_memory(memory)
        action()

    return run_child(disturbed, place, written.stdin(place).encode(), seconds)


def lose_power(folder: Path, log: list[list[str]]) -> None:
    """Truncate files to what was flushed, under their present names, as if the power had been lost.

    Renames and new names are kept: journaling file systems order them, but not before the data.
    """
    flushed: dict[str, int] = {}
    dirty: set[str] = set()
    for call, path, other in log:
        match call:
            case "write" | "create" | "truncate":
                dirty.add(path)
            case "sync":
                dirty.discard(path)
                flushed[path] = int(other)
            case "unlink":
                dirty.discard(path)
                flushed.pop(path, None)
            case "rename":
                dirty = {_renamed(name, path, other) for name in dirty}
                flushed = {_renamed(name, path, other): size for name, size in flushed.items()}
    for name in dirty:
        path = folder / name
        if path.is_file():
            with path.open("r+b") as file:
                file.truncate(min(flushed.get(name, 0), path.stat().st_size))


def _renamed(name: str, path: str, other: str) -> str:
    return other + name.removeprefix(path) if name == path or name.startswith(path + "/") else name

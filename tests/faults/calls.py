"""System calls that fail, are cut short, or are hit by a signal; and what a loss of power leaves.

Each command is run once undisturbed, which counts its calls and gives the result to compare with. Then, case by case,
the n-th call is disturbed, what existed before is checked, and the same command is run again.
"""

import errno
import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import shim
from .harness import Ended, command, complaint, run_child
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
    """SHA-256 of the files below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


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
    old = hashlib.sha256((material / "saved.safetensors").read_bytes()).hexdigest()
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


def _cached(material: Material, place: Path) -> list[str]:
    """Files whose contents are not those that their names promise; which blocks are cached may differ."""
    return [name for name, digest in hashes(place).items() if digest not in name]


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
    "prompt-cache": Written(_prompt_cache, _cached),
}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EACCES, errno.EROFS)
MODES = [(shim.FAIL, code) for code in ERRORS] + [
    (shim.FAIL_ALL, errno.ENOSPC),
    (shim.FAIL_ALL, errno.EIO),
    (shim.SHORT, 0),
]
SIGNALS = [(shim.SIGNAL, code) for code in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
KINDS = tuple(f"{what}:{name}" for what in ("calls", "signals", "power") for name in WRITTEN)


def case(kind: str, number: int, material: Material, place: Path) -> tuple[str, str | None]:
    """Disturb one call of a command and run it again; consecutive numbers go through all calls and modes."""
    what, _, name = kind.partition(":")
    written = WRITTEN[name]
    count, wanted = _undisturbed(name, written, material, place.parent)
    modes = {"calls": MODES, "signals": SIGNALS, "power": [(shim.SIGNAL, signal.SIGKILL)]}[what]
    at, (mode, code) = number % count + 1, modes[number // count % len(modes)]
    here = _new(material, place / name, written)
    ended = _run(written, material, here, mode, at, code)
    _, log = shim.seen()
    if what == "power":
        lose_power(here, log)
    hit = next((" ".join(line) for line in log if line[0] in ("failed", "signal")), "")
    described = f"call {at} of {count}, {errno.errorcode.get(code, code) if what == 'calls' else code}: {hit}"
    return described, _judge(written, material, here, ended, wanted)


def _judge(written: Written, material: Material, place: Path, ended: Ended, wanted: object) -> str | None:
    problem = complaint(ended, (str(place),)) if ended.code in (0, 1, 99) else _interrupted(ended)
    problem = problem or written.kept(material, place, wanted)
    if problem:
        return problem
    if ended.code == 0:  # the call did not matter
        found = written.result(material, place)
        return None if found == wanted else f"succeeded, but the result differs: {_difference(found, wanted)}"
    again = _run(written, material, place, shim.OFF, 0, 0)
    if again.code and not (ended.code == 130 and "exists already" in again.errors):  # Ctrl-C after its last step
        return f"the second run failed: {again.errors[-400:]!r}"
    found = written.result(material, place)
    return None if found == wanted else f"the second run's result differs: {_difference(found, wanted)}"


def _interrupted(ended: Ended) -> str | None:
    if ended.code not in (130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP) or "Traceback" in ended.errors:
        return f"exit status {ended.code}: {ended.errors[-300:]!r}"
    return "was still running" if ended.timed_out else None


def _difference(found: object, wanted: object) -> str:
    if isinstance(found, dict):
        return str(sorted(set(found.items()) ^ set(wanted.items()))[:4])
    if isinstance(found, tuple):
        return " and ".join(_difference(*pair) for pair in zip(found, wanted, strict=True) if pair[0] != pair[1])
    return f"{str(found)[:300]} instead of {str(wanted)[:300]}"


_references: dict[str, tuple[int, object]] = {}


def _undisturbed(name: str, written: Written, material: Material, folder: Path) -> tuple[int, object]:
    """Number of calls of an undisturbed run, and its result."""
    if name not in _references:
        place = _new(material, folder / "undisturbed" / name, written)
        ended = _run(written, material, place, shim.COUNT, 0, 0)
        count, _ = shim.seen()
        if ended.code or not count:
            raise RuntimeError(f"{name}: nothing was disturbed, but exit status {ended.code}: {ended.errors}")
        _references[name] = count, written.result(material, place)
    return _references[name]


def _new(material: Material, place: Path, written: Written) -> Path:
    place.mkdir(parents=True)
    written.prepare(material, place)
    return place


def _run(written: Written, material: Material, place: Path, mode: int, at: int, code: int) -> Ended:
    action = written.action(material, place)

    def disturbed() -> None:
        shim.arm(place, mode, at, code)
        action()

    return run_child(disturbed, place, written.stdin(place).encode())


def lose_power(folder: Path, log: list[list[str]]) -> None:
    """Truncate what was written and not flushed, under its present name, as if the power had been lost.

    Renames and new names are kept: journaling file systems order them, but not before the data.
    """
    dirty: dict[str, None] = {}
    for call, path, other in log:
        match call:
            case "write" | "create" | "truncate":
                dirty[path] = None
            case "sync" | "unlink":
                dirty.pop(path, None)
            case "rename":
                dirty = {other + name.removeprefix(path) if _within(name, path) else name: None for name in dirty}
    for name in dirty:
        path = folder / name
        if path.is_file():
            with path.open("r+b") as file:
                file.truncate(0)


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(path + "/")

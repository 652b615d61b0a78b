"""What a loss of power leaves of a folder: neither what was not flushed, nor names in folders that were not."""

import os
import random
import shutil
from pathlib import Path


class Power:
    """The folder of a command that runs with the shim, of which `lose` makes what a loss of power would have left.

    Args:
        folder: the folder, before the command runs.
        kept: a new folder, for what the files were like when they were flushed, replaced or removed.
    """

    def __init__(self, folder: Path, kept: Path):
        self._folder, self.kept = folder, kept
        self._before = kept / "before"
        shutil.copytree(folder, self._before)

    def lose(self, rng: random.Random, log: list[list[str]]) -> None:
        """Undo what was not flushed: all of it, or some, in any order.

        Args:
            rng: chooses what is undone.
            log: calls of the command, see `shim.seen`.
        """
        flushed = {str(self._folder / p.relative_to(self._before)): p for p in self._before.rglob("*") if p.is_file()}
        dirty: set[str] = set()
        names: list[tuple[str, str, str, Path]] = []  # renames and removals in folders not flushed since
        for number, call, *paths in log:
            one, other = (os.path.normpath(self._folder / path) if path else "" for path in paths)
            kept = self.kept / number
            match call:
                case "write" | "create" | "truncate":
                    dirty.add(one)
                case "sync":
                    dirty.discard(one)
                    flushed[one] = kept
                    names = [name for name in names if os.path.dirname(name[2] or name[1]) != one]
                case "unlink":
                    dirty.discard(one)
                    flushed.pop(one, None)
                    names.append((call, one, "", kept))
                case "rename":
                    dirty = {_renamed(name, one, other) for name in dirty if name != other}
                    flushed = {_renamed(name, one, other): path for name, path in flushed.items() if name != other}
                    names.append((call, one, other, kept))
        share = rng.choice((1, 1, 0.5))
        for name in sorted(dirty):
            if os.path.isfile(name) and rng.random() < share:
                old = flushed.get(name)
                Path(name).write_bytes(old.read_bytes() if old else b"")
        undone = len(names) - rng.randrange(len(names) + 1)  # the last ones; sometimes any of them
        for name in reversed(names[undone:] if rng.random() < 0.7 else [n for n in names if rng.random() < 0.5]):
            _undo(*name)


def _undo(call: str, one: str, other: str, kept: Path) -> None:
    if call == "rename" and os.path.lexists(other) and not os.path.lexists(one) and os.path.isdir(os.path.dirname(one)):
        os.rename(other, one)
        one = other
    if kept.exists() and not os.path.lexists(one) and os.path.isdir(os.path.dirname(one)):
        shutil.copyfile(kept, one)


def _renamed(name: str, path: str, other: str) -> str:
    return other + name.removeprefix(path) if name == path or name.startswith(path + "/") else name

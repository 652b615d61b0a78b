"""Answers about images in a file of JSON lines: appended as they are done, continued after a kill, sorted at the end.

A line has `path`, `answer`, `finish_reason`, `tokens`, `sha256` and `stat`, or `path` and `error`. Of several lines of
a path, the last one counts; `finish` removes the others. FILE.settings.json has what the answers depend on.
"""

import json
import os
import reprlib
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .config import read_json
from .features.sources import FileStat
from .files import append, cut_half_line, write_beside
from .locks import open_locked


class AnswersError(ValueError):
    """Raised for a file of answers that cannot be continued; the message says why, in one line."""


@dataclass(frozen=True)
class _Line:
    """Place of a line in the file, and what identifies its image."""

    start: int
    end: int
    sha256: str | None  # None: an error
    stat: FileStat | None


def settings_path(path: Path) -> Path:
    """Path of the settings that belong to a file of answers."""
    return path.with_name(f"{path.name}.settings.json")


def check_settings(path: Path, settings: dict) -> None:
    """Check that a file of answers, if there is one, was written with these settings, or is new or empty.

    Args:
        path: the file.
        settings: all or some of the settings.

    Raises:
        AnswersError: if it was written with other settings, or by something else.
        CheckpointError: if its settings are damaged.
    """
    if os.path.lexists(path) and not stat.S_ISREG(path.stat().st_mode):
        raise AnswersError(f"{path}: is not a regular file; use another --out (-: stdout)")
    if not path.exists() or not path.stat().st_size:
        return
    if not settings_path(path).is_file():
        raise AnswersError(
            f"{path}: is not empty and has no {settings_path(path).name} beside it, as answers of generate --images "
            "have; use another --out"
        )
    old = read_json(settings_path(path))
    if differing := [key for key in settings if old.get(key) != settings[key]]:
        values = [(key, reprlib.repr(old.get(key)), reprlib.repr(settings[key])) for key in differing]
        was = ", ".join(f"{key} was {before} and is {now}" for key, before, now in values)
        raise AnswersError(f"{path}: has answers with other settings ({was}); use the same ones, or another --out")


class AnswerFile:
    """A file of answers opened for writing by one process; use it in a `with` statement.

    Args:
        path: the file, created if it does not exist.
        settings: everything the answers depend on, as JSON.
        notes: saved with the settings for information; they may differ when the file is continued.

    Raises:
        AnswersError: if the file cannot be continued, see `check_settings`.
        OSError: if another process writes to it.
    """

    def __init__(self, path: Path, settings: dict, notes: dict | None = None):
        self.path = path
        check_settings(path, settings)
        self._file = open_locked(path)
        try:
            check_settings(path, settings)  # nothing can change it any more
            cut_half_line(self._file)
            if not os.fstat(self._file.fileno()).st_size:
                saved = json.dumps({**(notes or {}), **settings}, indent=2) + "\n"
                write_beside(settings_path(path), saved.encode())
            self._lines: dict[str, _Line] = {}
            self._images: dict[str, _Line] = {}  # SHA-256 to a line with its answer
            self._end = 0
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        self._note(_checked(json.loads(line)), len(line))
                    except (ValueError, TypeError, KeyError, RecursionError):
                        raise AnswersError(f"{path}:{number}: is not a line of answers; remove it") from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def __contains__(self, sha256: bytes) -> bool:
        return sha256.hex() in self._images

    def __len__(self) -> int:
        """Number of answered paths."""
        return sum(line.sha256 is not None for line in self._lines.values())

    def has_answer(self, path: str) -> bool:
        """Return True if the last line of a path is an answer, not an error."""
        line = self._lines.get(path)
        return line is not None and line.sha256 is not None

    def is_unchanged(self, path: str, stat: FileStat | None) -> bool:
        """Return True if there is an answer about the file at `path`, and the file is as it was then."""
        return self.has_answer(path) and stat is not None and self._lines[path].stat == stat

    def copy(self, sha256: bytes) -> dict:
        """Read the line of an image that is in the file, under whatever path."""
        return json.loads(self._read(self._images[sha256.hex()]))

    def write(self, row: dict) -> None:
        """Append the line of a path, all of it or nothing; do nothing if its last line is the same.

        Raises:
            OSError: if writing fails, for example on a full disk.
        """
        line, last = to_line(row), self._lines.get(row["path"])
        if last is None or self._read(last) != line:
            append(self._file, line)
            self._note(row, len(line))

    def finish(self, order: Iterable[str]) -> None:
        """Remove superseded lines, and sort: paths that are not in `order` first, as they are.

        Raises:
            OSError: if writing fails; the file is then as it was.
        """
        later = dict.fromkeys(path for path in order if path in self._lines)
        ordered = [line for path, line in self._lines.items() if path not in later]
        ordered.sort(key=lambda line: line.start)
        ordered += [self._lines[path] for path in later]
        starts = [line.start for line in ordered]
        if starts != sorted(starts) or sum(line.end - line.start for line in ordered) < self._end:
            write_beside(self.path, map(self._read, ordered))

    def _read(self, line: _Line) -> bytes:
        return os.pread(self._file.fileno(), line.end - line.start, line.start)

    def _note(self, row: dict, length: int) -> None:
        path, sha256, seen = row["path"], row.get("sha256"), row.get("stat")
        start, self._end = self._end, self._end + length
        self._lines[path] = _Line(start, self._end, sha256, tuple(seen) if seen else None)
        if sha256:
            self._images[sha256] = self._lines[path]


def _checked(row: dict) -> dict:
    """Return a row of the file; raise ValueError, TypeError or KeyError if it has no answer and no error."""
    path, sha256 = row["path"], row.get("sha256")
    if not isinstance(path, str) or not ("error" in row if sha256 is None else "answer" in row):
        raise ValueError
    if sha256 is not None:
        bytes.fromhex(sha256)
    return row


def to_line(row: dict) -> bytes:
    """Format a row as a line of JSON in UTF-8; bytes of a path that are not UTF-8 become lone surrogates, escaped."""
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"

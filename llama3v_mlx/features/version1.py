"""Stores of version 1: manifests of records, and lists of names, instead of a database."""

import contextlib
import errno
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from sqlite3 import Connection

import numpy as np

from ..checkpoint import read_json
from ..files import list_folder, printable, write_beside
from ..locks import lock
from .database import FORMAT, Database, create_database, fill_new, in_memory
from .shards import INTO_ENTRIES, LOCK, RECORD, STORE
from .sources import encode_path, signed

VERSION = 1


def migrate(folder: Path) -> tuple[Database, OSError | None]:
    """Create the database of a store of version 1 from its manifests and names; shards are not touched.

    A kill at any moment leaves a store of either version.

    Returns:
        The database, and why it is one in memory, if the store cannot be written.
    """
    try:
        with (folder / LOCK).open("ab") as held:
            lock(held)
            values = read_json(folder / STORE)
            if values.pop("version", None) == VERSION:  # not migrated by another process meanwhile
                with contextlib.ExitStack() as stack:
                    for manifest in list_folder(folder, "manifest-*.bin"):
                        if not lock(stack.enter_context(manifest.open("rb")), wait=False):
                            raise OSError(errno.EBUSY, "an older version of llama3v is writing to it", str(folder))
                    create_database(folder, lambda db: _fill(db, folder))
                    write_beside(folder / STORE, (json.dumps(values | {"format": FORMAT}, indent=2) + "\n").encode())
            remove_version_1(folder)
        return Database(folder), None
    except OSError as e:
        memory = in_memory()
        fill_new(memory, lambda db: _fill(db, folder))
        return Database(folder, memory), e


def remove_version_1(folder: Path) -> None:
    """Remove the manifests and names of a store that was migrated."""
    for path in (*list_folder(folder, "manifest-*.bin"), *list_folder(folder, "names-*.jsonl")):
        path.unlink(missing_ok=True)


def _fill(db: Connection, folder: Path) -> None:
    for path in list_folder(folder, "manifest-*.bin"):
        writer = int(path.stem.rpartition("-")[2])
        records = np.fromfile(path, RECORD, path.stat().st_size // RECORD.itemsize)  # a partial one was being written
        rows = ((writer, *record) for record in records.tolist())
        # Of entries of one image, the first was the one that counted.
        db.executemany(f"INSERT OR IGNORE {INTO_ENTRIES}", rows)
    for path in list_folder(folder, "names-*.jsonl"):
        damaged: list[int] = []
        query = "INSERT INTO files (sha256, path, size, mtime_ns, ctime_ns, inode) VALUES (?, ?, ?, ?, ?, ?)"
        db.executemany(query, _read_names(path, damaged))
        if damaged:
            lines = ", ".join(map(str, damaged[:10])) + (" and more" if len(damaged) > 10 else "")
            where = f"{printable(str(path))}:{lines}"
            print(f"note: {where}: damaged, skipped; embed the images again to record it", file=sys.stderr)


def _read_names(path: Path, damaged: list[int]) -> Iterator[tuple]:
    """Yield the columns of complete lines; a line without a newline was being written."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
                sha256, name = bytes.fromhex(entry["sha256"]), encode_path(entry["path"])
                stat = tuple(map(signed, map(int, entry["stat"]))) if "stat" in entry else (None,) * 4
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                sha256, name, stat = b"", b"", ()
            if len(sha256) == 32 and len(stat) == 4:
                yield sha256, name, *stat
            else:
                damaged.append(number)

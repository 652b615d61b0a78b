"""Verification and repair of a feature store."""

import contextlib
import shutil
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import check_file, list_folder
from ..locks import lock
from .database import Database, connect_readonly, create_database
from .growing import open_unbuffered, places_of
from .shards import COLUMNS, DATABASE, OPEN, SEALED, FeatureError, Shard, shard_path, to_records
from .store import FeatureStore, StoreInfo, read_info
from .version1 import VERSION

_NUMBERS = {column: 1 << (32 if column in ("shard", "start", "rows", "crc32") else 16) for column in COLUMNS[1:]}
_ENTRY = " AND ".join(
    ["typeof(sha256) = 'blob' AND length(sha256) = 32 AND typeof(writer) = 'integer' AND writer >= 0"]
    + [f"typeof({column}) = 'integer' AND {column} BETWEEN 0 AND {end - 1}" for column, end in _NUMBERS.items()]
)
_FILE = "typeof(path) = 'blob' AND typeof(sha256) = 'blob' AND length(sha256) IN (0, 32)"
_FILES = ("sha256", "path", "size", "mtime_ns", "ctime_ns", "inode", "taken", "width", "height")


@dataclass
class Verdict:
    """Result of verifying a store."""

    good: int = 0
    lost: list[str] = field(default_factory=list)  # one line per loss
    restored: int = 0


def verify(folder: str | Path) -> Verdict:
    """Check that every entry of a store exists, matches its checksum and is finite; then repair the store.

    Bad entries are removed from the database, and entries of sealed shards that it has lost are restored. A damaged
    database is rebuilt from the sealed shards. A shard that cannot be read, or has no good entry, is renamed to the
    suffix `.damaged`.

    Raises:
        FeatureError: if the folder is not a store, or a process is writing to it.
    """
    folder, verdict = Path(folder), Verdict()
    if read_info(folder).format == VERSION and (reason := FeatureStore(folder).read_only):
        raise reason
    with contextlib.ExitStack() as stack:
        for path in list_folder(folder, "writer-*.lock"):
            if not lock(stack.enter_context(open_unbuffered(path)), wait=False):
                raise FeatureError(f"{folder}: a process is writing to it; verify when it is done")
        database = _open_or_rebuild(folder, verdict)
        places = set(database.rows("SELECT DISTINCT writer, shard FROM entries"))
        places |= places_of(list_folder(folder, f"shard-*{SEALED}"))
        for writer, number in sorted(places):
            _check_shard(folder, writer, number, read_info(folder), database, verdict)
        verdict.good = database.rows("SELECT count(*) FROM entries")[0][0]
    return verdict


def _open_or_rebuild(folder: Path, verdict: Verdict) -> Database:
    path = folder / DATABASE
    try:
        database = Database(folder)
        if (problem := database.rows("PRAGMA integrity_check(1)")[0][0]) == "ok":
            _remove_odd(database, verdict)
            return database
        raise FeatureError(problem)
    except FeatureError:
        names = []
        if path.exists():
            try:
                check_file(path)  # of a link to a device, a copy would fill the disk
            except OSError as e:
                raise FeatureError(f"{path}: {e}") from e
            with contextlib.suppress(sqlite3.Error, FeatureError), contextlib.closing(connect_readonly(path)) as old:
                there = {row[1] for row in old.execute("PRAGMA table_info(files)")}  # a store may lack the last ones
                columns = ", ".join(name if name in there else "NULL" for name in _FILES)
                for row in old.execute(f"SELECT {columns} FROM files ORDER BY id"):
                    names.append(row)
            shutil.copyfile(path, path.with_suffix(".db.damaged"))
            path.with_suffix(".db-journal").unlink(missing_ok=True)  # it belongs to the damaged database
        insert = f"INSERT INTO files ({', '.join(_FILES)}) VALUES ({', '.join('?' * len(_FILES))})"
        create_database(folder, lambda db: db.executemany(insert, names))
        growing = "".join(f"; the entries of {path}" for path in list_folder(folder, f"shard-*{OPEN}"))
        verdict.lost.append(f"{path}: damaged or missing; rebuilt from the shards, with {len(names)} names{growing}")
        return Database(folder)


def _remove_odd(database: Database, verdict: Verdict) -> None:
    """Remove rows with values of a wrong type or size; those of entries are restored from their shards."""
    with database.transaction() as db:
        for table, is_right in (("entries", _ENTRY), ("files", _FILE)):
            count = db.execute(f"DELETE FROM {table} WHERE NOT ({is_right})").rowcount
            if count:
                verdict.lost.append(f"{database.path}: {count} damaged rows of the table of {table}")


def _check_shard(folder: Path, writer: int, number: int, info: StoreInfo, database: Database, verdict: Verdict) -> None:
    query = f"SELECT {', '.join(COLUMNS)} FROM entries WHERE writer = ? AND shard = ?"
    records = to_records(database.rows(query, (writer, number)))
    with database.transaction() as db:
        try:
            shard = Shard(folder, writer, number, info.width, info.dtype)
        except FeatureError as e:
            verdict.lost.append(f"{len(records)} entries: {e}")
            db.execute("DELETE FROM entries WHERE writer = ? AND shard = ?", (writer, number))
            _set_aside(shard_path(folder, writer, number))
            return
        bad = [record for record in records if not _is_good(shard, record, info.dtype)]
        gone = [(writer, number, int(record["start"])) for record in bad]
        db.executemany("DELETE FROM entries WHERE writer = ? AND shard = ? AND start = ?", gone)
        restored = lost = 0
        if not shard.growing:
            # Entries removed by an earlier check are still in the shard's own records, and still bad.
            listed = {record.tobytes() for record in records}
            missing = [record for record in shard.records if record.tobytes() not in listed]
            good = [(writer, *record.tolist()) for record in missing if _is_good(shard, record, info.dtype)]
            marks = ", ".join("?" * (1 + len(COLUMNS)))
            insert = f"INSERT OR IGNORE INTO entries (writer, {', '.join(COLUMNS)}) VALUES ({marks})"
            before = db.total_changes  # in a Turkish locale, Python up to 3.12 has no rowcount: "I" is not "i" there
            db.executemany(insert, good)
            restored = db.total_changes - before
            lost = 0 if len(records) else len(missing) - len(good)
    verdict.restored += restored
    if lost := lost + len(bad):
        verdict.lost.append(f"{lost} entries of {shard.path}: checksum mismatch or not finite")
    if len(records) == len(bad) > 0 and not restored:
        _set_aside(shard.path)


def _is_good(shard: Shard, record: np.void, dtype: str) -> bool:
    try:
        values, scales = shard.read(int(record["start"]), int(record["rows"]))
        shard.check(np.array([record], record.dtype), values, scales)
    except FeatureError:
        return False
    if dtype == "bfloat16":
        return bool(((values & 0x7F80) != 0x7F80).all())  # an exponent of ones is infinity or NaN
    return bool(np.isfinite(values).all() and np.isfinite(scales).all())


def _set_aside(shard: Path) -> None:
    if shard.exists():
        shard.rename(shard.with_suffix(".damaged"))

"""Additions to a feature store, by any number of processes at once."""

from collections.abc import Sequence
from sqlite3 import Connection

import numpy as np

from .database import Database
from .growing import OpenShard, claim, find_growing, next_number, unseal
from .shards import COLUMNS, INTO_ENTRIES, checksums, shard_path, to_records, to_stored
from .sources import FileStat, encode_path
from .store import Features, FeatureStore
from .version1 import remove_version_1

SHARD_BYTES = 1 << 30
_NAMES = 500  # names written in one transaction, unless entries are added before


class FeatureWriter:
    """A store opened for writing, by any number of processes at once; use it in a `with` statement.

    Entries are durable once `add` returns, even if the process is killed or power fails. Partially written entries are
    never treated as valid. Nothing is remembered between calls but open files and names to be written: after any
    exception, the next call begins with what the database says.

    Args:
        store: the store.
        shard_bytes: size at which a shard is sealed and a new one started.

    Raises:
        OSError: if the store is on a read-only disk.
        FeatureError: if an older version of this package is writing to it.
    """

    def __init__(self, store: FeatureStore, shard_bytes: int = SHARD_BYTES):
        if store.read_only is not None:
            raise store.read_only
        remove_version_1(store.folder)
        self.store, self._shard_bytes = store, shard_bytes
        # A connection of its own: no reader may see what is not committed yet.
        self._database = Database(store.folder)
        self._shard: OpenShard | None = None
        self._names: list[tuple] = []
        self.number = -1
        self._claim = None
        while self._claim is None:
            self.number += 1
            self._claim = claim(store.folder, self.number)
        try:
            self._resume()
        except BaseException:
            self._claim.close()
            raise

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def add(self, entries: Sequence[tuple[bytes, Features]]) -> int:
        """Store features by the SHA-256 of their image files; entries that already exist are kept unchanged.

        Either all of them are stored or none, even on a full disk or at Ctrl-C at any moment; and all names given
        before with them.

        Returns:
            The number of new entries.

        Raises:
            OSError: if writing fails, for example on a full disk.
            FeatureError: if rows are not finite, or of the wrong width.
        """
        info = self.store.info
        fresh = {sha256: features for sha256, features in entries if sha256 not in self.store}
        if not fresh and not self._names:
            return 0
        prepared = []
        for sha256, f in fresh.items():
            values, scales = to_stored(f.rows, info.width, info.dtype)
            sizes = (*f.overview, *(f.grid or (0, 0)), *(f.cell or (0, 0)))
            entry = (sha256, len(values), checksums([len(values)], values, scales)[0], *sizes)
            prepared.append((entry, values, scales))
        with self._database.transaction() as db:
            new = self._append(db, prepared)
            self._insert_names(db)
        self._names = []
        return new

    def copy(self, records: np.ndarray, values: np.ndarray, scales: np.ndarray, moving: bool = False) -> int:
        """Store entries of `FeatureStore.blocks` as they are, from a store of the same kind; see `add`.

        Args:
            moving: they are entries of this store, which change their places.
        """
        ends = np.cumsum(records["rows"])[:-1]
        split = np.split(scales, ends) if len(scales) else [scales] * len(records)
        entries = [(sha256, rows, *more) for sha256, _, _, rows, *more in records.tolist()]
        with self._database.transaction() as db:
            if moving:
                db.executemany("DELETE FROM entries WHERE sha256 = ?", [entry[:1] for entry in entries])
            return self._append(db, list(zip(entries, np.split(values, ends), split, strict=True)))

    @property
    def place(self) -> tuple[int, int | None]:
        """Numbers of the writer and of the shard that it adds to."""
        return self.number, self._shard and self._shard.number

    def start_shard(self) -> None:
        """Let what follows be written to a new shard."""
        with self._database.transaction() as db:
            self._seal(db)
            self._shard = self._open(self._unused(db))

    def name(self, sha256: bytes, path: str, stat: FileStat | None = None, facts: Sequence = (None,) * 3) -> None:
        """Record `path` as a name of the image with this SHA-256, soon, or at the latest when the writer is closed.

        Args:
            sha256: of the image file.
            path: a file name.
            stat: that of the file at the resolved path when it was read.
            facts: date and size of the image, `ImageFacts`.
        """
        self._names.append((sha256, encode_path(path), *(stat or [None] * 4), *facts))
        if len(self._names) >= _NAMES:
            self._write_names()

    def close(self) -> None:
        """Write the last names, seal the shard and close the files."""
        with self._claim:
            self._write_names()
            with self._database.transaction() as db:
                self._seal(db)

    def _append(self, db: Connection, prepared: Sequence[tuple[tuple, np.ndarray, np.ndarray]]) -> int:
        """Write new entries, each with (SHA-256, rows, CRC-32, *sizes), values and scales; return their number."""
        known = "SELECT 1 FROM entries WHERE sha256 = ?"  # another process may have added it since
        prepared = [each for each in prepared if not db.execute(known, each[0][:1]).fetchone()]
        if prepared:
            first = start = self._begin(db)
            placed = []
            for (sha256, rows, *more), _, _ in prepared:
                placed.append((self.number, sha256, self._shard.number, start, rows, *more))
                start += rows
            self._shard.write(first, [values for _, values, _ in prepared], [scales for *_, scales in prepared])
            db.executemany(f"INSERT {INTO_ENTRIES}", placed)
        return len(prepared)

    def _write_names(self) -> None:
        if self._names:
            with self._database.transaction() as db:
                self._insert_names(db)
            self._names = []

    def _insert_names(self, db: Connection) -> None:
        """Insert the names that are new."""
        db.executemany(
            """INSERT INTO files (sha256, path, size, mtime_ns, ctime_ns, inode, taken, width, height)
            SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9
            WHERE NOT EXISTS (SELECT 1 FROM files WHERE path = ?2 AND sha256 = ?1
                AND size IS ?3 AND mtime_ns IS ?4 AND ctime_ns IS ?5 AND inode IS ?6)""",
            self._names,
        )

    def _resume(self) -> None:
        """Reopen the growing shard that another process with this number left."""
        number = find_growing(self.store.folder, self.number)
        if number is not None:
            self._shard = self._open(number)
            with self._database.transaction() as db:  # entries whose rows were lost in a power failure
                lost = "DELETE FROM entries WHERE writer = ? AND shard = ? AND start + rows > ?"
                db.execute(lost, (self.number, number, self._shard.rows_found))

    def _begin(self, db: Connection) -> int:
        """Open the shard to add to, and return the number of its next row."""
        if self._shard is None:
            number = find_growing(self.store.folder, self.number)
            self._shard = self._open(self._next(db) if number is None else number)
        end = self._end(db)
        if self._shard.num_bytes(end) >= self._shard_bytes:
            self._seal(db)
            self._shard = self._open(self._next(db))
            end = self._end(db)
        return end

    def _next(self, db: Connection) -> int:
        """Reopen the last sealed shard if it is not full; return its number, or that of a new shard."""
        folder, info = self.store.folder, self.store.info
        number = next_number(folder, self.number)
        last = shard_path(folder, self.number, number - 1)
        if last.exists() and last.stat().st_size < self._shard_bytes:
            records = self._records(db, number - 1)
            if unseal(folder, self.number, number - 1, info.width, info.dtype, records):
                return number - 1
        return self._unused(db)

    def _unused(self, db: Connection) -> int:
        # A shard whose file is missing is not begun again: its entries must not be mistaken for others.
        (known,) = db.execute("SELECT max(shard) FROM entries WHERE writer = ?", (self.number,)).fetchone()
        return max(next_number(self.store.folder, self.number), 0 if known is None else known + 1)

    def _end(self, db: Connection) -> int:
        last = "SELECT start + rows FROM entries WHERE writer = ? AND shard = ? ORDER BY start DESC LIMIT 1"
        found = db.execute(last, (self.number, self._shard.number)).fetchone()
        return found[0] if found else 0

    def _open(self, number: int) -> OpenShard:
        return OpenShard(self.store.folder, self.number, number, self.store.info.width, self.store.info.dtype)

    def _records(self, db: Connection, number: int) -> np.ndarray:
        query = f"SELECT {', '.join(COLUMNS)} FROM entries WHERE writer = ? AND shard = ? ORDER BY start"
        with self._database.converting():
            return to_records(db.execute(query, (self.number, number)).fetchall())

    def _seal(self, db: Connection) -> None:
        shard, self._shard = self._shard, None  # first, because it may be interrupted after it has been renamed
        if shard is not None:
            shard.seal(self._records(db, shard.number))

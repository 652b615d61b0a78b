"""SQLite database of a feature store: where the rows of each entry are, and which files were read.

A rollback journal, not a write-ahead log, because stores also live on network disks. Transactions are short, and no
reader keeps one open, so that several processes can share a store. On a file system without POSIX locks, a folder that
only one process can create is the lock.
"""

import contextlib
import errno
import fcntl
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from ..files import check_file, flush
from .shards import DATABASE, REPAIR, STORE, FeatureError

FORMAT = 2  # of the store; version 1 had manifests
WAIT = 60.0  # seconds to wait for another process's transaction
SYNCHRONOUS = "EXTRA"  # a committed transaction survives a loss of power, which may bring back its journal
_SCHEMA = f"""
CREATE TABLE entries (
    writer INTEGER NOT NULL, shard INTEGER NOT NULL, start INTEGER NOT NULL,  -- of its first row
    rows INTEGER NOT NULL,
    crc32 INTEGER NOT NULL,  -- of the bytes of the rows and their scales
    overview_columns INTEGER NOT NULL, overview_rows INTEGER NOT NULL,  -- patches
    grid_columns INTEGER NOT NULL, grid_rows INTEGER NOT NULL,  -- slices; 0: only the overview
    cell_columns INTEGER NOT NULL, cell_rows INTEGER NOT NULL,  -- patches in a slice
    sha256 BLOB NOT NULL UNIQUE,  -- of the image file
    PRIMARY KEY (writer, shard, start)
) WITHOUT ROWID;
CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    sha256 BLOB NOT NULL,  -- empty: not an image
    path BLOB NOT NULL,  -- UTF-8; as bytes, because a file name may be any bytes
    size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER,  -- when it was read, if known
    taken REAL,  -- when the photo was taken, in seconds since 1970 in local time, if known
    width INTEGER, height INTEGER  -- in pixels, upright, if known
);
CREATE INDEX files_by_path ON files (path);
CREATE INDEX files_by_sha256 ON files (sha256);
PRAGMA user_version = {FORMAT};
"""


class Database:
    """Connection to the database of a store, for any number of threads; their statements take turns.

    Args:
        folder: the store.
        connection: an open connection instead of the store's.

    Raises:
        FeatureError: if the database is missing or damaged.
        OSError: if it cannot be read.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection | None = None):
        self.path = folder / DATABASE
        self._threads = threading.RLock()
        self._lock_folder = None
        if connection is None:
            if not self.path.exists():
                raise FeatureError(f"{self.path}: is missing; {REPAIR.format(folder)}")
            try:
                check_file(self.path)
            except OSError as e:
                raise FeatureError(f"{self.path}: {e}") from e
            self._lock_folder = None if _has_locks(folder / STORE) else self.path.with_suffix(".db.lock")
            connection = _connect(self.path, "unix" if self._lock_folder is None else "unix-none")
        self._connection = connection
        weakref.finalize(self, connection.close)
        if self.rows("PRAGMA user_version") != [(FORMAT,)]:
            raise FeatureError(f"{self.path}: damaged; {REPAIR.format(folder)}")
        if not self.rows("SELECT 1 FROM pragma_table_info('files') WHERE name = 'height'"):
            self._add_sizes()

    def _add_sizes(self) -> None:
        """Add the columns that stores did not have at first; readers of a read-only one go without."""
        with contextlib.suppress(OSError), self.transaction() as db:
            for name in ("width", "height"):
                if not db.execute("SELECT 1 FROM pragma_table_info('files') WHERE name = ?", (name,)).fetchone():
                    db.execute(f"ALTER TABLE files ADD COLUMN {name} INTEGER")

    def rows(self, query: str, parameters: Sequence = ()) -> list[tuple]:
        """Run one query outside of a transaction, and return all rows.

        Raises:
            FeatureError: if the database is damaged.
            OSError: if it cannot be read.
        """
        with self._turn():
            return self._connection.execute(query, parameters).fetchall()

    def check_index(self, keys: Sequence[bytes]) -> None:
        """Check that the index of files by SHA-256 has all files of these images, which SQLite does not.

        Raises:
            FeatureError: if it lacks one.
        """
        known = "SELECT id FROM files INDEXED BY files_by_sha256 WHERE sha256 = f.sha256"
        for start in range(0, len(keys), 500):  # SQLite's limit on parameters is 999 in older versions
            chunk = keys[start : start + 500]
            among = f"sha256 IN ({', '.join('?' * len(chunk))})"
            if self.rows(f"SELECT 1 FROM files f NOT INDEXED WHERE {among} AND id NOT IN ({known}) LIMIT 1", chunk):
                raise FeatureError(f"{self.path}: damaged (its index lacks files); {REPAIR.format(self.path.parent)}")

    @contextlib.contextmanager
    def converting(self) -> Iterator[None]:
        """Raise a FeatureError for values of a wrong type or size, which a damaged database may have."""
        try:
            yield
        except FeatureError:
            raise
        except (ValueError, TypeError, AttributeError, OverflowError) as e:
            raise FeatureError(f"{self.path}: damaged ({e}); {REPAIR.format(self.path.parent)}") from e

    @contextlib.contextmanager
    def transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """Change the database, completely or, after any exception, not at all.

        Args:
            kind: "IMMEDIATE", or "DEFERRED" for changes of temporary tables, which need not wait for a writer.

        Raises:
            FeatureError: if the database is damaged.
            OSError: if it cannot be written.
        """
        with self._turn():
            try:
                if self._connection.in_transaction:  # Ctrl-C came before the rollback
                    self._connection.rollback()
                self._connection.execute(f"BEGIN {kind}")
                yield self._connection
                self._connection.commit()
            finally:
                if self._connection.in_transaction:
                    self._connection.rollback()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        with self._threads, _explained(self.path), _folder_lock(self._lock_folder):
            yield


def create_database(folder: Path, fill: Callable[[sqlite3.Connection], None] = lambda _: None) -> None:
    """Create the database of a store beside it and rename it into place; leftovers of a killed process are removed.

    Args:
        folder: the store, locked.
        fill: called with a connection to the new database.
    """
    for leftover in folder.glob(f"{DATABASE}.*partial*"):
        leftover.unlink()
    partial = folder / f"{DATABASE}.{os.getpid()}.partial"
    try:
        partial.touch()
        with _explained(partial), contextlib.closing(_connect(partial, "unix-none")) as connection:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")  # flushed as a whole, below
            fill_new(connection, fill)
        flush(partial)
        os.rename(partial, folder / DATABASE)
        flush(folder)
    finally:
        partial.unlink(missing_ok=True)


def fill_new(connection: sqlite3.Connection, fill: Callable[[sqlite3.Connection], None]) -> None:
    """Create the tables of an empty database, and fill them."""
    connection.executescript(_SCHEMA)
    connection.execute("BEGIN")
    fill(connection)
    connection.commit()


def connect_readonly(path: Path) -> sqlite3.Connection:
    """Connect to a database that may be damaged."""
    return _connect(path, "unix", "ro")


def in_memory() -> sqlite3.Connection:
    """Create an empty database in memory, for use by any thread."""
    return sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)


def _connect(path: Path, vfs: str, mode: str = "rw") -> sqlite3.Connection:
    uri = f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}&vfs={vfs}"
    with _explained(path):
        connection = sqlite3.connect(uri, timeout=WAIT, isolation_level=None, check_same_thread=False, uri=True)
        connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
        connection.execute("PRAGMA fullfsync = 1")  # macOS: fsync alone leaves the data in the drive's cache
        return connection


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as a FeatureError or OSError that names the file."""
    try:
        yield
    except sqlite3.Error as e:
        name = getattr(e, "sqlite_errorname", "")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR")):  # ERROR: a table is missing
            raise FeatureError(f"{path}: damaged ({e}); {REPAIR.format(path.parent)}") from e
        code = {"SQLITE_FULL": errno.ENOSPC, "SQLITE_BUSY": errno.EBUSY, "SQLITE_READONLY": errno.EROFS}
        raise OSError(code.get("_".join(name.split("_")[:2]), errno.EIO), str(e), str(path)) from e


def _has_locks(path: Path) -> bool:
    """Return whether the file system of an existing file has the POSIX locks that SQLite uses."""
    with path.open("rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as e:
            return e.errno in (errno.EAGAIN, errno.EACCES)
        return True


@contextlib.contextmanager
def _folder_lock(folder: Path | None) -> Iterator[None]:
    """Hold a lock that is a folder; one that the same process has held for `WAIT` seconds was left by a kill."""
    if folder is None:
        yield
        return
    seen, since = None, time.monotonic()
    while True:
        try:
            folder.mkdir()
            break
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                if (held := folder.stat().st_mtime_ns) != seen:
                    seen, since = held, time.monotonic()
            if time.monotonic() - since > WAIT:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            time.sleep(0.01)
        except OSError:  # read-only: nobody writes
            break
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()

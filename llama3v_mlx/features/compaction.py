"""Compaction of a library's index: the features of pictures deleted long ago are removed, and their space is freed.

Entries are moved to a new shard, some at a time, and a shard that has none left is removed. At any moment an entry is
in one place, and a process that has a removed shard open can still read it.
"""

import contextlib
import math
import time
from sqlite3 import Connection

from ..files import flush, list_folder
from .growing import claim_idle, places_of, remove_shard
from .shards import OPEN, SEALED, Shard
from .store import FeatureStore
from .writer import FeatureWriter

KEPT_DAYS = 30  # a picture may come back, with its disk for example
SHARE = 0.5  # of entries without a file, above which a compaction pays
_WANTED = "sha256 IN (SELECT sha256 FROM files) OR sha256 IN (SELECT sha256 FROM dead WHERE since > ?)"


def note_dead(db: Connection) -> None:
    """Record since when entries have had no file; call it also before files are removed."""
    table = "CREATE TABLE IF NOT EXISTS dead (sha256 BLOB PRIMARY KEY, since REAL) WITHOUT ROWID"
    db.execute(f"{table}  -- entries without a file, and when that was noted, in seconds since 1970")
    db.execute("DELETE FROM dead WHERE sha256 IN (SELECT sha256 FROM files)")
    no_file = "SELECT sha256, ? FROM entries WHERE sha256 NOT IN (SELECT sha256 FROM files)"
    db.execute(f"INSERT OR IGNORE INTO dead {no_file}", (time.time(),))


def compaction_is_due(db: Connection) -> bool:
    """Return True if most entries have had no file for a long time."""
    (old,) = db.execute("SELECT count(*) FROM dead WHERE since <= ?", (_long_ago(),)).fetchone()
    return old > 0 and old > SHARE * db.execute("SELECT count(*) FROM entries").fetchone()[0]


def compact(store: FeatureStore, all_dead: bool) -> int:
    """Remove the entries that have had no file for a long time, or all that have none.

    Shards that another process is adding to are left alone. What was done is kept after any interruption.

    Returns:
        The number of bytes freed.

    Raises:
        OSError: if there is no space for the entries that are kept, or the store cannot be written.
        FeatureError: if the store is damaged.
    """
    before = _size(store)
    since = math.inf if all_dead else _long_ago()
    with FeatureWriter(store) as writer, contextlib.ExitStack() as claims:
        with store.database.transaction() as db:
            note_dead(db)
        writer.start_shard()
        others = {number for number, _ in _places(store)} - {writer.number}
        idle = {writer.number} | claim_idle(store.folder, others, claims)
        for place in sorted(_places(store) - {writer.place}):
            if place[0] in idle:
                _compact_shard(store, writer, *place, since)
    return before - _size(store)


def _compact_shard(store: FeatureStore, writer: FeatureWriter, number: int, shard: int, since: float) -> None:
    of_shard = "FROM entries WHERE writer = ? AND shard = ?"
    place = number, shard
    wanted = f"SELECT total(rows) {of_shard} AND ({_WANTED})"
    rows = Shard(store.folder, *place, store.info.width, store.info.dtype).num_rows
    if store.database.rows(wanted, (*place, since)) == [(rows,)]:
        return
    for block in store.blocks(*place, _WANTED, (since,)):
        writer.copy(*block, moving=True)
    with store.database.transaction() as db:
        db.execute(f"DELETE {of_shard} AND NOT ({_WANTED})", (*place, since))
        db.execute("DELETE FROM dead WHERE sha256 NOT IN (SELECT sha256 FROM entries)")
        (is_used,) = db.execute(f"SELECT EXISTS (SELECT 1 {of_shard})", place).fetchone()
    if not is_used:  # otherwise a picture has come back just now
        remove_shard(store.folder, *place)
        flush(store.folder)


def _places(store: FeatureStore) -> set[tuple[int, int]]:
    """Numbers of the writers and shards of a store."""
    return places_of(path for kind in (SEALED, OPEN) for path in list_folder(store.folder, f"shard-*{kind}"))


def _long_ago() -> float:
    return time.time() - 86400 * KEPT_DAYS


def _size(store: FeatureStore) -> int:
    size = 0
    for path in list_folder(store.folder, "shard-*"):
        with contextlib.suppress(FileNotFoundError):  # another process seals or removes it
            size += path.stat().st_size
    return size

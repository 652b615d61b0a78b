"""Searchable index of a folder of pictures, which follows the folder: what is new, moved, changed and deleted.

The index is a store of pooled embeddings in float32, which a query multiplies as they are mapped. Its table of files
has a row for each picture, with an empty SHA-256 if the picture is broken. A file is read only if its path, size,
times or inode changed. Rows of files that are gone are removed last, so that an interrupted update is simply
continued by the next; until then they are no hits, because each hit is compared with its file.
"""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from sqlite3 import Connection

import numpy as np

from ..checkpoint import find_checkpoint
from ..files import true_path
from ..image import ImageError, ImageSource, expand
from ..pdf import PDF
from .compaction import compact, compaction_is_due, note_dead
from .encoder import ImageEncoder, TextEncoder, load_encoder
from .grammar import ALL, Filters
from .location import default_index, open_default
from .pipeline import Pipeline, Report
from .ranking import Ranking
from .sources import FileStat, Skipped, Source, decode_path, encode_path, file_of, file_stat, scan_folder
from .store import FeatureError, FeatureStore
from .writer import FeatureWriter

_CHUNK = 5000  # files in memory at once: a folder may have millions
_STAT = "size, mtime_ns, ctime_ns, inode"
_FACTS = "taken, width, height"
_SAME = " AND ".join(f"f.{name} = s.{name}" for name in ("path", *_STAT.split(", ")))
_TABLES = f"""
    CREATE TEMP TABLE IF NOT EXISTS scan (path BLOB PRIMARY KEY, {_STAT}) WITHOUT ROWID;  -- the folder now
    CREATE TEMP TABLE IF NOT EXISTS fresh (path BLOB PRIMARY KEY, {_STAT}) WITHOUT ROWID;  -- files to be read
    CREATE TEMP TABLE IF NOT EXISTS gone (id INTEGER PRIMARY KEY, path, sha256, {_STAT}, {_FACTS});  -- outdated rows
    DELETE FROM scan; DELETE FROM fresh; DELETE FROM gone;
"""
_FIND_FRESH = f"""INSERT INTO fresh SELECT * FROM scan s WHERE NOT EXISTS (SELECT 1 FROM files f WHERE {_SAME}
    AND (f.sha256 = X'' OR f.sha256 IN (SELECT sha256 FROM entries)))"""
_FIND_GONE = f"""INSERT INTO gone SELECT id, path, sha256, {_STAT}, {_FACTS} FROM files f
    WHERE NOT EXISTS (SELECT 1 FROM scan s WHERE {_SAME})"""
_LIST_FRESH = f"SELECT path, {_STAT} FROM fresh WHERE path > ? ORDER BY path LIMIT ?"
# Files whose folder was renamed, or which kept their times otherwise, are known without being read.
_FIND_RENAMED = f"""SELECT gone.sha256, fresh.path, {_STAT}, {_FACTS} FROM fresh JOIN gone USING ({_STAT})
    WHERE gone.sha256 IN (SELECT sha256 FROM entries) AND gone.path NOT IN (SELECT path FROM scan)
    GROUP BY fresh.path"""


@dataclass
class Changes:
    """Numbers of files that an update found; files that were only touched count as none of these."""

    added: int = 0
    moved: int = 0
    changed: int = 0
    deleted: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # new broken pictures, and why
    embedded: int = 0  # images that the tower has seen
    skipped: Skipped = field(default_factory=Skipped)

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ("added", "moved", "changed", "deleted")}
        counts["broken"] = len(self.failed)
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "no changes"


@dataclass(frozen=True)
class Match:
    """Picture that a search found; its file was unchanged just then."""

    sha256: bytes
    path: str
    cosine: float


class Library:
    """A folder of pictures and its index; `update` and `rank` may run in different threads.

    Args:
        folder: the folder.
        model: folder or Hub repository of a SigLIP.
        index: folder of the index; by default one in the cache, by folder and model.
        encoder: the model's encoder, if it is loaded already.

    Raises:
        ValueError: if the folder does not exist.
        FeatureError: if the index is that of another model, or damaged.
    """

    def __init__(
        self, folder: str | Path, model: str, index: str | Path | None = None, encoder: ImageEncoder | None = None
    ):
        self.folder = true_path(folder)
        if not os.path.isdir(self.folder):
            raise ValueError(f"{folder}: no such folder")
        if encoder is None:
            encoder = load_encoder(model, "pooled")
            encoder.all_cores = True
        self.encoder = encoder
        self.index = Path(index) if index else default_index(self.folder, model)
        info = self.encoder.store_info("float32")
        self.store = FeatureStore.create(self.index, info) if index else open_default(self.index, self.folder, info)
        self.ranking = Ranking(self.store)
        self._checkpoint = find_checkpoint(model)
        self._texts: TextEncoder | None = None
        self._updating, self._ranking = threading.Lock(), threading.Lock()

    def texts(self) -> TextEncoder:
        """Return the encoder of texts."""
        self._texts = self._texts or TextEncoder(self._checkpoint, self.encoder.model)
        return self._texts

    def counts(self) -> tuple[int, int]:
        """Return the numbers of pictures and of broken ones, as of the last update."""
        query = "SELECT count(DISTINCT path) FROM files WHERE sha256 = X'' IS ?"
        return tuple(self.store.database.rows(query, (broken,))[0][0] for broken in (0, 1))

    def update(
        self,
        progress: Callable[[Report, int], None] = lambda report, total: None,
        rehash: bool = False,
        batch_size: int = 8,
        workers: int = 4,
    ) -> Changes:
        """Bring the index up to date with the folder: read what is new or changed, and embed new images.

        Files in a subfolder that cannot be listed are kept. Interrupted at any moment, nothing that was embedded is
        lost.

        Args:
            progress: called with a report of the files read, and the number of files to be read.
            rehash: read all files.
            batch_size: images embedded at once.
            workers: number of decoding threads.

        Raises:
            ValueError: if the folder no longer exists, or has no pictures any more, like that of a disk not mounted.
            OSError: if the index cannot be written, for example on a full disk.
        """
        if not os.path.isdir(self.folder):
            raise ValueError(f"{self.folder}: no such folder")
        with self._updating:
            return self._update(progress, rehash, batch_size, workers)

    def _update(self, progress: Callable[[Report, int], None], rehash: bool, batch_size: int, workers: int) -> Changes:
        changes, database = Changes(), self.store.database
        self._scan(changes.skipped)
        if not database.rows("SELECT 1 FROM scan LIMIT 1"):
            for name, reason in changes.skipped.denied:
                raise ValueError(f"{name}: cannot be listed ({reason})")
            if any(self.counts()) and not changes.skipped.remote:
                raise ValueError(
                    f"{self.folder}: has no pictures any more; mount its disk, or if it has none, delete the index "
                    f"{self.index}"
                )
        with database.transaction() as db:
            if rehash:
                db.execute("UPDATE files SET size = -1")
            renamed = self._compare(db, changes.skipped)
        ((total,),) = database.rows("SELECT count(*) FROM fresh")
        if total:
            unreadable: set[str] = set()
            sources = _sources(self._fresh(), unreadable)
            with FeatureWriter(self.store) as writer:
                read = Pipeline(self.encoder, writer, batch_size, workers, lambda report: progress(report, total))
                report = read.run(sources)
                for path, _ in report.failed:
                    if path not in unreadable:  # a failing disk is no property of the picture
                        (stat,) = database.rows(f"SELECT {_STAT} FROM fresh WHERE path = ?", (encode_path(path),))
                        writer.name(b"", path, stat)
            changes.failed, changes.embedded = report.failed, report.new
        with database.transaction() as db:
            self._count(db, changes, renamed)
            is_due = False
            if db.execute("SELECT 1 FROM gone LIMIT 1").fetchone():
                note_dead(db)  # of pictures that came back, which may go again here
                db.execute("DELETE FROM files WHERE id IN (SELECT id FROM gone)")
                note_dead(db)
                is_due = compaction_is_due(db)
        if is_due:
            # Without space, or if the index is damaged, the pictures are found all the same.
            with contextlib.suppress(OSError, FeatureError):
                compact(self.store, all_dead=False)
        return changes

    def compact(self) -> int:
        """Remove the features of all pictures that are gone, and return the number of bytes freed; see `compact`."""
        with self._updating:
            return compact(self.store, all_dead=True)

    def _scan(self, skipped: Skipped) -> None:
        """Fill the table of pictures that the folder has now; the database is not kept waiting for the folder."""
        with self.store.database.transaction("DEFERRED") as db:
            for statement in _TABLES.split(";"):
                db.execute(statement)
        found = ((path, file_stat(stat)) for path, stat in scan_folder(Path(self.folder), skipped))
        pictures = ((encode_path(name), *stat) for path, stat in found for name in self._names_of(path, stat))
        while chunk := list(islice(pictures, _CHUNK)):
            with self.store.database.transaction("DEFERRED") as db:
                db.executemany("INSERT OR REPLACE INTO scan VALUES (?, ?, ?, ?, ?)", chunk)

    def _names_of(self, path: str, stat: FileStat) -> list[str]:
        """Return the path of a picture, or the names of a PDF's pages; one that was read before is not opened."""
        if not path.lower().endswith(PDF):
            return [path]
        paths = "(path = ? OR path >= ? AND path < ?)"
        query = f"SELECT DISTINCT path FROM files WHERE {paths} AND ({_STAT}) = (?, ?, ?, ?)"
        names = [encode_path(path), encode_path(path + "#"), encode_path(path + "$")]  # $ follows # in ASCII
        known = [decode_path(name) for (name,) in self.store.database.rows(query, (*names, *stat))]
        return known or list(_pages(path)) or [path]

    def _compare(self, db: Connection, skipped: Skipped) -> int:
        """Find new files and outdated rows; return the number of files that were renamed, which are neither."""
        db.execute(_FIND_FRESH)
        db.execute(_FIND_GONE)
        for name, _ in skipped.denied:
            prefix = encode_path(name)
            db.execute("DELETE FROM gone WHERE path >= ? AND path < ?", (prefix + b"/", prefix + b"0"))
        for table in ("fresh", "gone"):  # reading a file that is in iCloud only would download it
            db.executemany(f"DELETE FROM {table} WHERE path = ?", [(encode_path(path),) for path in skipped.remote])
        renamed = db.execute(_FIND_RENAMED).fetchall()
        db.executemany(
            f"INSERT INTO files (sha256, path, {_STAT}, {_FACTS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", renamed
        )
        db.executemany("DELETE FROM fresh WHERE path = ?", [(row[1],) for row in renamed])
        old = [(row[0], *row[2:6]) for row in renamed]
        same = "sha256 = ? AND size = ? AND mtime_ns = ? AND ctime_ns = ? AND inode = ?"
        db.executemany(f"DELETE FROM files WHERE id IN (SELECT id FROM gone WHERE {same})", old)
        db.executemany(f"DELETE FROM gone WHERE {same}", old)
        return len(renamed)

    def _fresh(self) -> Iterator[tuple[str, FileStat]]:
        """Yield the path and stat of files to be read."""
        last = b""
        while found := self.store.database.rows(_LIST_FRESH, (last, _CHUNK)):
            for path, *stat in found:
                yield decode_path(path), tuple(stat)
            last = found[-1][0]

    def _count(self, db: Connection, changes: Changes, renamed: int) -> None:
        """Classify what was read."""
        gone = dict(db.execute("SELECT path, sha256 FROM gone"))
        current = f"SELECT s.path, f.sha256 FROM fresh s JOIN files f ON {_SAME} WHERE f.sha256 != X''"
        there = {path for (path,) in db.execute("SELECT path FROM scan JOIN gone USING (path)")}
        left = Counter(sha256 for path, sha256 in gone.items() if path not in there)
        changes.moved = renamed
        for path, sha256 in db.execute(current):
            if path in gone:
                changes.changed += gone[path] != sha256
            elif left[sha256]:
                left[sha256] -= 1
                changes.moved += 1
            else:
                changes.added += 1
        changes.deleted = left.total()

    def rank(self, query: np.ndarray, top: int, filters: Filters = ALL) -> list[Match]:
        """Return at most `top` pictures with the highest cosine to a query (width,), best first.

        Only files that are on the disk and unchanged since they were read are returned, and of equal files the first.
        """
        matches, unnamed = [], []
        with self._ranking:
            self.ranking.refresh()
            for sha256, cosine in self.ranking.best(query, self._among(filters) if filters else None):
                path = next(self.current(sha256, filters), None)
                if path is None:
                    unnamed.append(sha256)
                    continue
                matches.append(Match(sha256, path, cosine))
                if len(matches) == top:
                    break
        self.store.database.check_index(unnamed)
        return matches

    def current(self, sha256: bytes, filters: Filters = ALL) -> Iterator[str]:
        """Yield the paths of an image that are unchanged on the disk."""
        condition, parameters = filters.sql()
        query = f"SELECT path, {_STAT} FROM files WHERE sha256 = ? AND {condition} ORDER BY id"
        for path, *stat in self.store.database.rows(query, (sha256, *parameters)):
            path = decode_path(path)
            try:
                if file_stat(os.stat(file_of(path))) == tuple(stat):
                    yield path
            except (OSError, ValueError):
                continue

    def duplicates(self, least: float, filters: Filters = ALL) -> list[list[str]]:
        """Return groups of files whose pictures are nearly equal, the largest groups first."""
        with self._ranking:
            self.ranking.refresh()
            groups = self.ranking.near_duplicates(least)
        grouped = set().union(*groups)
        copies = self.store.database.rows("SELECT sha256 FROM files GROUP BY sha256 HAVING count(DISTINCT path) > 1")
        groups += [[sha256] for (sha256,) in copies if sha256 not in grouped and sha256]
        found = [sorted({path for key in group for path in self.current(key, filters)}) for group in groups]
        return sorted((paths for paths in found if len(paths) > 1), key=lambda paths: (-len(paths), paths))

    def _among(self, filters: Filters) -> set[bytes]:
        """Return the SHA-256 of images with a file that passes the filters."""
        condition, parameters = filters.sql()
        query = f"SELECT DISTINCT sha256 FROM files WHERE {condition}"
        return {sha256 for (sha256,) in self.store.database.rows(query, parameters)}


def _sources(fresh: Iterator[tuple[str, FileStat]], unreadable: set[str]) -> Iterator[Source]:
    """Yield the pictures to be read; those that cannot be are added to `unreadable`."""
    pdf, pages = "", {}
    for name, stat in fresh:
        if name.lower().endswith(PDF) or file_of(name) != name:
            if file_of(name) != pdf:
                pdf, pages = file_of(name), _pages(file_of(name))
            yield Source(name, partial(pages.get, name, name), stat)
        else:
            yield Source(name, partial(_read, name, unreadable), stat)


def _read(path: str, unreadable: set[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        unreadable.add(path)
        raise


def _pages(path: str) -> dict[str, ImageSource]:
    """Return the pages of a PDF by name; none if it is damaged."""
    try:
        return {str(page): page for page in expand(path)}
    except ImageError:
        return {}

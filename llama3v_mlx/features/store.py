"""The store of image features on disk: append, look up, stream, survive.

A store is a folder of safetensors shards and append-only manifests, made with one model, kind and preprocessing: its
fingerprint. An entry is found by the SHA-256 of its image file, whatever the file is called. Every writing process has
a number, and a manifest, a list of file names and shards of its own, so that many can fill one store.
"""

import itertools
import json
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoint import read_json
from ..files import list_folder, write_beside
from .growing import WriterFiles, take_manifest
from .repair import Verdict, check_writer
from .shards import (
    LOCK,
    RECORD,
    REPAIR,
    FeatureError,
    Shard,
    checksums,
    from_stored,
    read_names,
    store_lock,
    to_stored,
)
from .sources import FileStat

STORE = "store.json"
SHARD_BYTES = 1 << 30
_OPEN_SHARDS = 32  # mapped at once: a Mac allows a process 256 open files


@dataclass(frozen=True)
class StoreInfo:
    """What all entries of a store have in common."""

    model: str  # as it was named; for people
    kind: str  # "pooled", "patch" or "visual-tokens"
    fingerprint: str  # of weights, compute dtype and preprocessing, in hex
    width: int  # values per row
    dtype: str  # of rows: a key of `shards.DTYPES`; "int8" rows have a float32 scale each
    compute_dtype: str = "float32"  # of the tower that made them
    draft: bool = False  # whether large JPEGs were decoded at a smaller scale
    version: int = 1


@dataclass(frozen=True)
class Features:
    """The features of one image, and how its rows belong to its tiles."""

    rows: mx.array  # (n, width): tile after tile, the overview first
    overview: tuple[int, int]  # patches across and down
    grid: tuple[int, int] | None = None  # (columns, rows) of slices; None: the overview is all
    cell: tuple[int, int] | None = None  # patches across and down of a slice


class FeatureStore:
    """A store opened for reading. Entries that other processes add are seen after `refresh`.

    An entry is compared with its CRC-32 when this object reads it for the first time: a damaged one is a FeatureError,
    never wrong features. By `matrix` that adds about a third to the CPU time of the first reading, and nothing later.

    Raises:
        FeatureError: if the folder is not a store, or is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / STORE).is_file():
            raise FeatureError(f"{folder}: not a feature store (it has no {STORE}); llama3v embed makes one")
        try:
            self.info = StoreInfo(**read_json(self.folder / STORE))
        except TypeError:
            raise FeatureError(f"{self.folder / STORE}: written by another version of this package") from None
        self._shards: OrderedDict[tuple[int, int], Shard] = OrderedDict()
        self._noted: set[Path] = set()  # lists of names whose damage was named
        self._settled = False  # whether the last refresh came to its end
        self.refresh()

    @classmethod
    def create(cls, folder: str | Path, info: StoreInfo) -> "FeatureStore":
        """The store of `folder`, made if it is not there.

        Raises:
            FeatureError: if the folder holds other things, or a store of another model, kind, dtype or preprocessing.
        """
        folder = Path(folder)
        if not (folder / STORE).is_file():
            # Another process may be making it just now, and have come as far as the lock or half of STORE.
            found = [folder] if folder.is_file() else list_folder(folder)
            if any(not path.name.startswith((LOCK, STORE)) for path in found):
                raise FeatureError(f"{folder}: is not a feature store and not empty; give another folder")
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOCK).open("wb") as lock, store_lock(lock):
                if not (folder / STORE).is_file():
                    write_beside(folder / STORE, (json.dumps(asdict(info), indent=2) + "\n").encode())
        store = cls(folder)
        for name in ("kind", "fingerprint", "width", "dtype"):
            old, new = getattr(store.info, name), getattr(info, name)
            if old != new and name == "fingerprint":
                raise FeatureError(
                    f"{folder}: was made with other weights, compute dtype or preprocessing ({store.info.model}) than "
                    f"{info.model} has now; give another folder"
                )
            if old != new:
                raise FeatureError(f"{folder}: holds {name} {old}, not {new}; give another folder")
        return store

    def refresh(self) -> None:
        """Read what the manifests have gained; all of them, if the last time was interrupted."""
        if not self._settled:
            # Joined when they are next needed: joining them at every batch would cost more the larger the store is.
            self._chunks = [(np.zeros(0, RECORD), np.zeros(0, np.uint16), np.zeros(0, bool))]
            self._count = 0
            self._places: dict[bytes, int] = {}
            self._read: dict[int, int] = {}  # bytes of each writer's manifest that were read
        self._settled = False
        for path in sorted(self.folder.glob("manifest-*.bin")):
            writer = int(path.stem.rpartition("-")[2])
            start = self._read.get(writer, 0)
            count = (path.stat().st_size - start) // RECORD.itemsize  # half a record is one being written
            if count <= 0:
                continue
            records = np.fromfile(path, RECORD, count, offset=start)
            count = len(records)  # fewer, where a full disk has made a writer take some back
            self._chunks.append((records, np.full(count, writer, np.uint16), np.zeros(count, bool)))
            for i, sha256 in enumerate(records["sha256"].tolist(), self._count):
                self._places.setdefault(sha256, i)
            self._count += count
            self._read[writer] = start + count * RECORD.itemsize
        self._settled = True

    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All records, the writer of each, and whether its rows were compared with their checksum."""
        if len(self._chunks) > 1:
            self._chunks = [tuple(np.concatenate(column) for column in zip(*self._chunks, strict=True))]
        return self._chunks[0]

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, sha256: bytes) -> bool:
        return sha256 in self._places

    def __iter__(self) -> Iterator[tuple[bytes, Features]]:
        """(SHA-256, features) of every entry, in the order of the shards."""
        for sha256, i in self._in_order():
            yield sha256, self._features(i)

    @property
    def num_rows(self) -> int:
        return sum(count for _, count in self.sizes())

    def sizes(self) -> list[tuple[bytes, int]]:
        """(SHA-256, number of rows) of every entry, in the order of iteration."""
        rows = self._table()[0]["rows"].tolist()
        return [(sha256, rows[i]) for sha256, i in self._in_order()]

    def get(self, sha256: bytes) -> Features | None:
        """The features of the image file with this SHA-256, or None."""
        i = self._places.get(sha256)
        return None if i is None else self._features(i)

    def grid(self, sha256: bytes) -> tuple[int, int] | None:
        """The (columns, rows) of slices of an image that is there, without reading its features."""
        grid = tuple(self._table()[0]["grid"][self._places[sha256]].tolist())
        return grid if grid[0] else None

    def matrix(self) -> Iterator[np.ndarray]:
        """All rows in the order of iteration, float32 (n, width): as many at a time as lie side by side on disk."""
        order = np.array([i for _, i in self._in_order()], np.int64)
        records, writers, _ = (column[order] for column in self._table())
        ends = records["start"] + records["rows"]
        apart = (np.diff(writers) != 0) | (np.diff(records["shard"]) != 0) | (records["start"][1:] != ends[:-1])
        starts = np.r_[0, np.flatnonzero(apart) + 1, len(order)] if len(order) else [0]
        for a, b in itertools.pairwise(starts):
            yield from_stored(*self._stored(order[a:b]), self.info.dtype, exact=False)

    def names(self) -> Iterator[tuple[bytes, str]]:
        """(SHA-256, file name) as they were added; an image may have several names, and the same one repeatedly.

        Damaged lines are skipped, and named on stderr.
        """
        return ((sha256, path) for sha256, path, _ in self.files())

    def files(self) -> Iterator[tuple[bytes, str, FileStat | None]]:
        """(SHA-256, file name, stat of the file when it was read, if that was noted), as they were added."""
        for path in sorted(self.folder.glob("names-*.jsonl")):
            damaged = []
            for number, _, entry in read_names(path):
                if entry:
                    yield entry
                else:
                    damaged.append(str(number))
            if damaged and path not in self._noted:
                self._noted.add(path)
                where = ", ".join(damaged[:10]) + (" and more" if len(damaged) > 10 else "")
                print(f"note: {path}:{where}: damaged, skipped; {REPAIR.format(self.folder)}", file=sys.stderr)

    def _in_order(self) -> Iterator[tuple[bytes, int]]:
        return ((sha256, i) for sha256, i in sorted(self._places.items(), key=lambda item: item[1]))

    def _features(self, i: int) -> Features:
        record = self._table()[0][i]
        rows = from_stored(*self._stored(slice(i, i + 1)), self.info.dtype, exact=True)
        grid, cell = tuple(record["grid"].tolist()), tuple(record["cell"].tolist())
        return Features(rows, tuple(record["overview"].tolist()), grid if grid[0] else None, cell if grid[0] else None)

    def _stored(self, entries: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Values and scales of entries that lie side by side, compared with their checksums the first time."""
        table, writers, checked = self._table()
        records = table[entries]
        first, last = records[0], records[-1]
        start, end = int(first["start"]), int(last["start"]) + int(last["rows"])
        shard = self._shard(int(writers[entries][0]), int(first["shard"]), end)
        values, scales = shard.read(start, end - start)
        if not checked[entries].all():
            shard.check(records, values, scales)
            checked[entries] = True
        return values, scales

    def _shard(self, writer: int, number: int, num_rows: int) -> Shard:
        key = (writer, number)
        shard = self._shards.pop(key, None)
        if shard is None or shard.num_rows < num_rows:  # it may have grown since
            shard = Shard(self.folder, *key, self.info.width, self.info.dtype)
        if not shard.growing:  # one that grows is looked at anew each time
            self._shards[key] = shard
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard


class FeatureWriter:
    """A store opened for writing by one of any number of processes; use it in a `with` statement.

    What `add` has returned from is kept, whatever becomes of the process: only the machine losing power can take
    entries that were added since the last full shard, and nothing half-written is ever taken for whole.
    """

    def __init__(self, store: FeatureStore, shard_bytes: int = SHARD_BYTES):
        self.store = store
        self._known_names: set[int] | None = None  # hashes: there may be millions
        self._files = WriterFiles(store.folder, store.info.width, store.info.dtype, shard_bytes)

    @property
    def number(self) -> int:
        return self._files.number

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def add(self, entries: Sequence[tuple[bytes, Features]]) -> int:
        """Store features by the SHA-256 of their image files; those that are there already are left as they are.

        All of them are stored, or none: also when the disk is full, or at Ctrl-C at any moment.

        Returns:
            how many were new.

        Raises:
            OSError: if the disk is full, say.
            FeatureError: if rows are not finite numbers, or of another width.
        """
        info = self.store.info
        with store_lock(self._files.lock):
            self.store.refresh()
            fresh = {sha256: features for sha256, features in entries if sha256 not in self.store}
            prepared = [(key, f, *to_stored(f.rows, info.width, info.dtype)) for key, f in fresh.items()]
            if not prepared:
                return 0
            records = np.zeros(len(prepared), RECORD)
            for record, (sha256, features, values, scales) in zip(records, prepared, strict=True):
                record["sha256"], record["rows"] = sha256, len(values)
                record["crc32"] = checksums([len(values)], values, scales)[0]
                record["overview"] = features.overview
                if features.grid:
                    record["grid"], record["cell"] = features.grid, features.cell
            self._files.append(records, [p[2] for p in prepared], [p[3] for p in prepared])
            self.store.refresh()
        return len(prepared)

    def name(self, sha256: bytes, path: str, stat: FileStat | None = None) -> None:
        """Note that the image with this SHA-256 is called `path`; with `stat`, of the file at that resolved path."""
        known = set(map(hash, self.store.files())) if self._known_names is None else self._known_names
        if hash((sha256, path, stat)) not in known:
            self._known_names = None  # read again, should this be interrupted
            line = {"sha256": sha256.hex(), "path": path} | ({"stat": stat} if stat else {})
            self._files.name(json.dumps(line))
            known.add(hash((sha256, path, stat)))
        self._known_names = known

    def close(self) -> None:
        self._files.close()


def verify(folder: str | Path) -> Verdict:
    """Check every entry of a store: that it is there, is what was written, and is finite; then repair the store.

    Entries that fail are taken out of their manifest, and damaged lines out of the names; entries of sealed shards
    that a manifest has lost are put back.

    Raises:
        FeatureError: if the folder is not a store, or a process is writing to it.
    """
    info = FeatureStore(folder).info
    total = Verdict()
    names = (path.name for path in list_folder(Path(folder)))
    paths = map(re.compile(r"(?:manifest|names|shard)-(\d+)\b").match, names)
    for writer in sorted({int(match[1]) for match in paths if match}):
        manifest = take_manifest(Path(folder), writer)
        if manifest is None:
            raise FeatureError(f"{folder}: a process is writing to it; verify when it is done")
        with manifest:
            found = check_writer(Path(folder), writer, info.width, info.dtype)
        total.good += found.good
        total.lost += found.lost
        total.restored += found.restored
    return total

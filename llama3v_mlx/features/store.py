"""The store of image features on disk: append, look up, stream, survive.

A store is a folder of safetensors shards and append-only manifests, made with one model, kind and preprocessing: its
fingerprint. An entry is found by the SHA-256 of its image file, whatever the file is called. Every writing process has
a number, and a manifest, a list of file names and shards of its own, so that many can fill one store.
"""

import itertools
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoint import read_json
from ..files import list_folder, sync
from .shards import (
    LOCK,
    OPEN,
    RECORD,
    SEALED,
    FeatureError,
    OpenShard,
    Shard,
    Verdict,
    check_writer,
    ends_a_line,
    from_stored,
    shard_path,
    store_lock,
    take_manifest,
    to_stored,
    write_beside,
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
        # Joined when they are next needed: joining them at every batch would cost more the larger the store is.
        self._chunks = [(np.zeros(0, RECORD), np.zeros(0, np.uint16))]
        self._count = 0
        self._places: dict[bytes, int] = {}
        self._read: dict[int, int] = {}  # bytes of each writer's manifest that were read
        self._shards: OrderedDict[tuple[int, int], Shard] = OrderedDict()
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
            with store_lock(folder):
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
        """Read what the manifests have gained."""
        for path in sorted(self.folder.glob("manifest-*.bin")):
            writer = int(path.stem.rpartition("-")[2])
            start = self._read.get(writer, 0)
            count = (path.stat().st_size - start) // RECORD.itemsize  # half a record is one being written
            if count <= 0:
                continue
            records = np.fromfile(path, RECORD, count, offset=start)
            for i, sha256 in enumerate(records["sha256"].tolist(), self._count):
                self._places.setdefault(sha256, i)
            self._chunks.append((records, np.full(count, writer, np.uint16)))
            self._count += count
            self._read[writer] = start + count * RECORD.itemsize

    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """All records, and the writer of each."""
        if len(self._chunks) > 1:
            records, writers = zip(*self._chunks, strict=True)
            self._chunks = [(np.concatenate(records), np.concatenate(writers))]
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
        records, writers = (column[order] for column in self._table())
        ends = records["start"] + records["rows"]
        apart = (np.diff(writers) != 0) | (np.diff(records["shard"]) != 0) | (records["start"][1:] != ends[:-1])
        starts = np.r_[0, np.flatnonzero(apart) + 1, len(order)] if len(order) else [0]
        for a, b in itertools.pairwise(starts):
            first, rows = int(records["start"][a]), int(ends[b - 1] - records["start"][a])
            stored = self._shard(int(writers[a]), int(records["shard"][a])).read(first, rows)
            yield from_stored(*stored, self.info.dtype, exact=False)

    def names(self) -> Iterator[tuple[bytes, str]]:
        """(SHA-256, file name) as they were added; an image may have several names, and the same one repeatedly."""
        return ((sha256, path) for sha256, path, _ in self.files())

    def files(self) -> Iterator[tuple[bytes, str, FileStat | None]]:
        """(SHA-256, file name, what the file was when it was read, if that was noted), as they were added."""
        for path in sorted(self.folder.glob("names-*.jsonl")):
            with path.open(encoding="utf-8") as file:
                for line in file:
                    if line.endswith("\n"):  # else cut short by a kill
                        entry = json.loads(line)
                        stat = tuple(entry["stat"]) if "stat" in entry else None
                        yield bytes.fromhex(entry["sha256"]), entry["path"], stat

    def _in_order(self) -> Iterator[tuple[bytes, int]]:
        return ((sha256, i) for sha256, i in sorted(self._places.items(), key=lambda item: item[1]))

    def _features(self, i: int) -> Features:
        record, writer = (column[i] for column in self._table())
        stored = self._shard(int(writer), int(record["shard"])).read(int(record["start"]), int(record["rows"]))
        rows = from_stored(*stored, self.info.dtype, exact=True)
        grid, cell = tuple(record["grid"].tolist()), tuple(record["cell"].tolist())
        return Features(rows, tuple(record["overview"].tolist()), grid if grid[0] else None, cell if grid[0] else None)

    def _shard(self, writer: int, number: int) -> Shard:
        key = (writer, number)
        shard = self._shards.pop(key, None) or Shard(self.folder, *key, self.info.width, self.info.dtype)
        if shard.path.suffix == SEALED:  # one that grows is looked at anew each time
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
        self._shard_bytes = shard_bytes
        self._known_names: set[int] | None = None  # hashes: there may be millions
        self._shard: OpenShard | None = None
        for self.number in range(65536):
            self._manifest = take_manifest(store.folder, self.number)
            if self._manifest:
                break
        self._names = (store.folder / f"names-{self.number:03}.jsonl").open("a", encoding="utf-8")
        if not ends_a_line(Path(self._names.name)):
            self._names.write("\n")
        self._recover()

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def add(self, entries: Sequence[tuple[bytes, Features]]) -> int:
        """Store features by the SHA-256 of their image files; those that are there already are left as they are.

        Returns:
            how many were new.

        Raises:
            OSError: if the disk is full, say; the store is then as it was before.
            FeatureError: if rows are not finite numbers, or of another width.
        """
        info = self.store.info
        with store_lock(self.store.folder):
            self.store.refresh()
            fresh = {sha256: features for sha256, features in entries if sha256 not in self.store}
            prepared = [(key, f, *to_stored(f.rows, info.width, info.dtype)) for key, f in fresh.items()]
            if not prepared:
                return 0
            self._shard = self._shard or self._open_shard(np.zeros(0, RECORD))
            records = np.zeros(len(prepared), RECORD)
            start = self._shard.num_rows
            for record, (sha256, features, values, scales) in zip(records, prepared, strict=True):
                record["sha256"], record["shard"], record["start"] = sha256, self._shard.number, start
                record["rows"], record["crc32"] = len(values), zlib.crc32(values.tobytes() + scales.tobytes())
                record["overview"] = features.overview
                if features.grid:
                    record["grid"], record["cell"] = features.grid, features.cell
                start += len(values)
            self._shard.append([p[2] for p in prepared], [p[3] for p in prepared])
            end = os.fstat(self._manifest.fileno()).st_size
            try:
                self._manifest.write(records.tobytes())
            except OSError:
                self._shard.drop_last(sum(len(p[2]) for p in prepared))
                os.truncate(self._manifest.name, end)
                raise
            self._shard.records.append(records)
            self.store.refresh()
        if self._shard.num_bytes >= self._shard_bytes:
            self._seal()
        return len(prepared)

    def name(self, sha256: bytes, path: str, stat: FileStat | None = None) -> None:
        """Note that the image with this SHA-256 is called `path`; with `stat`, of the file at that resolved path."""
        if self._known_names is None:
            self._known_names = set(map(hash, self.store.files()))
        if hash((sha256, path, stat)) not in self._known_names:
            self._known_names.add(hash((sha256, path, stat)))
            line = {"sha256": sha256.hex(), "path": path} | ({"stat": stat} if stat else {})
            self._names.write(json.dumps(line) + "\n")
            self._names.flush()

    def close(self) -> None:
        if self._shard:
            self._seal()
        self._names.close()
        self._manifest.close()

    def _seal(self) -> None:
        sync(self._manifest.fileno())
        self._shard.seal()
        self._next, self._shard = self._shard.number + 1, None

    def _open_shard(self, records: np.ndarray) -> OpenShard:
        info = self.store.info
        return OpenShard(self.store.folder, self.number, self._next, info.width, info.dtype, records)

    def _recover(self) -> None:
        """Go on where this writer's last process ended, in whatever way."""
        path = Path(self._manifest.name)
        records = np.fromfile(path, RECORD, path.stat().st_size // RECORD.itemsize)
        sealed = self.store.folder.glob(f"shard-{self.number:03}-*{SEALED}")
        self._next = 1 + max((int(p.stem.rpartition("-")[2]) for p in sealed), default=-1)
        mine = records["shard"] == self._next
        count = len(records)
        if mine.any() or shard_path(self.store.folder, self.number, self._next).with_suffix(OPEN).exists():
            self._shard = self._open_shard(records[mine])
            # They are the manifest's last, and those whose rows a loss of power has taken go with them.
            count -= int(mine.sum()) - len(self._shard.records[0])
        os.truncate(path, count * RECORD.itemsize)


def verify(folder: str | Path) -> Verdict:
    """Check every entry of a store: that it is there, is what was written, and is finite; then repair the manifests.

    Entries that fail are taken out of their manifest; those of whole shards that a manifest has lost are put back.

    Raises:
        FeatureError: if the folder is not a store, or a process is writing to it.
    """
    info = FeatureStore(folder).info
    total = Verdict()
    files = list_folder(Path(folder), "*-[0-9]*")
    writers = {int(path.stem.split("-")[1]) for path in files if path.suffix != ".jsonl"}
    for writer in sorted(writers):
        manifest = take_manifest(Path(folder), writer)
        if manifest is None:
            raise FeatureError(f"{folder}: a process is writing to it; verify when it is done")
        with manifest:
            found = check_writer(Path(folder), writer, info.width, info.dtype)
        total.good += found.good
        total.lost += found.lost
        total.restored += found.restored
    return total

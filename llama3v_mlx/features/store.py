"""Crash-safe store of image features on disk: append, look up, stream.

A store is a folder of safetensors shards and append-only manifests, made with one model, kind and preprocessing: its
fingerprint. The key of an entry is the SHA-256 of its image file, independent of the file's name. Every writing process
has a number and its own manifest, list of file names and shards, so that many processes can fill one store.
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
_OPEN_SHARDS = 32  # shards mapped at once: macOS allows 256 open files per process


@dataclass(frozen=True)
class StoreInfo:
    """Metadata common to all entries of a store."""

    model: str  # name of the checkpoint, for display
    kind: str  # "pooled", "patch" or "visual-tokens"
    fingerprint: str  # hex SHA-256 of weights, compute dtype and preprocessing
    width: int  # values per row
    dtype: str  # dtype of rows, a key of `shards.DTYPES`; "int8" rows have a float32 scale each
    compute_dtype: str = "float32"  # compute dtype of the tower
    draft: bool = False  # whether large JPEGs were decoded at a smaller scale
    version: int = 1


@dataclass(frozen=True)
class Features:
    """Features of one image, and their arrangement in tiles."""

    rows: mx.array  # (n, width): tile after tile, the overview first
    overview: tuple[int, int]  # (columns, rows) of patches in the overview
    grid: tuple[int, int] | None = None  # (columns, rows) of slices; None: only the overview
    cell: tuple[int, int] | None = None  # (columns, rows) of patches in a slice


class FeatureStore:
    """A store opened for reading. Entries added by other processes are visible after `refresh`.

    The CRC-32 of an entry is checked when this object first reads it: a damaged entry is a FeatureError, never wrong
    features. With `matrix`, this adds about a third to the CPU time of the first pass, and nothing to later ones.

    Raises:
        FeatureError: if the folder is not a store, or is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / STORE).is_file():
            raise FeatureError(f"{folder}: not a feature store (it has no {STORE}); llama3v embed creates one")
        try:
            self.info = StoreInfo(**read_json(self.folder / STORE))
        except TypeError:
            raise FeatureError(f"{self.folder / STORE}: written by another version of this package") from None
        self._shards: OrderedDict[tuple[int, int], Shard] = OrderedDict()
        self._noted: set[Path] = set()  # lists of names whose damage has been reported
        self._settled = False  # whether the last refresh was completed
        self.refresh()

    @classmethod
    def create(cls, folder: str | Path, info: StoreInfo) -> "FeatureStore":
        """Open the store in `folder`, or create it.

        Raises:
            FeatureError: if the folder has other contents, or a store of another model, kind, dtype or preprocessing.
        """
        folder = Path(folder)
        if not (folder / STORE).is_file():
            # Another process may be creating the store right now: ignore its lock and its half-written STORE.
            found = [folder] if folder.is_file() else list_folder(folder)
            if any(not path.name.startswith((LOCK, STORE)) for path in found):
                raise FeatureError(f"{folder}: is not a feature store and not empty; use another folder")
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
                    f"{info.model} has now; use another folder"
                )
            if old != new:
                raise FeatureError(f"{folder}: holds {name} {old}, not {new}; use another folder")
        return store

    def refresh(self) -> None:
        """Read new manifest records; all of them, if the last refresh was interrupted."""
        if not self._settled:
            # Concatenated on demand: doing so at every batch would cost more the larger the store is.
            self._chunks = [(np.zeros(0, RECORD), np.zeros(0, np.uint16), np.zeros(0, bool))]
            self._count = 0
            self._places: dict[bytes, int] = {}
            self._read: dict[int, int] = {}  # bytes read of each writer's manifest
        self._settled = False
        for path in sorted(self.folder.glob("manifest-*.bin")):
            writer = int(path.stem.rpartition("-")[2])
            start = self._read.get(writer, 0)
            count = (path.stat().st_size - start) // RECORD.itemsize  # a partial record is being written
            if count <= 0:
                continue
            records = np.fromfile(path, RECORD, count, offset=start)
            count = len(records)  # may be fewer: a writer removes records again on a full disk
            self._chunks.append((records, np.full(count, writer, np.uint16), np.zeros(count, bool)))
            for i, sha256 in enumerate(records["sha256"].tolist(), self._count):
                self._places.setdefault(sha256, i)
            self._count += count
            self._read[writer] = start + count * RECORD.itemsize
        self._settled = True

    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All records, the writer of each, and whether its checksum has been verified."""
        if len(self._chunks) > 1:
            self._chunks = [tuple(np.concatenate(column) for column in zip(*self._chunks, strict=True))]
        return self._chunks[0]

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, sha256: bytes) -> bool:
        return sha256 in self._places

    def __iter__(self) -> Iterator[tuple[bytes, Features]]:
        """Yield (SHA-256, features) of every entry, in the order of the shards."""
        for sha256, i in self._in_order():
            yield sha256, self._features(i)

    @property
    def num_rows(self) -> int:
        return sum(count for _, count in self.sizes())

    def sizes(self) -> list[tuple[bytes, int]]:
        """List (SHA-256, number of rows) of every entry, in the order of iteration."""
        rows = self._table()[0]["rows"].tolist()
        return [(sha256, rows[i]) for sha256, i in self._in_order()]

    def get(self, sha256: bytes) -> Features | None:
        """Features of the image file with this SHA-256, or None."""
        i = self._places.get(sha256)
        return None if i is None else self._features(i)

    def grid(self, sha256: bytes) -> tuple[int, int] | None:
        """Return the grid (columns, rows) of slices of a stored image, without reading its features."""
        grid = tuple(self._table()[0]["grid"][self._places[sha256]].tolist())
        return grid if grid[0] else None

    def matrix(self) -> Iterator[np.ndarray]:
        """Yield all rows in the order of iteration, float32 (n, width), in runs that are contiguous on disk."""
        order = np.array([i for _, i in self._in_order()], np.int64)
        records, writers, _ = (column[order] for column in self._table())
        ends = records["start"] + records["rows"]
        apart = (np.diff(writers) != 0) | (np.diff(records["shard"]) != 0) | (records["start"][1:] != ends[:-1])
        starts = np.r_[0, np.flatnonzero(apart) + 1, len(order)] if len(order) else [0]
        for a, b in itertools.pairwise(starts):
            yield from_stored(*self._stored(order[a:b]), self.info.dtype, exact=False)

    def names(self) -> Iterator[tuple[bytes, str]]:
        """Yield (SHA-256, file name) in the order added; an image may have several names, and one name repeatedly.

        Damaged lines are skipped and reported on stderr.
        """
        return ((sha256, path) for sha256, path, _ in self.files())

    def files(self) -> Iterator[tuple[bytes, str, FileStat | None]]:
        """Yield (SHA-256, file name, stat of the file when it was read, if recorded), in the order added."""
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
        """Read values and scales of contiguous entries; their checksums are verified the first time."""
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
        if not shard.growing:  # a growing shard is reopened each time
            self._shards[key] = shard
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard


class FeatureWriter:
    """A store opened for writing, by any number of processes at once; use it in a `with` statement.

    Entries are durable once `add` returns, even if the process is killed. Only a power failure can lose entries added
    since the last full shard, and partially written entries are never treated as valid.
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
        """Store features by the SHA-256 of their image files; entries that already exist are kept unchanged.

        Either all of them are stored or none, even on a full disk or at Ctrl-C at any moment.

        Returns:
            The number of new entries.

        Raises:
            OSError: if writing fails, for example on a full disk.
            FeatureError: if rows are not finite, or of the wrong width.
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
        """Record `path` as a name of the image with this SHA-256; `stat` is that of the file at the resolved path."""
        known = set(map(hash, self.store.files())) if self._known_names is None else self._known_names
        if hash((sha256, path, stat)) not in known:
            self._known_names = None  # read again if this is interrupted
            line = {"sha256": sha256.hex(), "path": path} | ({"stat": stat} if stat else {})
            self._files.name(json.dumps(line))
            known.add(hash((sha256, path, stat)))
        self._known_names = known

    def close(self) -> None:
        self._files.close()


def verify(folder: str | Path) -> Verdict:
    """Check that every entry of a store exists, matches its checksum and is finite; then repair the store.

    Bad entries are removed from their manifest, and damaged lines from the names; entries of sealed shards that are
    missing in a manifest are restored.

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

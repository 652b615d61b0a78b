"""Crash-safe store of image features on disk: look up and stream; `writer.py` appends.

A store is a folder of safetensors shards and a SQLite database, made with one model, kind and preprocessing: its
fingerprint. The key of an entry is the SHA-256 of its image file, independent of the file's name. Every writing process
has a number and its own shards, so that many processes can fill one store.
"""

import itertools
import json
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoint import read_json
from ..fields import Choice, Flag, Number, Text, check_fields
from ..files import list_folder, write_beside
from ..locks import lock
from .database import FORMAT, Database, create_database
from .shards import COLUMNS, DTYPES, LOCK, STORE, FeatureError, Shard, from_stored, to_records
from .sources import FileStat, decode_path, encode_path
from .version1 import VERSION, migrate

_INFO = {"model": Text(), "kind": Choice(("pooled", "patch", "visual-tokens")), "fingerprint": Text()}
_INFO |= {"width": Number(1, 2**31 - 1, whole=True), "dtype": Choice(tuple(DTYPES))}
_INFO |= {"compute_dtype": Choice(("float32", "float16", "bfloat16")), "draft": Flag()}
_OPEN_SHARDS = 32  # shards mapped at once: macOS allows 256 open files per process
_BLOCK = 1 << 24  # values in a block of `matrix`
_CHUNK = 10_000  # rows read from the database at once: a reader must not keep a writer waiting


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
    format: int = FORMAT  # versions of this package that know only version 1 refuse this key

    def difference(self, other: "StoreInfo") -> str | None:
        """Return the name of a field because of which a store cannot hold the other's features, or None."""
        names = ("kind", "fingerprint", "width", "dtype")
        return next((name for name in names if getattr(self, name) != getattr(other, name)), None)


@dataclass(frozen=True)
class Features:
    """Features of one image, and their arrangement in tiles."""

    rows: mx.array  # (n, width): tile after tile, the overview first
    overview: tuple[int, int]  # (columns, rows) of patches in the overview
    grid: tuple[int, int] | None = None  # (columns, rows) of slices; None: only the overview
    cell: tuple[int, int] | None = None  # (columns, rows) of patches in a slice


def read_info(folder: Path) -> StoreInfo:
    """Read the metadata of a store.

    Raises:
        FeatureError: if the folder is not a store, or one of another version.
    """
    if not (folder / STORE).is_file():
        raise FeatureError(f"{folder}: not a feature store (it has no {STORE}); llama3v embed creates one")
    values = read_json(folder / STORE)
    try:
        if values.get("version") == VERSION:
            values["format"] = values.pop("version")
        info = StoreInfo(**values)
    except TypeError:
        info = None
    if info is None or info.format not in (VERSION, FORMAT):
        raise FeatureError(f"{folder / STORE}: written by another version of this package")
    check_fields(str(folder / STORE), asdict(info), _INFO, tuple(_INFO))
    return info


class FeatureStore:
    """A store opened for reading.

    Single entries are looked up in the database, as it is now. Iteration, `sizes` and `matrix` agree with each other:
    they are of the moment of the last `refresh`, or of the first use after it.

    The CRC-32 of an entry is checked when this object first reads it: a damaged entry is a FeatureError, never wrong
    features. With `matrix`, this adds about a third to the CPU time of the first pass, and nothing to later ones.

    A store of version 1 is migrated; if it cannot be written, its entries are read into memory instead.

    Raises:
        FeatureError: if the folder is not a store, or is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.info = read_info(self.folder)
        self.read_only: Exception | None = None  # why it cannot be written
        if self.info.format == VERSION:
            self.database, self.read_only = migrate(self.folder)
            self.info = StoreInfo(**asdict(self.info) | {"format": FORMAT})
        else:
            self.database = Database(self.folder)
        self._shards: OrderedDict[tuple[int, int], Shard] = OrderedDict()
        self._checked: dict[tuple[int, int], np.ndarray] = {}  # by shard: whether the entry at a row was checked
        self._table: np.ndarray | None = None

    @classmethod
    def create(cls, folder: str | Path, info: StoreInfo) -> "FeatureStore":
        """Open the store in `folder`, or create it.

        Raises:
            FeatureError: if the folder has other contents, or a store of another model, kind, dtype or preprocessing.
        """
        folder = Path(folder)
        if not (folder / STORE).is_file():
            # Another process may be creating the store right now: ignore its lock and its half-written files.
            found = [folder] if folder.is_file() else list_folder(folder)
            if any(not path.name.startswith("store.") for path in found):
                raise FeatureError(f"{folder}: is not a feature store and not empty; use another folder")
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOCK).open("wb") as held:
                lock(held)
                if not (folder / STORE).is_file():
                    create_database(folder)
                    write_beside(folder / STORE, (json.dumps(asdict(info), indent=2) + "\n").encode())
        store = cls(folder)
        name = store.info.difference(info)
        if name == "fingerprint":
            raise FeatureError(
                f"{folder}: was made with other weights, compute dtype or preprocessing ({store.info.model}) than "
                f"{info.model} has now; use another folder"
            )
        if name is not None:
            old, new = getattr(store.info, name), getattr(info, name)
            raise FeatureError(f"{folder}: holds {name} {old}, not {new}; use another folder")
        return store

    def refresh(self) -> None:
        """Let iteration, `sizes` and `matrix` include what was added since."""
        self._table = None

    def __len__(self) -> int:
        return self.database.rows("SELECT count(*) FROM entries")[0][0]

    def __contains__(self, sha256: bytes) -> bool:
        return bool(self.database.rows("SELECT 1 FROM entries WHERE sha256 = ?", (sha256,)))

    def __iter__(self) -> Iterator[tuple[bytes, Features]]:
        """Yield (SHA-256, features) of every entry, in the order of the shards."""
        for sha256, _ in self.sizes():
            features = self.get(sha256)
            if features is not None:  # removed by another process
                yield sha256, features

    @property
    def num_rows(self) -> int:
        """Number of rows of all entries."""
        return int(self._entries()["rows"].sum())

    def sizes(self) -> list[tuple[bytes, int]]:
        """List (SHA-256, number of rows) of every entry, in the order of iteration."""
        table = self._entries()
        return list(zip(table["sha256"].tolist(), table["rows"].tolist(), strict=True))

    def keys(self) -> np.ndarray:
        """SHA-256 of every entry, as an array of V32, in the order of iteration."""
        return self._entries()["sha256"]

    def get(self, sha256: bytes) -> Features | None:
        """Features of the image file with this SHA-256, rows in the stored dtype (int8: float16); None if missing.

        Raises:
            FeatureError: if the entry is damaged.
        """
        query = f"SELECT writer, {', '.join(COLUMNS)} FROM entries WHERE sha256 = ?"
        found = self.database.rows(query, (sha256,))
        if not found:
            return None
        (writer, *entry) = found[0]
        try:
            with self.database.converting():
                rows = from_stored(*self._stored(writer, to_records([entry])), self.info.dtype, exact=True)
        except FeatureError:
            if self.database.rows(query, (sha256,)) == found:
                raise
            return self.get(sha256)  # a compaction has moved it meanwhile
        *_, overview_columns, overview_rows, grid_columns, grid_rows, cell_columns, cell_rows = entry
        sliced = ((grid_columns, grid_rows), (cell_columns, cell_rows)) if grid_columns else ()
        return Features(rows, (overview_columns, overview_rows), *sliced)

    def grid(self, sha256: bytes) -> tuple[int, int] | None:
        """Return the grid (columns, rows) of slices of a stored image, without reading its features."""
        (grid,) = self.database.rows("SELECT grid_columns, grid_rows FROM entries WHERE sha256 = ?", (sha256,))
        with self.database.converting():
            columns, rows = np.array(grid, np.uint16).tolist()
        return (columns, rows) if columns else None

    def matrix(self) -> Iterator[np.ndarray]:
        """Yield all rows in the order of iteration, float32 (n, width), in blocks that are contiguous on disk.

        Rows of a float32 store are not copied, but mapped.
        """
        for block in self._contiguous(self._entries()):
            yield from_stored(*self._stored(int(block["writer"][0]), block), self.info.dtype, exact=False)

    def blocks(
        self, writer: int, shard: int, condition: str = "1", parameters: Sequence = ()
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (records, values, scales) of the entries of a shard as they are stored, in blocks of a bounded size.

        Args:
            writer: number of the shard's writer.
            shard: its number.
            condition: of the entries, in SQL.
            parameters: of the condition.
        """
        query = f"SELECT {', '.join(COLUMNS)} FROM entries WHERE writer = ? AND shard = ? AND ({condition})"
        found = self.database.rows(f"{query} ORDER BY start", (writer, shard, *parameters))
        with self.database.converting():
            records = to_records(found)
        for block in np.split(records, np.flatnonzero(np.diff(self._block_of(records))) + 1) if found else ():
            stored = [self._stored(writer, part) for part in self._contiguous(block)]
            yield block, *map(np.concatenate, zip(*stored, strict=True))

    def _contiguous(self, table: np.ndarray) -> list[np.ndarray]:
        """Split entries in the order of the shards into blocks that are contiguous on disk, of a bounded size."""
        if not len(table):
            return []
        ends = table["start"] + table["rows"]
        apart = (table["start"][1:] != ends[:-1]) | (np.diff(table["shard"]) != 0)
        if "writer" in table.dtype.names:
            apart |= np.diff(table["writer"]) != 0
        apart |= np.diff(self._block_of(table)) != 0
        return np.split(table, np.flatnonzero(apart) + 1)

    def _block_of(self, table: np.ndarray) -> np.ndarray:
        """Number entries by the block of a bounded size that each is in."""
        return np.cumsum(table["rows"], dtype=np.int64) * self.info.width // _BLOCK

    def names(self) -> Iterator[tuple[bytes, str]]:
        """Yield (SHA-256, file name) in the order added; an image may have several names, and one name repeatedly."""
        return ((sha256, path) for sha256, path, *_ in self.files_where("sha256 != X''"))

    def files_where(self, condition: str) -> Iterator[tuple[bytes, str, tuple, tuple]]:
        """Yield (SHA-256, file name, `FileStat`, `ImageFacts`) of files, in the order added.

        What is not known is None in stat and facts; an older store that cannot be written has fewer facts.

        Args:
            condition: of the rows of the table, in SQL.
        """
        query = f"SELECT * FROM files WHERE id > ? AND {condition} ORDER BY id LIMIT {_CHUNK}"
        last = 0
        while found := self.database.rows(query, (last,)):
            for row in found:
                yield row[1], self._path(row[2]), row[3:7], row[7:]
            last = found[-1][0]

    def name_of(self, sha256: bytes) -> str | None:
        """First name of an image, or None."""
        found = self.database.rows("SELECT path FROM files WHERE sha256 = ? ORDER BY id LIMIT 1", (sha256,))
        return self._path(found[0][0]) if found else None

    def files_at(self, paths: Collection[str]) -> Iterator[tuple[bytes, str, FileStat]]:
        """Yield (SHA-256, path, stat) of images in the store that were read at these paths, if the stat is recorded."""
        if 4 * len(paths) > (self.database.rows("SELECT max(id) FROM files")[0][0] or 0):  # reading all is faster
            is_stored = "EXISTS (SELECT 1 FROM entries e WHERE e.sha256 = files.sha256)"
            known = self.files_where(f"size IS NOT NULL AND {is_stored}")
            yield from (file[:3] for file in known if file[1] in paths)
            return
        encoded = map(encode_path, paths)
        while chunk := list(itertools.islice(encoded, 500)):
            query = f"""SELECT sha256, path, size, mtime_ns, ctime_ns, inode FROM files JOIN entries USING (sha256)
                WHERE path IN ({", ".join("?" * len(chunk))}) AND size IS NOT NULL ORDER BY id"""
            for row in self.database.rows(query, chunk):
                yield row[0], self._path(row[1]), row[2:]

    def _path(self, stored: bytes) -> str:
        with self.database.converting():
            return decode_path(stored)

    def _entries(self) -> np.ndarray:
        """Entries in the order of the shards, as of the last refresh."""
        if self._table is None:
            query = "SELECT writer, shard, start, rows, crc32, sha256 FROM entries"
            kinds = [(name, np.int64) for name in ("writer", "shard", "start", "rows", "crc32")] + [("sha256", "V32")]
            chunks, after = [np.zeros(0, kinds)], (-1, -1, -1)
            while found := self.database.rows(
                f"{query} WHERE (writer, shard, start) > (?, ?, ?) ORDER BY writer, shard, start LIMIT {_CHUNK}", after
            ):
                with self.database.converting():
                    chunks.append(np.array(found, kinds))
                after = found[-1][:3]
            self._table = np.concatenate(chunks)
        return self._table

    def _stored(self, writer: int, records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read values and scales of contiguous entries; their checksums are verified the first time."""
        first, last = records[0], records[-1]
        number, start, end = int(first["shard"]), int(first["start"]), int(last["start"]) + int(last["rows"])
        values, scales = self._shard(writer, number, end).read(start, end - start)
        checked = self._checked.get((writer, number), np.zeros(0, bool))
        if len(checked) < end:
            checked = np.r_[checked, np.zeros(max(end - len(checked), len(checked) // 4), bool)]
        if not checked[records["start"]].all():
            self._shard(writer, number, end).check(records, values, scales)
            checked[records["start"]] = True
        self._checked[writer, number] = checked
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

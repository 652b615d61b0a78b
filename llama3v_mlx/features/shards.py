"""File format of a feature store's rows, for reading: shards.

A growing shard is `shard-WWW-NNNNN.open`: space for the header, then rows as they are added; scales of int8 rows are in
a file next to it. A sealed shard is `.safetensors`: scales and records follow the rows, and the header is filled in, so
that it is self-contained. A sealed shard that is not full is reopened when its writer adds more (`growing.py`).
"""

import itertools
import json
import os
import zlib
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..files import check_file

# Columns of an entry in the database, and its record in a sealed shard, from which the database can be rebuilt.
COLUMNS = ("sha256", "shard", "start", "rows", "crc32")
COLUMNS += ("overview_columns", "overview_rows", "grid_columns", "grid_rows", "cell_columns", "cell_rows")
INTO_ENTRIES = f"INTO entries (writer, {', '.join(COLUMNS)}) VALUES ({', '.join('?' * (1 + len(COLUMNS)))})"
RECORD = np.dtype(
    {
        "names": COLUMNS,
        "formats": ["V32", *["<u4"] * 4, *["<u2"] * 6],
        "offsets": [0, *range(32, 48, 4), *range(48, 60, 2)],
        "itemsize": 64,
    }
)
HEADER_BYTES = 4096
STORE, DATABASE, LOCK = "store.json", "store.db", "store.lock"
SEALED, OPEN, SCALES = ".safetensors", ".open", ".scales"
DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "int8": "i1"}
REPAIR = "llama3v embed --verify {} repairs the store"


class FeatureError(ValueError):
    """Raised when a feature store cannot be used; the message says which, why, and what to do."""


def shard_path(folder: Path, writer: int, number: int) -> Path:
    """Path of a sealed shard, by the numbers of its writer and of the shard."""
    return folder / f"shard-{writer:03}-{number:05}{SEALED}"


def to_records(entries: Sequence[tuple]) -> np.ndarray:
    """Convert tuples of `COLUMNS` to records; their reserved bytes are 0."""
    records = np.zeros(len(entries), RECORD)
    for name, column in zip(COLUMNS, zip(*entries, strict=True), strict=False):
        records[name] = np.frombuffer(b"".join(column), "V32") if name == "sha256" else column
    return records


def to_stored(rows: mx.array, width: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Convert rows (n, width) for storage: values, and for int8 a float32 scale per row (otherwise no scales).

    An int8 value is round(value / scale) with scale = max|row| / 127: the error is at most half a scale.

    Raises:
        FeatureError: if rows have the wrong width, or are not finite in the dtype of the store.
    """
    if rows.ndim != 2 or rows.shape[1] != width:
        raise FeatureError(f"features of shape {rows.shape} do not fit a store of width {width}")
    scales = np.zeros(0, np.float32)
    if dtype == "int8":
        exact = np.array(rows.astype(mx.float32))
        largest = np.abs(exact).max(axis=1)
        finite = bool(np.isfinite(largest).all())
        scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        values = np.rint(exact / scales[:, None]).astype(np.int8) if finite else exact
    else:
        cast = rows.astype(getattr(mx, dtype))
        finite = bool(mx.isfinite(cast).all())
        values = np.array(cast.view(mx.uint16) if dtype == "bfloat16" else cast)
    if not finite:
        raise FeatureError(f"features are not finite numbers in {dtype}")
    return values, scales


def checksums(rows: Sequence[int], values: np.ndarray, scales: np.ndarray) -> list[int]:
    """CRC-32 of contiguous entries with `rows` rows each, over the bytes of values, then of scales."""
    found = [0] * len(rows)
    ends = [0, *itertools.accumulate(rows)]
    for array in (values, scales):
        if len(array):
            data, row_bytes = memoryview(array.reshape(-1).view(np.uint8)), array.nbytes // len(array)
            bounds = itertools.pairwise([row_bytes * end for end in ends])
            found = [zlib.crc32(data[a:b], crc) for (a, b), crc in zip(bounds, found, strict=True)]
    return found


def from_stored(values: np.ndarray, scales: np.ndarray, dtype: str, exact: bool) -> np.ndarray | mx.array:
    """Inverse of `to_stored`: NumPy float32, or with `exact` an mx.array in the stored dtype (int8: float16)."""
    if dtype == "int8":
        rows = values * scales[:, None]
        return mx.array(rows).astype(mx.float16) if exact else rows
    if dtype == "bfloat16":
        rows = mx.array(values).view(mx.bfloat16)
        return rows if exact else np.array(rows.astype(mx.float32))
    return mx.array(values) if exact else values.astype(np.float32, copy=False)


class Shard:
    """A sealed or growing shard, for reading.

    Raises:
        FeatureError: if it is missing or damaged.
    """

    def __init__(self, folder: Path, writer: int, number: int, width: int, dtype: str):
        self._dtype, self._width = np.dtype(DTYPES[dtype]), width
        self._folder = folder
        sealed = shard_path(folder, writer, number)
        # The writer may be renaming it, from one name to the other and back.
        for self.path in (sealed, sealed.with_suffix(OPEN)) * 2:
            try:
                check_file(self.path)
                with self.path.open("rb") as file:
                    before = os.fstat(file.fileno())
                    try:
                        self._map(file)
                    finally:
                        after = self.path.stat()
                if self.growing or (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size):
                    return
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
                raise FeatureError(f"{self.path}: damaged or cut short; {REPAIR.format(folder)}") from e
        raise FeatureError(f"{sealed}: is missing; {REPAIR.format(folder)}")

    @property
    def growing(self) -> bool:
        """True for a shard that is still being written."""
        return self.path.suffix == OPEN

    def _map(self, file: FileIO) -> None:
        self.records = self._scales = None
        self._bytes = np.asarray(np.memmap(file, np.uint8, "r"))
        self.num_rows = (len(self._bytes) - HEADER_BYTES) // (self._width * self._dtype.itemsize)
        if not self.growing:
            tensors = json.loads(self._bytes[8:HEADER_BYTES].tobytes())
            self.num_rows = min(self.num_rows, tensors["features"]["shape"][0])
            # Copied: the bytes after the rows are overwritten when the shard grows again.
            self.records = self._tensor(tensors, "records").view(RECORD).copy()
            self._starts = self.records["start"].copy()
            if self._dtype == np.int8:
                self._scales = self._tensor(tensors, "scales").view("<f4").copy()
        elif self._dtype == np.int8:
            self._scales = np.fromfile(self.path.with_suffix(SCALES), "<f4")
        if self._scales is not None:
            self.num_rows = min(self.num_rows, len(self._scales))

    def _tensor(self, tensors: dict, name: str) -> np.ndarray:
        start, end = tensors[name]["data_offsets"]
        if HEADER_BYTES + end > len(self._bytes):
            raise ValueError("cut short")
        return self._bytes[HEADER_BYTES + start : HEADER_BYTES + end]

    def read(self, start: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Read `rows` stored rows beginning at `start`, and their scales (int8 only).

        Raises:
            FeatureError: if the shard does not have them.
        """
        if start < 0 or rows < 1 or start + rows > self.num_rows:
            raise FeatureError(f"{self.path}: cut short; {REPAIR.format(self._folder)}")
        row_bytes = self._width * self._dtype.itemsize
        first = HEADER_BYTES + start * row_bytes
        scales = np.zeros(0, np.float32) if self._scales is None else self._scales[start : start + rows]
        data = self._bytes[first : first + rows * row_bytes]
        return data.view(self._dtype).reshape(rows, self._width), scales

    def check(self, records: np.ndarray, values: np.ndarray, scales: np.ndarray) -> None:
        """Compare contiguous entries, as read, with their checksums, and with the records of a sealed shard.

        Raises:
            FeatureError: if a checksum or a record differs.
        """
        found = checksums(records["rows"].tolist(), values, scales)
        wrong = np.flatnonzero(records["crc32"] != np.array(found, np.uint32))
        if len(wrong):
            first = records[wrong[0]]
            raise FeatureError(
                f"{self.path}: rows {first['start']} to {first['start'] + first['rows'] - 1} do not match their "
                f"checksum; {REPAIR.format(self._folder)}"
            )
        if self.records is not None:
            places = np.searchsorted(self._starts, records["start"])
            own = self.records[places[places < len(self._starts)]]
            if records.dtype == RECORD:
                equal = own.tolist() == records.tolist()
            else:  # many entries, with fewer columns
                equal = all(np.array_equal(own[name], records[name]) for name in ("sha256", "start", "rows", "crc32"))
            if not equal:
                raise FeatureError(f"{self.path}: its records differ from {DATABASE}; {REPAIR.format(self._folder)}")

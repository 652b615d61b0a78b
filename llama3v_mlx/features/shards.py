"""The files of a feature store: shards that grow row by row and end as safetensors, and their check.

A growing shard is `shard-WWW-NNNNN.open`: room for the header, then rows as they come; scales of int8 rows grow beside
it. When it is full, or its process is done, scales and records follow the rows, the header is put into its room, and
the file is renamed to `.safetensors`. Nothing is written twice, and a sealed shard says alone what is in it.
"""

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..files import flush, lock, sync

# One entry of a manifest.
RECORD = np.dtype(
    [
        ("sha256", "V32"),
        ("shard", "<u4"),
        ("start", "<u4"),  # first row in the shard
        ("rows", "<u4"),
        ("crc32", "<u4"),  # of the rows' bytes and their scales'
        ("overview", "<u2", 2),
        ("grid", "<u2", 2),
        ("cell", "<u2", 2),
        ("reserved", "V4"),
    ]
)
HEADER_BYTES = 4096
LOCK = "store.lock"
SEALED, OPEN, SCALES = ".safetensors", ".open", ".scales"
DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "int8": "i1"}
_SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8"}


class FeatureError(ValueError):
    """A feature store that cannot be used as asked; the message says which, why, and what to do."""


def shard_path(folder: Path, writer: int, number: int) -> Path:
    return folder / f"shard-{writer:03}-{number:05}{SEALED}"


def take_manifest(folder: Path, writer: int) -> FileIO | None:
    """A writer's manifest, opened to append and locked; None if another process has it."""
    manifest = (folder / f"manifest-{writer:03}.bin").open("ab", buffering=0)
    if not lock(manifest, wait=False):
        manifest.close()
        return None
    return manifest


def to_stored(rows: mx.array, width: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, width) as they are kept: values, and for int8 a float32 scale for each row (else none).

    An int8 value is round(value / scale) with scale = max|row| / 127, so off by half a scale at most.

    Raises:
        FeatureError: if rows are of another width, or not finite in the dtype of the store.
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


def from_stored(values: np.ndarray, scales: np.ndarray, dtype: str, exact: bool) -> np.ndarray | mx.array:
    """The reverse of `to_stored`: numpy float32, or with `exact` an mx.array as stored (int8: float16)."""
    if dtype == "int8":
        rows = values * scales[:, None]
        return mx.array(rows).astype(mx.float16) if exact else rows
    if dtype == "bfloat16":
        rows = mx.array(values).view(mx.bfloat16)
        return rows if exact else np.array(rows.astype(mx.float32))
    return mx.array(values) if exact else values.astype(np.float32)


class Shard:
    """A shard, sealed or growing, for reading."""

    def __init__(self, folder: Path, writer: int, number: int, width: int, dtype: str):
        self._dtype, self._width = np.dtype(DTYPES[dtype]), width
        self._scales = self.records = None
        self._folder = folder
        self.path = shard_path(folder, writer, number)
        growing = self.path.with_suffix(OPEN)
        if not self.path.exists() and growing.exists():
            self.path = growing
            if dtype == "int8":
                self._scales = np.fromfile(growing.with_suffix(SCALES), "<f4")
        try:
            self._bytes = np.memmap(self.path, np.uint8, "r")
            if self.path != growing:
                tensors = json.loads(self._bytes[8:HEADER_BYTES].tobytes())
                self.records = self._tensor(tensors, "records").view(RECORD).reshape(-1)
                if dtype == "int8":
                    self._scales = self._tensor(tensors, "scales").view("<f4")
        except FileNotFoundError:
            raise FeatureError(f"{self.path}: is missing; {_REPAIR.format(folder)}") from None
        except (OSError, ValueError, KeyError) as e:
            raise FeatureError(f"{self.path}: damaged or cut short; {_REPAIR.format(folder)}") from e

    def read(self, start: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """`rows` rows from `start` on, as they are stored, and their scales (int8 only)."""
        row_bytes = self._width * self._dtype.itemsize
        first = HEADER_BYTES + start * row_bytes
        data = self._bytes[first : first + rows * row_bytes]
        scales = np.zeros(0, np.float32) if self._scales is None else self._scales[start : start + rows]
        if len(data) < rows * row_bytes or (self._scales is not None and len(scales) < rows):
            raise FeatureError(f"{self.path}: cut short; {_REPAIR.format(self._folder)}")
        return data.view(self._dtype).reshape(rows, self._width), scales

    def _tensor(self, tensors: dict, name: str) -> np.ndarray:
        start, end = tensors[name]["data_offsets"]
        if HEADER_BYTES + end > len(self._bytes):
            raise ValueError("cut short")
        return self._bytes[HEADER_BYTES + start : HEADER_BYTES + end]


_REPAIR = "llama3v embed --verify {} drops what is lost"


class OpenShard:
    """A growing shard of one writer, new or left unsealed by a process that was killed.

    `records` are those that the manifest has of it. Those whose rows are not all there are dropped, and so is what
    follows the last of them in the file.
    """

    def __init__(self, folder: Path, writer: int, number: int, width: int, dtype: str, records: np.ndarray):
        self.number, self.width, self.dtype = number, width, dtype
        self._path = shard_path(folder, writer, number).with_suffix(OPEN)
        self._row_bytes = width * np.dtype(DTYPES[dtype]).itemsize
        # Unbuffered: what has been written is the system's, and a kill does not take it.
        self._file = _open_unbuffered(self._path)
        self._scales = _open_unbuffered(self._path.with_suffix(SCALES)) if dtype == "int8" else None
        found = max(0, os.fstat(self._file.fileno()).st_size - HEADER_BYTES) // self._row_bytes
        if self._scales:
            found = min(found, os.fstat(self._scales.fileno()).st_size // 4)
        self.records = [records[records["start"] + records["rows"] <= found]]
        self.num_rows = int(sum(self.records[0]["rows"]))
        self._cut()

    @property
    def num_bytes(self) -> int:
        return HEADER_BYTES + self.num_rows * self._row_bytes

    def append(self, values: Sequence[np.ndarray], scales: Sequence[np.ndarray]) -> None:
        """Add rows; if they do not all fit on the disk, none of them is added."""
        try:
            _write(self._file, b"".join(v.tobytes() for v in values))
            if self._scales:
                _write(self._scales, b"".join(s.tobytes() for s in scales))
        except OSError:
            self._cut()
            raise
        self.num_rows += sum(len(v) for v in values)

    def drop_last(self, num_rows: int) -> None:
        """Take back the last rows added."""
        self.num_rows -= num_rows
        self._cut()

    def seal(self) -> None:
        """Make it a safetensors file."""
        records = np.concatenate(self.records)
        tensors, end = {}, 0
        parts = [("features", _SAFETENSORS[self.dtype], [self.num_rows, self.width], self.num_rows * self._row_bytes)]
        if self._scales:
            self._scales.seek(0)
            scales = self._scales.read(4 * self.num_rows)
            parts.append(("scales", "F32", [self.num_rows], len(scales)))
            _write(self._file, scales)
        parts.append(("records", "U8", [len(records), RECORD.itemsize], records.nbytes))
        _write(self._file, records.tobytes())
        for name, dtype, shape, size in parts:
            tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        header = json.dumps({"__metadata__": {"format": "mlx"}, **tensors}).encode()
        self._file.seek(0)
        # safetensors lets the header be padded with spaces, which keeps the rows where they are.
        _write(self._file, struct.pack("<Q", HEADER_BYTES - 8) + header.ljust(HEADER_BYTES - 8))
        sync(self._file.fileno())
        self.close()
        os.rename(self._path, self._path.with_suffix(SEALED))
        flush(self._path.parent)
        self._path.with_suffix(SCALES).unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()
        if self._scales:
            self._scales.close()

    def _cut(self) -> None:
        """Leave both files with `num_rows` rows, ready for more."""
        for file, size in ((self._file, self.num_bytes), (self._scales, 4 * self.num_rows)):
            if file:
                file.truncate(size)
                file.seek(size)


def _open_unbuffered(path: Path) -> FileIO:
    return path.open("r+b" if path.exists() else "w+b", buffering=0)


def _write(file: FileIO, data: bytes) -> None:
    """All of it: an unbuffered write may stop half-way, on a disk that is nearly full for one."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


@dataclass
class Verdict:
    """What `check_writer` found, in entries."""

    good: int = 0
    lost: list[str] = field(default_factory=list)  # one line each
    restored: int = 0


def check_writer(folder: Path, writer: int, width: int, dtype: str) -> Verdict:
    """Check what one writer has written, and repair its manifest: drop what is lost, put back what is sealed.

    A shard that cannot be read is kept under the suffix `.damaged`.
    """
    manifest = folder / f"manifest-{writer:03}.bin"
    known = np.zeros(0, RECORD)
    if manifest.exists():
        known = np.fromfile(manifest, RECORD, manifest.stat().st_size // RECORD.itemsize)
    verdict, kept = Verdict(), []
    numbers = {int(number) for number in known["shard"]}
    numbers |= {int(p.stem.rpartition("-")[2]) for p in folder.glob(f"shard-{writer:03}-*{SEALED}")}
    for number in sorted(numbers):
        records = known[known["shard"] == number]
        try:
            shard = Shard(folder, writer, number, width, dtype)
        except FeatureError as e:
            verdict.lost.append(f"{len(records)} entries: {e}")
            path = shard_path(folder, writer, number)
            if path.exists():
                path.rename(path.with_suffix(".damaged"))
            continue
        if shard.records is not None and len(shard.records) > len(records):
            verdict.restored += len(shard.records) - len(records)
            records = shard.records
        bad = 0
        for record in records:
            if _is_good(shard, record, dtype):
                kept.append(record)
            else:
                bad += 1
        if bad:
            verdict.lost.append(f"{bad} entries of {shard.path}: not what was written there, or not finite")
    verdict.good = len(kept)
    whole = np.array(kept, RECORD).tobytes()
    if not manifest.exists() or manifest.read_bytes() != whole:
        write_beside(manifest, whole)
    return verdict


def _is_good(shard: Shard, record: np.void, dtype: str) -> bool:
    try:
        values, scales = shard.read(int(record["start"]), int(record["rows"]))
    except FeatureError:
        return False
    if zlib.crc32(values.tobytes() + scales.tobytes()) != record["crc32"]:
        return False
    if dtype == "bfloat16":
        return bool(((values & 0x7F80) != 0x7F80).all())  # an exponent of ones is infinity or NaN
    return bool(np.isfinite(values).all() and np.isfinite(scales).all())


def write_beside(path: Path, data: bytes) -> None:
    """Write a file beside `path` and rename it into place."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        os.rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def ends_a_line(path: Path) -> bool:
    """Whether nothing, or whole lines, are in a file: a kill may have cut the last one short."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


@contextlib.contextmanager
def store_lock(folder: Path) -> Iterator[None]:
    """Hold the store's lock: one process at a time looks for duplicates and appends."""
    with (folder / LOCK).open("w") as file:
        lock(file)
        yield

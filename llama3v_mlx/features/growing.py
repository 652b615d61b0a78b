"""Files that one writing process of a feature store appends to: its manifest, its names, and a growing shard.

Only rows with a complete record in the manifest are committed. Rows are written first, after the committed ones, and
then their records, so that an interrupted append adds nothing; its leftovers are overwritten.
"""

import contextlib
import fcntl
import json
import os
import struct
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from ..files import append, cut_half_line, flush, lock, sync, write_at
from .shards import DTYPES, HEADER_BYTES, LOCK, OPEN, RECORD, SCALES, SEALED, FeatureError, Shard, shard_path

_SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8"}


def take_manifest(folder: Path, writer: int) -> FileIO | None:
    """Open and lock a writer's manifest; None if another process holds it."""
    manifest = _open_unbuffered(folder / f"manifest-{writer:03}.bin")
    if not lock(manifest, wait=False):
        manifest.close()
        return None
    return manifest


def _claim(folder: Path, writer: int) -> FileIO | None:
    """Take a writer's number; None if it is taken.

    Where the file system has no locks, a number is free only until its manifest exists.
    """
    path = folder / f"manifest-{writer:03}.bin"
    created = False
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        created = True
    manifest = _open_unbuffered(path)
    try:
        fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if isinstance(e, BlockingIOError) or not created:
            manifest.close()
            return None
    return manifest


def names_path(folder: Path, writer: int) -> Path:
    return folder / f"names-{writer:03}.jsonl"


class WriterFiles:
    """Files of a writer, taken over from the last process with its number.

    After any exception, the next call first recovers from the files, as a new process would after a kill.

    Args:
        folder: the store.
        width: values per row.
        dtype: dtype of rows, a key of `DTYPES`.
        shard_bytes: size at which a shard is sealed and a new one started.
    """

    def __init__(self, folder: Path, width: int, dtype: str, shard_bytes: int):
        self._folder, self._width, self._dtype, self._shard_bytes = folder, width, dtype, shard_bytes
        self._shard: OpenShard | None = None
        self._settled = False  # whether this object's state matches the files
        for self.number in range(65536):
            self._manifest = _claim(folder, self.number)
            if self._manifest:
                break
        try:
            self._names = _open_unbuffered(names_path(folder, self.number))
            self.lock = _open_unbuffered(folder / LOCK)  # the store's
            with self._change():
                pass
        except BaseException:
            self._manifest.close()
            raise

    def append(self, records: np.ndarray, values: Sequence[np.ndarray], scales: Sequence[np.ndarray]) -> None:
        """Add entries atomically.

        Args:
            records: a RECORD per entry, without its position.
            values: the rows of each entry, from `to_stored`.
            scales: the scales of each entry, from `to_stored`.
        """
        with self._change():
            if self._shard and self._shard.num_bytes >= self._shard_bytes:
                self._seal()
            self._shard = self._shard or self._begin()
            ends = self._shard.num_rows + np.cumsum(records["rows"])
            records["shard"], records["start"] = self._shard.number, ends - records["rows"]
            self._shard.write(values, scales)
            append(self._manifest, records.tobytes())
            self._shard.count(records)

    def name(self, line: str) -> None:
        """Add a line to the names."""
        cut_half_line(self._names)
        append(self._names, line.encode() + b"\n")

    def close(self) -> None:
        """Seal the shard and close the files."""
        with self._manifest, self._names, self.lock, self._change():
            if self._shard:
                self._seal()

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        if not self._settled:
            self._recover()
        self._settled = False
        yield
        self._settled = True

    def _recover(self) -> None:
        """Resume from the files after another process ended or this one was interrupted."""
        if self._shard:
            self._shard.close()
            self._shard = None
        cut_half_line(self._names)
        records = _read_manifest(self._manifest)
        sealed = self._folder.glob(f"shard-{self.number:03}-*{SEALED}")
        self._next = 1 + max((int(p.stem.rpartition("-")[2]) for p in sealed), default=-1)
        mine = records["shard"] == self._next
        count = len(records)
        growing = shard_path(self._folder, self.number, self._next).with_suffix(OPEN)
        if mine.any() or growing.exists():
            self._shard = self._open(records[mine])
            # They are the last in the manifest; those whose rows were lost in a power failure are dropped.
            count -= int(mine.sum()) - len(self._shard.records)
        os.ftruncate(self._manifest.fileno(), count * RECORD.itemsize)
        for scales in self._folder.glob(f"shard-{self.number:03}-*{SCALES}"):
            if not scales.with_suffix(OPEN).exists():
                scales.unlink()

    def _begin(self) -> "OpenShard":
        """Reopen the last shard if it is not full, otherwise open a new one."""
        last = self._next - 1
        if last >= 0 and shard_path(self._folder, self.number, last).stat().st_size < self._shard_bytes:
            records = _read_manifest(self._manifest)
            records = records[records["shard"] == last]
            if _unseal(self._folder, self.number, last, self._width, self._dtype, records):
                self._next = last
                return self._open(records)
        return self._open(np.zeros(0, RECORD))

    def _open(self, records: np.ndarray) -> "OpenShard":
        return OpenShard(self._folder, self.number, self._next, self._width, self._dtype, records)

    def _seal(self) -> None:
        if len(self._shard.records):
            sync(self._manifest.fileno())
            self._shard.seal()
            self._next += 1
        else:
            self._shard.remove()
        self._shard = None


class OpenShard:
    """A growing shard, new or left by another process.

    Args:
        folder: the store.
        writer: number of the writer.
        number: number of the shard.
        width: values per row.
        dtype: dtype of rows, a key of `DTYPES`.
        records: its records in the manifest; those with missing rows are dropped.
    """

    def __init__(self, folder: Path, writer: int, number: int, width: int, dtype: str, records: np.ndarray):
        self.number, self._width, self._dtype = number, width, dtype
        self._path = shard_path(folder, writer, number).with_suffix(OPEN)
        self._row_bytes = width * np.dtype(DTYPES[dtype]).itemsize
        # Unbuffered: written data is in the system's cache, and survives a kill.
        self._file = _open_unbuffered(self._path)
        self._scales = _open_unbuffered(self._path.with_suffix(SCALES)) if dtype == "int8" else None
        found = max(0, os.fstat(self._file.fileno()).st_size - HEADER_BYTES) // self._row_bytes
        if self._scales:
            found = min(found, os.fstat(self._scales.fileno()).st_size // 4)
        self._records = [records[records["start"].astype(np.int64) + records["rows"] <= found]]
        # Not the sum of their rows: `--verify` may have removed one from the middle.
        self.num_rows = int((self.records["start"] + self.records["rows"]).max(initial=0))

    @property
    def records(self) -> np.ndarray:
        """Records of the committed rows."""
        return np.concatenate(self._records)

    @property
    def num_bytes(self) -> int:
        return HEADER_BYTES + self.num_rows * self._row_bytes

    def write(self, values: Sequence[np.ndarray], scales: Sequence[np.ndarray]) -> None:
        """Write rows after the committed ones; `count` commits them."""
        write_at(self._file, b"".join(v.tobytes() for v in values), self.num_bytes)
        if self._scales:
            write_at(self._scales, b"".join(s.tobytes() for s in scales), 4 * self.num_rows)

    def count(self, records: np.ndarray) -> None:
        """Commit written rows whose records are in the manifest."""
        self._records.append(records)
        self.num_rows += int(records["rows"].sum())

    def seal(self) -> None:
        """Turn the shard into a safetensors file."""
        records = self.records
        parts = [("features", _SAFETENSORS[self._dtype], [self.num_rows, self._width], self.num_rows * self._row_bytes)]
        tail = records.tobytes()
        if self._scales:
            scales = os.pread(self._scales.fileno(), 4 * self.num_rows, 0)
            parts.append(("scales", "F32", [self.num_rows], len(scales)))
            tail = scales + tail
        parts.append(("records", "U8", [len(records), RECORD.itemsize], records.nbytes))
        tensors, end = {}, 0
        for name, dtype, shape, size in parts:
            tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        header = json.dumps({"__metadata__": {"format": "mlx"}, **tensors}).encode()
        write_at(self._file, tail, self.num_bytes)
        # A safetensors header may be padded with spaces, so the rows need not move.
        write_at(self._file, struct.pack("<Q", HEADER_BYTES - 8) + header.ljust(HEADER_BYTES - 8), 0)
        os.ftruncate(self._file.fileno(), HEADER_BYTES + end)
        sync(self._file.fileno())
        os.rename(self._path, self._path.with_suffix(SEALED))
        flush(self._path.parent)
        self._path.with_suffix(SCALES).unlink(missing_ok=True)
        self.close()

    def remove(self) -> None:
        """Remove a shard without committed rows."""
        self._path.with_suffix(SCALES).unlink(missing_ok=True)
        self._path.unlink()
        self.close()

    def close(self) -> None:
        self._file.close()
        if self._scales:
            self._scales.close()


def _unseal(folder: Path, writer: int, number: int, width: int, dtype: str, records: np.ndarray) -> bool:
    """Reopen a sealed shard, unless it is damaged or its entries differ from the manifest's."""
    try:
        shard = Shard(folder, writer, number, width, dtype)
    except FeatureError:
        return False
    if shard.records is None or shard.records.tobytes() != records.tobytes():
        return False
    growing = shard.path.with_suffix(OPEN)
    if dtype == "int8":
        scales = growing.with_suffix(SCALES)
        scales.write_bytes(shard.read(0, shard.num_rows)[1].tobytes())
        flush(scales)
    os.rename(shard.path, growing)
    flush(folder)
    return True


def _open_unbuffered(path: Path) -> FileIO:
    """Open a file for reading and writing, creating it if necessary."""
    return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))


def _read_manifest(manifest: FileIO) -> np.ndarray:
    """Read the complete records of a manifest."""
    return np.fromfile(manifest.name, RECORD, os.fstat(manifest.fileno()).st_size // RECORD.itemsize)

"""Growing shard of one writing process of a feature store, and the writer's number.

Rows count from the moment their entries are committed in the database. They are written before that, after the rows
that count, so that an interrupted addition adds nothing; its leftovers are overwritten.
"""

import contextlib
import fcntl
import json
import os
import re
import struct
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path

import numpy as np

from ..files import flush, naming, sync, write_at
from .shards import DTYPES, HEADER_BYTES, OPEN, RECORD, SCALES, SEALED, FeatureError, Shard, shard_path

_SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "int8": "I8"}


def lock_path(folder: Path, writer: int) -> Path:
    """Path of the file whose lock is a writer's claim on its number; it also has the next shard's number."""
    return folder / f"writer-{writer:03}.lock"


def claim(folder: Path, writer: int) -> FileIO | None:
    """Take a writer's number, by a locked file; None if it is taken.

    Where the file system has no locks, a number is free only until its file exists.
    """
    path = lock_path(folder, writer)
    created = False
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        created = True
    held = open_unbuffered(path)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if isinstance(e, BlockingIOError) or not created:
            held.close()
            return None
    return held


def claim_idle(folder: Path, writers: Iterable[int], claims: contextlib.ExitStack) -> set[int]:
    """Take the numbers of writers that no process has, until `claims` is closed; return them."""
    idle = set()
    for writer in writers:
        if held := claim(folder, writer):
            claims.enter_context(held)
            idle.add(writer)
    return idle


def find_growing(folder: Path, writer: int) -> int | None:
    """Return the number of the growing shard that a writer left, and remove scales without a shard."""
    for scales in folder.glob(f"shard-{writer:03}-*{SCALES}"):
        if not scales.with_suffix(OPEN).exists():
            scales.unlink()
    return max((number_of(path) for path in folder.glob(f"shard-{writer:03}-*{OPEN}")), default=None)


def next_number(folder: Path, writer: int) -> int:
    """Return the number after a writer's last sealed shard, also if a compaction has removed that."""
    removed = re.fullmatch(rb"\d{1,9}", lock_path(folder, writer).read_bytes())
    numbers = [number_of(path) + 1 for path in folder.glob(f"shard-{writer:03}-*{SEALED}")]
    return max([int(removed[0]) if removed else 0, *numbers])


def remove_shard(folder: Path, writer: int, number: int) -> None:
    """Remove a shard without entries; the caller holds its writer's lock.

    Its number is not used again, because other processes may have the removed shard open.
    """
    with lock_path(folder, writer).open("r+b", buffering=0) as file:
        write_at(file, str(max(next_number(folder, writer), number + 1)).encode(), 0)
        sync(file.fileno())
    sealed = shard_path(folder, writer, number)
    for path in (sealed, sealed.with_suffix(OPEN), sealed.with_suffix(SCALES)):
        path.unlink(missing_ok=True)


def number_of(path: Path) -> int:
    """Number of the shard, or of the writer, that a file belongs to."""
    return int(path.stem.rpartition("-")[2])


def places_of(shards: Iterable[Path]) -> set[tuple[int, int]]:
    """Numbers of the writers and of the shards, from the paths of shards."""
    return {(int(path.name.split("-")[1]), number_of(path)) for path in shards}


class OpenShard:
    """A growing shard, new or left by another process.

    Args:
        folder: the store.
        writer: number of the writer.
        number: number of the shard.
        width: values per row.
        dtype: dtype of rows, a key of `DTYPES`.
    """

    def __init__(self, folder: Path, writer: int, number: int, width: int, dtype: str):
        self.number, self._width, self._dtype = number, width, dtype
        self._path = shard_path(folder, writer, number).with_suffix(OPEN)
        self._row_bytes = width * np.dtype(DTYPES[dtype]).itemsize
        # Unbuffered: written data is in the system's cache, and survives a kill.
        self._file = open_unbuffered(self._path)
        self._scales = open_unbuffered(self._path.with_suffix(SCALES)) if dtype == "int8" else None

    @property
    def rows_found(self) -> int:
        """Number of whole rows in the files, whether they count or not."""
        found = max(0, os.fstat(self._file.fileno()).st_size - HEADER_BYTES) // self._row_bytes
        return min(found, os.fstat(self._scales.fileno()).st_size // 4) if self._scales else found

    def num_bytes(self, num_rows: int) -> int:
        """Size of the header and `num_rows` rows."""
        return HEADER_BYTES + num_rows * self._row_bytes

    def write(self, start: int, values: Sequence[np.ndarray], scales: Sequence[np.ndarray]) -> None:
        """Write rows from row `start` on, and flush them to the disk."""
        with naming(self._path):
            write_at(self._file, b"".join(v.tobytes() for v in values), self.num_bytes(start))
            sync(self._file.fileno())
            if self._scales:
                write_at(self._scales, b"".join(s.tobytes() for s in scales), 4 * start)
                sync(self._scales.fileno())

    def seal(self, records: np.ndarray) -> None:
        """Turn the shard into a safetensors file with the rows of `records`, and close it.

        Without records it is removed.
        """
        if not len(records):
            self._path.with_suffix(SCALES).unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
            self._close()
            return
        num_rows = int((records["start"] + records["rows"]).max())
        parts = [("features", _SAFETENSORS[self._dtype], [num_rows, self._width], num_rows * self._row_bytes)]
        tail = records.tobytes()
        if self._scales:
            scales = os.pread(self._scales.fileno(), 4 * num_rows, 0)
            parts.append(("scales", "F32", [num_rows], len(scales)))
            tail = scales + tail
        parts.append(("records", "U8", [len(records), RECORD.itemsize], records.nbytes))
        tensors, end = {}, 0
        for name, dtype, shape, size in parts:
            tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        header = json.dumps({"__metadata__": {"format": "mlx"}, **tensors}).encode()
        write_at(self._file, tail, self.num_bytes(num_rows))
        # A safetensors header may be padded with spaces, so the rows need not move.
        write_at(self._file, struct.pack("<Q", HEADER_BYTES - 8) + header.ljust(HEADER_BYTES - 8), 0)
        with naming(self._path):
            os.ftruncate(self._file.fileno(), HEADER_BYTES + end)
            sync(self._file.fileno())
        os.rename(self._path, self._path.with_suffix(SEALED))
        flush(self._path.parent)
        self._path.with_suffix(SCALES).unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        self._file.close()
        if self._scales:
            self._scales.close()


def unseal(folder: Path, writer: int, number: int, width: int, dtype: str, records: np.ndarray) -> bool:
    """Reopen a sealed shard, unless it is damaged or its entries differ from the database's."""
    try:
        shard = Shard(folder, writer, number, width, dtype)
    except FeatureError:
        return False
    if shard.records is None or shard.records.tolist() != records.tolist():
        return False
    growing = shard.path.with_suffix(OPEN)
    if dtype == "int8":
        scales = growing.with_suffix(SCALES)
        scales.write_bytes(shard.read(0, shard.num_rows)[1].tobytes())
        flush(scales)
    os.rename(shard.path, growing)
    flush(folder)
    return True


def open_unbuffered(path: Path) -> FileIO:
    """Open a file for reading and writing, creating it if necessary; a link to one is refused."""
    more = os.O_CREAT | os.O_NOFOLLOW
    return open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | more, 0o666))

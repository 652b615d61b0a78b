"""Prefix cache: keys and values of earlier prompts in blocks, bounded in bytes, in memory and optionally on disk.

A block's digest covers all input from the beginning, so a block is right wherever it is found. Files are named by their
digest and by the SHA-256 of their contents; one that is damaged is deleted, and what it held is computed again.
"""

import hashlib
import io
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..files import check_file, read_file
from .prompts import Block

log = logging.getLogger(__name__)


class PrefixCache:
    """Least recently used cache of blocks of keys and values; for one thread.

    Args:
        max_bytes: of the blocks in memory.
        folder: where blocks are kept as files; None: nowhere.
        fingerprint: of the model, see `fingerprint`; files of another model are not read.
        max_folder_bytes: of the files, those of other models included.
        shape: the model's (layers, key-value heads, head_dim); files of another shape are not believed.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(
        self,
        max_bytes: int,
        folder: Path | None = None,
        fingerprint: str = "",
        max_folder_bytes: int = 8 * 10**9,
        shape: tuple[int, int, int] | None = None,
    ):
        self._shape = shape
        self._max_bytes, self._max_folder_bytes = max_bytes, max_folder_bytes
        self._blocks: OrderedDict[str, mx.array] = OrderedDict()  # the one used last at the end
        self._unsaved: OrderedDict[str, None] = OrderedDict()
        self._files: OrderedDict[str, tuple[Path, int]] = OrderedDict()  # digest to file and bytes, likewise
        self._others: list[tuple[float, Path, int]] = []  # files of other models
        self.nbytes = self.folder_bytes = 0
        self._folder = folder / fingerprint if folder else None
        if folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._list(folder)

    def fetch(self, blocks: Sequence[Block], most: int) -> tuple[int, mx.array | None]:
        """Fetch the longest cached prefix of a prompt.

        Args:
            blocks: the prompt's.
            most: tokens that may be taken.

        Returns:
            Its length in tokens, and keys and values (layers, 2, 1, heads, length, head_dim); or 0 and None.
        """
        found: list[mx.array] = []
        end = 0
        for block in blocks:
            if block.end > most or (held := self._get(block)) is None:
                break
            found.append(held)
            end = block.end
        # Its beginning outlives a block: without it, it could not be used.
        for block in reversed(blocks[: len(found)]):
            self._touch(block.digest)
        self._shrink()
        return end, mx.concatenate(found, axis=4) if found else None

    def store(self, blocks: Iterable[Block], held: Callable[[int, int], mx.array]) -> None:
        """Store blocks; `held(start, end)` copies keys and values of those not cached yet."""
        blocks = list(blocks)
        for block in blocks:
            if block.digest not in self._blocks:
                array = held(block.start, block.end)
                if array.nbytes > self._max_bytes:
                    return
                self._blocks[block.digest] = array
                self.nbytes += array.nbytes
                if self._folder is not None and block.digest not in self._files:
                    self._unsaved[block.digest] = None
        for block in reversed(blocks):
            self._touch(block.digest)
        self._shrink()

    def save_one(self) -> bool:
        """Write one block that is not on disk yet; return False if there is none."""
        if not self._unsaved:
            return False
        digest, _ = self._unsaved.popitem(last=False)
        self._save(digest)
        return True

    def _get(self, block: Block) -> mx.array | None:
        if block.digest in self._blocks:
            return self._blocks[block.digest]
        if block.digest not in self._files:
            return None
        path, size = self._files.pop(block.digest)
        array = _read(path, block, self._shape)
        if array is None:
            self.folder_bytes -= size
            return None
        self._files[block.digest] = path, size
        self._blocks[block.digest] = array
        self.nbytes += array.nbytes
        return array

    def _touch(self, digest: str) -> None:
        if digest in self._blocks:
            self._blocks.move_to_end(digest)
        if digest in self._files:
            self._files.move_to_end(digest)
            try:
                os.utime(self._files[digest][0])
            except OSError:
                self.folder_bytes -= self._files.pop(digest)[1]

    def _shrink(self) -> None:
        while self.nbytes > self._max_bytes:
            digest = next(iter(self._blocks))
            if digest in self._unsaved:
                del self._unsaved[digest]
                self._save(digest)
            self.nbytes -= self._blocks.pop(digest).nbytes

    def _save(self, digest: str) -> None:
        file = io.BytesIO()
        mx.save_safetensors(file, {"held": self._blocks[digest]})
        data = file.getbuffer()
        if len(data) > self._max_folder_bytes:
            return
        path = self._folder / f"{digest}-{hashlib.sha256(data).hexdigest()}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            self._make_room(len(data))
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as e:
            partial.unlink(missing_ok=True)
            log.warning("the prompt cache is not written on: %s", e)
            self._folder = None
            self._unsaved.clear()
            return
        self._files[digest] = path, len(data)
        self.folder_bytes += len(data)

    def _make_room(self, size: int) -> None:
        while self.folder_bytes + size > self._max_folder_bytes and (self._others or self._files):
            if self._others:
                _, path, old = self._others.pop(0)
            else:
                _, (path, old) = self._files.popitem(last=False)
            path.unlink(missing_ok=True)
            self.folder_bytes -= old

    def _list(self, folder: Path) -> None:
        """List files of earlier runs, least recently used first."""
        for partial in self._folder.glob("*.partial"):
            partial.unlink(missing_ok=True)
        found = sorted((p.stat().st_mtime, p, p.stat().st_size) for p in folder.glob("*/*.safetensors"))
        for modified, path, size in found:
            self.folder_bytes += size
            if path.parent == self._folder:
                self._files[path.stem.partition("-")[0]] = path, size
            else:
                self._others.append((modified, path, size))
        self._make_room(0)


def fingerprint(model, settings: object) -> str:
    """SHA-256, in hex, of a model's parameters and settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(memoryview(np.array(tensor.reshape(-1).view(mx.uint8))))
    return digest.hexdigest()


def _read(path: Path, block: Block, shape: tuple[int, int, int] | None) -> mx.array | None:
    """Read a block from a file; a damaged file is deleted and None returned."""
    try:
        check_file(path)
        data = read_file(path)
        if hashlib.sha256(data).hexdigest() == path.stem.partition("-")[2]:
            array = mx.load(io.BytesIO(data), format="safetensors")["held"]
            layers, heads, head_dim = shape or (array.shape[0], array.shape[3], array.shape[5])
            expected = (layers, 2, 1, heads, block.end - block.start, head_dim)
            if array.shape == expected and mx.issubdtype(array.dtype, mx.floating):
                mx.eval(array)
                return array
        log.warning("%s is damaged and was deleted", path)
    except (OSError, RuntimeError, ValueError, KeyError, IndexError) as e:
        log.warning("%s cannot be read and was deleted: %s", path, e)
    path.unlink(missing_ok=True)
    return None

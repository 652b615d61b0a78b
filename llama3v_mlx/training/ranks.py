"""Ranks of a distributed run: stop together on errors, compare values, broadcast the state of rank 0.

Under `mlx.launch` each rank may run on a machine with its own disk. A collective waits for all ranks, so every rank
must make the same calls in the same order.
"""

import contextlib
import json
import platform
import uuid
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..cli import error_line
from ..features.store import STORE


class RankError(ValueError):
    """Raised on all other ranks when a rank fails, differs, or cannot be reached."""


class Ranks:
    """The ranks of this run; without `mlx.launch`, this process only."""

    def __init__(self) -> None:
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()
        self._hosts = self.gather(platform.node())

    def name(self, rank: int) -> str:
        """A rank and its machine, for messages."""
        return f"rank {rank} ({self._hosts[rank]})"

    def gather(self, value: object) -> list:
        """Gather a JSON value from every rank, in order of ranks. A barrier.

        Raises:
            RankError: if the connection to a rank is lost.
        """
        if self.size == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        with self.connected():
            lengths = np.array(mx.distributed.all_gather(mx.array([len(data)]), stream=mx.cpu))
            padded = np.zeros((1, max(lengths)), np.uint8)
            padded[0, : len(data)] = data
            rows = np.array(mx.distributed.all_gather(mx.array(padded), stream=mx.cpu))
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block without collectives on every rank; an error on one stops all.

        Raises:
            RankError: if another rank failed; that rank raises its own error.
        """
        error = None
        try:
            yield
        except Exception as e:
            error = e
        failures = self.gather(error_line(error) if error else None)
        if error:
            raise error
        for rank, failure in enumerate(failures):
            if failure:
                raise RankError(f"{self.name(rank)} failed: {failure}")

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Run a block with collectives; turn MLX's error for a lost connection into a RankError."""
        try:
            yield
        except RuntimeError as e:
            if "peer" in str(e):
                raise RankError("lost the connection to another rank; see its output") from e
            raise

    def sharing(self, folder: Path) -> list[int]:
        """Ranks that share `folder` with this one, itself included: each creates a file and looks for the others'.

        Random names defeat negative caching on network disks. Ranks without permission to write share nothing.
        """
        if self.size == 1:
            return [0]
        own = folder / f"{STORE}.{uuid.uuid4().hex}"
        try:
            with contextlib.suppress(OSError):
                own.touch()
            names = self.gather(own.name)
            seen = [rank for rank, name in enumerate(names) if rank == self.rank or (folder / name).exists()]
            self.gather(None)  # all have looked before files are removed
            return seen
        finally:
            own.unlink(missing_ok=True)

    def take_first(self, tree: dict) -> dict:
        """Broadcast rank 0's arrays in a tree whose names, shapes and dtypes are the same on all ranks."""
        if self.size == 1:
            return tree
        taken = []
        with self.connected():
            for name, x in sorted(tree_flatten(tree)):
                x = mx.distributed.all_sum(x if self.rank == 0 else mx.zeros_like(x), stream=mx.cpu)
                mx.eval(x)
                taken.append((name, x))
        return tree_unflatten(taken)

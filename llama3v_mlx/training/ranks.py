"""Ranks of a distributed run: fail together, compare what must be equal, and take over the state of rank 0.

Under `mlx.launch` each rank may run on a machine of its own, with its own disk. A collective waits for all ranks, so
every rank must make the same calls here in the same order; none may hang on what only one of them knows.
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
    """Another rank has failed, cannot be reached, or differs; the same on all ranks that have not failed themselves."""


class Ranks:
    """The ranks of this run, of which this process is one; without `mlx.launch` the only one."""

    def __init__(self) -> None:
        self.group = mx.distributed.init()
        self.rank, self.size = self.group.rank(), self.group.size()
        self._hosts = self.gather(platform.node())

    def name(self, rank: int) -> str:
        """A rank with its machine, for people."""
        return f"rank {rank} ({self._hosts[rank]})"

    def gather(self, value: object) -> list:
        """Exchange a JSON value, and return those of all ranks in their order. A barrier.

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
        """Run a block without collectives on every rank; an error in one of them ends all.

        Raises:
            RankError: if another rank has failed; what it raised is raised there.
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
                raise RankError(f"{self.name(rank)} has stopped: {failure}")

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Run a block with collectives, and turn MLX's words for a lost connection into a RankError."""
        try:
            yield
        except RuntimeError as e:
            if "peer" in str(e):
                raise RankError("another rank has ended, or its machine cannot be reached; see what it said") from e
            raise

    def sharing(self, folder: Path) -> list[int]:
        """The ranks that see the same `folder` as this one, itself included: each leaves a file, and looks for all.

        The files have random names, so a network disk cannot remember that they were not there. Ranks that may not
        write to the folder share nothing: they have no work to share.
        """
        if self.size == 1:
            return [0]
        own = folder / f"{STORE}.{uuid.uuid4().hex}"
        try:
            with contextlib.suppress(OSError):
                own.touch()
            names = self.gather(own.name)
            seen = [rank for rank, name in enumerate(names) if rank == self.rank or (folder / name).exists()]
            self.gather(None)  # all have looked
            return seen
        finally:
            own.unlink(missing_ok=True)

    def take_first(self, tree: dict) -> dict:
        """Rank 0's arrays, in a tree of the same names, shapes and dtypes on all ranks.

        This sends as much as a step sends for as many gradients.
        """
        if self.size == 1:
            return tree
        taken = []
        with self.connected():
            for name, x in sorted(tree_flatten(tree)):
                x = mx.distributed.all_sum(x if self.rank == 0 else mx.zeros_like(x), stream=mx.cpu)
                mx.eval(x)
                taken.append((name, x))
        return tree_unflatten(taken)

"""Cosine similarities in a store of pooled embeddings: the nearest to a query, and near-duplicates."""

from collections.abc import Callable, Iterator, Set
from typing import Any

import mlx.core as mx
import numpy as np

from .store import FeatureError, FeatureStore

NEAR = 0.97  # cosine of near-duplicates
_BLOCK = 2048  # rows in a block of near-duplicates


class Ranking:
    """Cosines of the entries of a store with queries; norms are computed once, and again after the store changed.

    A query over float32 rows is a matrix product over the mapped shards.

    Raises:
        FeatureError: if the store does not hold one row per image.
    """

    def __init__(self, store: FeatureStore):
        if store.info.kind != "pooled":
            raise FeatureError(f"{store.folder}: holds {store.info.kind} features; embed with --kind pooled to search")
        self.store = store
        self._norms = np.zeros(0, np.float32)
        self._version: int | None = None

    def refresh(self) -> bool:
        """Include what was added to the store, by whatever process; return False if nothing changed."""
        version = self.store.database.rows("PRAGMA data_version")[0][0]
        if version == self._version:
            return False
        self.store.refresh()
        self._norms = np.zeros(0, np.float32)
        self._version = version
        return True

    def near_duplicates(self, least: float) -> list[list[bytes]]:
        """See `near_duplicates`."""
        return self._reading(lambda: near_duplicates(self.store, least))

    def cosines(self, query: np.ndarray) -> np.ndarray:
        """Cosines (n,) of all entries, in the order of the store, with a query (width,)."""
        return self._reading(lambda: self._cosines(query))

    def _reading(self, read: Callable[[], Any]) -> Any:
        """Read the store; once more if another process has compacted it meanwhile."""
        while True:
            try:
                return read()
            except FeatureError:
                if not self.refresh():
                    raise

    def _cosines(self, query: np.ndarray) -> np.ndarray:
        query = (query / np.linalg.norm(query)).astype(np.float32)
        found, norms = np.zeros(len(self.store.keys()), np.float32), self._norms
        fresh = len(norms) != len(found)
        if fresh:
            norms = np.zeros(len(found), np.float32)
        start = 0
        for block in self.store.matrix():
            end = start + len(block)
            np.dot(block, query, out=found[start:end])
            if fresh:
                norms[start:end] = np.sqrt(np.einsum("ij,ij->i", block, block))
            start = end
        self._norms = norms
        return found / norms

    def best(self, query: np.ndarray, among: Set[bytes] | None = None) -> Iterator[tuple[bytes, float]]:
        """Yield (SHA-256, cosine) of all entries, best first; the first ones are found without sorting all.

        Args:
            query: (width,).
            among: SHA-256 of the entries to choose from; None: all.
        """
        cosines = self.cosines(query)
        keys = self.store.keys()
        places = np.arange(len(keys))
        if among is not None:
            places = np.flatnonzero([key in among for key in keys.tolist()])
        count, done = 64, 0
        while done < len(places):
            scores = -cosines[places]
            count = min(count, len(places))
            best = np.argpartition(scores, count - 1)[:count]
            best = best[np.argsort(scores[best], kind="stable")]
            for place in places[best[done:]]:
                yield keys[place].tobytes(), float(cosines[place])
            done, count = count, count * 16


def nearest(store: FeatureStore, query: np.ndarray, top: int) -> list[tuple[bytes, float]]:
    """Return at most `top` entries of a pooled store with the highest cosine to a query (width,): (SHA-256, cosine)."""
    return [hit for hit, _ in zip(Ranking(store).best(query), range(top), strict=False)]


def near_duplicates(store: FeatureStore, least: float = NEAR) -> list[list[bytes]]:
    """Return groups of images whose embeddings are connected by cosines of `least` or more.

    Two blocks of rows are in memory at a time.
    """
    blocks, end = [], 0  # with the position of their first row
    for block in store.matrix():
        for a in range(0, len(block), _BLOCK):
            blocks.append((end, block[a : a + _BLOCK]))
            end += len(blocks[-1][1])
    first = np.arange(end)  # of each row's group
    for index, (a, rows) in enumerate(blocks):
        x = _unit(rows)
        for b, others in blocks[index:]:
            i, j = np.nonzero(np.array(x @ _unit(others).T >= least))
            _connect(first, a + i, b + j)
    groups: dict[int, list[bytes]] = {}
    for i, key in zip(first.tolist(), store.keys(), strict=True):
        groups.setdefault(i, []).append(key.tobytes())
    return [group for group in groups.values() if len(group) > 1]


def _connect(first: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Unite the groups of rows `a` and `b`, pair by pair; `first` has the first row of each row's group."""
    while True:
        x, y = first[a], first[b]
        apart = x != y
        if not apart.any():
            return
        a, b, x, y = a[apart], b[apart], x[apart], y[apart]
        np.minimum.at(first, np.maximum(x, y), np.minimum(x, y))
        while (flat := first[first]).tobytes() != first.tobytes():
            first[:] = flat


def _unit(rows: np.ndarray) -> mx.array:
    x = mx.array(rows)
    return x / mx.linalg.norm(x, axis=1, keepdims=True)

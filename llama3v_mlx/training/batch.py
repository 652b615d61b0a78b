"""Batches of encoded rows with their stored features."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..features.store import Features, FeatureStore
from .data import Dialogue

LENGTH_STEP = 32  # lengths are padded to a multiple of this, so that few shapes are compiled


@dataclass(frozen=True)
class Batch:
    """B rows of at most L tokens with M visual tokens, and n positions to predict."""

    ids: mx.array  # int32 (B, L)
    source: mx.array | None  # int32 (B·L,): index of the token's embedding, or B·L + visual token; None: no images
    positions: mx.array  # int32 (n,): positions to predict from, in B·L
    targets: mx.array  # int32 (n,): the next tokens there
    weights: mx.array  # float32 (n,): 0 for padding
    visual: list[mx.array]  # (M, hidden_size) visual tokens, or (tiles, h·w, width) patch features by tile size
    grids: tuple[tuple[int, int], ...]  # (h, w) of each array of patch features; empty for visual tokens

    def arrays(self) -> list:
        """Arguments of a compiled function; it is compiled again for other `grids`."""
        return [self.ids, self.source, self.positions, self.targets, self.weights, self.visual]


def count_answers(dialogues: Sequence[Dialogue]) -> int:
    """Number of tokens in the loss: those of answers, with their end-of-turn tokens."""
    return sum(int(d.answers[1:].sum()) for d in dialogues)


def collate(
    dialogues: Sequence[Dialogue],
    store: FeatureStore,
    image_token: int,
    num_queries: int,
    length_step: int = LENGTH_STEP,
) -> Batch:
    """Collate rows and the stored features of their images into one batch.

    Args:
        dialogues: encoded rows.
        store: patch features or visual tokens of their images.
        image_token: id of the placeholder of one visual token.
        num_queries: visual tokens per tile.
        length_step: lengths are padded to a multiple of this.
    """
    B, L = len(dialogues), _round_up(max(len(d.ids) for d in dialogues), length_step)
    ids, is_answer = np.zeros((B, L), np.int32), np.zeros((B, L), bool)
    is_image = np.zeros((B, L), bool)
    for i, d in enumerate(dialogues):
        ids[i, : len(d.ids)], is_answer[i, : len(d.ids)] = d.ids, d.answers
        is_image[i, : len(d.ids)] = d.ids == image_token
    images = [store.get(sha256) for d in dialogues for sha256 in d.images]
    if store.info.kind == "visual-tokens":
        order, visual, grids = np.arange(is_image.sum()), [image.rows for image in images], ()
        visual = [mx.concatenate(visual)] if visual else []
    else:
        order, visual, grids = _patches_by_size(images, num_queries)
    source = None
    if images:
        source = np.arange(B * L, dtype=np.int32)
        source[is_image.reshape(-1)] = B * L + order
        source = mx.array(source)
    targets = np.flatnonzero(is_answer[:, 1:].reshape(-1))
    rows, columns = np.divmod(targets, L - 1)
    positions = rows * L + columns
    padding = _round_up(len(positions), 2 * length_step) - len(positions)
    weights = np.pad(np.ones(len(positions), np.float32), (0, padding))
    positions = np.pad(positions, (0, padding)).astype(np.int32)
    targets = ids.reshape(-1)[positions + 1]
    return Batch(mx.array(ids), source, mx.array(positions), mx.array(targets), mx.array(weights), visual, grids)


def _patches_by_size(images: Sequence[Features], num_queries: int) -> tuple[np.ndarray, list[mx.array], tuple]:
    """Stack patch features by tile size; return the order of visual tokens, the stacks, and their (h, w)."""
    tiles: dict[tuple[int, int], list[mx.array]] = {}
    indices: list[tuple[tuple[int, int], int]] = []  # (h, w) of each tile, and its index among those of that size
    for image in images:
        start = 0
        cells = [image.overview] + [image.cell] * (image.grid[0] * image.grid[1] if image.grid else 0)
        for w, h in cells:
            of_size = tiles.setdefault((h, w), [])
            indices.append(((h, w), len(of_size)))
            of_size.append(image.rows[start : start + w * h])
            start += w * h
    first, total = {}, 0
    for size, of_size in tiles.items():
        first[size] = total
        total += len(of_size)
    numbers = np.array([first[size] + number for size, number in indices], np.int64)
    order = (numbers[:, None] * num_queries + np.arange(num_queries)).reshape(-1)
    return order, [mx.stack(of_size) for of_size in tiles.values()], tuple(tiles)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step

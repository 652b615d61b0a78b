"""Embeddings of a picture search's queries."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from .encoder import ImageEncoder, TextEncoder
from .grammar import QueryError, Term


def embed_query(terms: Sequence[Term], encoder: ImageEncoder, texts: Callable[[], TextEncoder]) -> np.ndarray:
    """Return the weighted sum (width,) of the terms' embeddings, each of length 1.

    Raises:
        QueryError: if the terms cancel out.
        ImageError: if an image is unusable.
    """
    total = np.zeros(encoder.width, np.float32)
    for term in terms:
        if term.image is not None:
            row = encoder.encode([encoder.prepare(term.image)])[0].rows[0]
        else:
            row = texts().encode([term.text])[0]
        row = np.array(row.astype(mx.float32))
        total += term.weight * row / np.linalg.norm(row)
    if np.linalg.norm(total) < 1e-6:
        raise QueryError("the terms of the query cancel out")
    return total

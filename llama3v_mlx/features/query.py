"""Embeddings of a picture search's queries."""

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..models.siglip import SigLIP
from .encoder import ImageEncoder, TextEncoder
from .grammar import QueryError, Term


def embed_query(terms: Sequence[Term], encoder: ImageEncoder, texts: Callable[[], TextEncoder]) -> np.ndarray:
    """Return the weighted sum (width,) of the terms' embeddings, each of length 1.

    Raises:
        QueryError: if the terms cancel out.
        ImageError: if an image is unusable.
    """
    rows = []
    for term in terms:
        if term.image is not None:
            row = encoder.encode([encoder.prepare(term.image)])[0].rows[0]
        else:
            row = texts().encode([term.text])[0]
        row = np.array(row.astype(mx.float32))
        rows.append(row / np.linalg.norm(row))
    return combine(terms, rows)


def combine(terms: Sequence[Term], rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the weighted sum (width,) of the terms' embeddings `rows`, each (width,) and of length 1.

    Raises:
        QueryError: if the terms cancel out.
    """
    total = sum(term.weight * row for term, row in zip(terms, rows, strict=True))
    if np.linalg.norm(total) < 1e-6:
        raise QueryError("the terms of the query cancel out")
    return total


def match_probability(model: SigLIP) -> Callable[[float], float]:
    """Return SigLIP's probability that an image matches a text, as a function of their cosine."""
    scale, bias = math.exp(model.logit_scale.item()), model.logit_bias.item()
    return lambda cosine: 1 / (1 + math.exp(-scale * cosine - bias))

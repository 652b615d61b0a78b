"""Embeddings for the server: requests that come together are computed together."""

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoint import find_checkpoint
from ..features.encoder import TextEncoder, load_encoder
from ..image import TiledImage

GATHER_SECONDS = 0.005  # how long the first of a batch waits for others
BATCH_SIZE = 32


@dataclass(frozen=True)
class _Wanted:
    """One embedding to be computed."""

    thing: TiledImage | np.ndarray  # or token ids
    result: Future


class Embedder:
    """A SigLIP on a thread of its own; `embed` may be called from any number of others.

    Args:
        path_or_hf_repo: a SigLIP checkpoint with a pooling head.
    """

    def __init__(self, path_or_hf_repo: str | Path):
        self._path = path_or_hf_repo
        self._queue: queue.Queue[_Wanted] = queue.Queue()
        self._ready: Future = Future()
        self.batches: list[int] = []  # sizes of the last ones, for tests and figures
        threading.Thread(target=self._run, daemon=True).start()

    def embed(self, inputs: Sequence[str]) -> tuple[list[np.ndarray], int]:
        """The embeddings, float32 (width,) of length 1, of texts and of images given as data: URIs; and text tokens.

        Raises:
            ImageError: if an image cannot be used.
            CheckpointError: if there is no such checkpoint, or it has no text tower for texts.
        """
        encoder, texts = self._ready.result()
        num_tokens, wanted = 0, []
        for text in inputs:
            if text[:5].lower() == "data:":
                thing = encoder.prepare(text)
            else:
                if isinstance(texts, Exception):
                    raise texts
                thing = texts.tokenize([text])[0]
                num_tokens += int((thing != TextEncoder.EOS).sum()) + 1
            wanted.append(_Wanted(thing, Future()))
        for each in wanted:
            self._queue.put(each)
        return [each.result.result() for each in wanted], num_tokens

    def _run(self) -> None:
        try:
            encoder = load_encoder(self._path, "pooled")
            try:
                texts = TextEncoder(find_checkpoint(self._path), encoder.model)
            except ValueError as e:
                texts = e
            self._ready.set_result((encoder, texts))
        except Exception as e:
            self._ready.set_exception(e)
            return
        while True:
            batch = [self._queue.get()]
            limit = time.monotonic() + GATHER_SECONDS
            while len(batch) < BATCH_SIZE:
                try:
                    batch.append(self._queue.get(timeout=max(0.0, limit - time.monotonic())))
                except queue.Empty:
                    break
            self.batches = [*self.batches[-99:], len(batch)]
            for kind in (TiledImage, np.ndarray):
                chosen = [each for each in batch if isinstance(each.thing, kind)]
                if chosen:
                    self._compute(encoder, texts, chosen)

    def _compute(self, encoder, texts, chosen: list[_Wanted]) -> None:
        try:
            things = [each.thing for each in chosen]
            if isinstance(things[0], TiledImage):
                rows = mx.concatenate([features.rows for features in encoder.encode(things)])
            else:
                rows = texts.model.text_tower(mx.array(np.stack(things)))
            rows = np.array(rows.astype(mx.float32))
            for each, row in zip(chosen, rows / np.linalg.norm(rows, axis=1, keepdims=True), strict=True):
                each.result.set_result(row)
        except Exception as e:
            for each in chosen:
                each.result.set_exception(e)

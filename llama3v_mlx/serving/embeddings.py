"""Embeddings for the server: concurrent requests are batched, on the thread that owns the models."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoint import find_checkpoint
from ..features.encoder import TextEncoder, load_encoder
from ..image import ImageError
from ..tiling import TiledImage
from .checks import RequestError, bad
from .images import RequestImage, read_image
from .prompts import DECODING
from .requests import Limits

BATCH_SIZE = 8
MAX_CHARACTERS = 1 << 15  # of a text, of which SigLIP sees some 64 tokens


@dataclass(frozen=True)
class _Wanted:
    """A pending embedding."""

    thing: TiledImage | np.ndarray  # or token ids
    result: Future


class Embedder:
    """The two towers of a SigLIP.

    Args:
        path_or_hf_repo: a SigLIP checkpoint with a pooling head.
        run: has a generator run, step by step, by the thread that owns the models.

    Raises:
        CheckpointError: if there is no such checkpoint.
    """

    def __init__(self, path_or_hf_repo: str | Path, run: Callable[[Iterator[None]], None]):
        self.name, self.model = Path(path_or_hf_repo).name, str(path_or_hf_repo)
        self.batches: list[int] = []  # sizes of the last ones, for tests and figures
        self._run = run
        self._queue: queue.SimpleQueue[_Wanted] = queue.SimpleQueue()
        self.encoder = load_encoder(path_or_hf_repo, "pooled")
        try:
            self.texts = TextEncoder(find_checkpoint(path_or_hf_repo), self.encoder.model)
        except ValueError as e:
            self.texts = e

    def embed(
        self, inputs: Sequence[str], limits: Limits, timeout: float, where: str = "input[{}]"
    ) -> tuple[list[np.ndarray], int]:
        """Return unit embeddings of inputs, float32 (width,), and the number of text tokens.

        Args:
            inputs: texts, and images as data: URIs.
            limits: of all images together.
            timeout: seconds.
            where: name of an input in errors, by its number.

        Raises:
            RequestError: if an image cannot be used, the checkpoint has no text tower for texts, or time is up.
        """
        end = time.monotonic() + timeout
        images, num_tokens, pixels, results = {}, 0, 0, []
        for i, given in enumerate(inputs):
            place = where.format(i)
            if given[:5].lower() == "data:":
                images[i] = image = read_image(given, place)
                pixels += image.size[0] * image.size[1]
                if pixels > limits.max_pixels:
                    message = f"images of over {limits.max_pixels:,} pixels together; send fewer at once"
                    raise bad(place, message, "too_many_pixels")
            elif isinstance(self.texts, Exception):
                raise bad(place, str(self.texts))
            elif len(given) > MAX_CHARACTERS:
                raise bad(place, f"has over {MAX_CHARACTERS:,} characters")
        for i, given in enumerate(inputs):
            if i in images:
                thing = self._prepare(images[i])
            else:
                thing = self.texts.tokenize([given])[0]
                num_tokens += int((thing != TextEncoder.EOS).sum()) + 1
            results.append(Future())
            self._queue.put(_Wanted(thing, results[-1]))
            if len(results) % BATCH_SIZE == 0 or len(results) == len(inputs):
                self._run(self._compute_all())
                # At most two batches are in memory: 30 kB of JSON with 256 images of a pixel would take 113 MB.
                _wait(results[:-BATCH_SIZE], end, timeout)
        _wait(results, end, timeout)
        return [each.result() for each in results], num_tokens

    def _prepare(self, image: RequestImage) -> TiledImage:
        try:
            with DECODING:
                return self.encoder.prepare(image.data)
        except ImageError as e:
            raise bad(image.where, str(e), "invalid_image") from e

    def _compute_all(self) -> Iterator[None]:
        """Compute pending embeddings, batch by batch."""
        while batch := self._take():
            self.batches = [*self.batches[-99:], len(batch)]
            for kind in (TiledImage, np.ndarray):
                if chosen := [each for each in batch if isinstance(each.thing, kind)]:
                    self._compute(chosen)
                    yield

    def _take(self) -> list[_Wanted]:
        batch: list[_Wanted] = []
        while len(batch) < BATCH_SIZE:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return batch

    def _compute(self, chosen: Sequence[_Wanted]) -> None:
        try:
            things = [each.thing for each in chosen]
            if isinstance(things[0], TiledImage):
                rows = mx.concatenate([features.rows for features in self.encoder.encode(things)])
            else:
                rows = self.texts.model.text_tower(mx.array(np.stack(things)))
            rows = np.array(rows.astype(mx.float32))
            for each, row in zip(chosen, rows / np.linalg.norm(rows, axis=1, keepdims=True), strict=True):
                each.result.set_result(row)
        except Exception as e:
            for each in chosen:
                each.result.set_exception(e)


def _wait(results: Sequence[Future], end: float, timeout: float) -> None:
    """Wait for results until `end` by time.monotonic, which is `timeout` seconds after the request."""
    if wait(results, max(0.0, end - time.monotonic())).not_done:
        raise RequestError(504, f"no answer within {timeout:.0f} s", "timeout")

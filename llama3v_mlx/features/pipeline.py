"""Embed image files into a feature store: decode in threads, encode in batches, write one batch during the next."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import mlx.core as mx

from ..image import ImageFacts, image_sha256, read_facts
from ..tiling import TiledImage
from .encoder import ImageEncoder
from .shards import FeatureError
from .sources import FileStat, Source, reason
from .writer import FeatureWriter


@dataclass
class Report:
    """Counts of images and seconds per stage (read and decode: summed over all threads)."""

    new: int = 0
    known: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "decode", "tower", "write"), 0.0))
    wall: float = 0.0
    flops: float = 0.0

    @property
    def seen(self) -> int:
        """Number of images read, or tried to."""
        return self.new + self.known + len(self.failed)


class Pipeline:
    """Embed images into a store: decode in threads, encode in batches, write one batch while the next is encoded."""

    def __init__(
        self,
        encoder: ImageEncoder,
        writer: FeatureWriter,
        batch_size: int,
        workers: int,
        progress: Callable[[Report], None],
    ):
        self.encoder, self.writer, self.batch_size = encoder, writer, batch_size
        self.progress, self.report = progress, Report()
        self._pool = ThreadPoolExecutor(workers)
        # Maximum number of decoded images waiting for the tower: enough to keep it busy, within bounded memory.
        self._ahead = 2 * batch_size + 2 * workers
        self._claimed: set[bytes] = set()  # images being encoded
        self._twins: list[tuple[bytes, tuple]] = []  # further names of those
        self._batch, self._flying = [], None
        # Casting and checking evaluated rows on the tower's stream would wait for the next batch.
        self._host = mx.new_stream(mx.cpu)

    def run(self, sources: Iterator[Source]) -> Report:
        """Embed all of `sources`. On Ctrl-C or an error, started batches are finished and stored."""
        start, waiting = time.perf_counter(), deque()
        try:
            for source in sources:
                waiting.append(((source.name, source.stat), self._pool.submit(self._prepare, source)))
                if len(waiting) >= self._ahead:
                    self._take(*waiting.popleft())
            while waiting:
                self._take(*waiting.popleft())
        except (KeyboardInterrupt, FeatureError):  # finish only the started batches
            waiting.clear()
            raise
        finally:
            while waiting:
                self._take(*waiting.popleft())
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._send()
            self._write()
            for sha256, name in self._twins:
                self.report.known += 1
                self.writer.name(sha256, *name)
            self.report.wall = time.perf_counter() - start
        return self.report

    def _prepare(self, source: Source) -> tuple[bytes, TiledImage | None, ImageFacts, float, float]:
        """Return (SHA-256, tiles or None if already stored, facts, seconds of reading, seconds of decoding)."""
        start = time.perf_counter()
        image = source.read()
        sha256 = image_sha256(image, self.encoder.tiling)
        middle = time.perf_counter()
        tiled = None if sha256 in self.writer.store else self.encoder.prepare(image)
        return sha256, tiled, read_facts(image, self.encoder.tiling), middle - start, time.perf_counter() - middle

    def _take(self, name: tuple[str, FileStat | None], future: Future) -> None:
        try:
            sha256, tiled, facts, read, decode = future.result()
        except FeatureError:  # of the store, not of this image
            raise
        except (OSError, ValueError) as e:
            self.report.failed.append((name[0], reason(e, name[0])))
            self.progress(self.report)
            return
        name = (*name, facts)
        self.report.seconds["read"] += read
        self.report.seconds["decode"] += decode
        if sha256 in self._claimed:
            self._twins.append((sha256, name))
            return
        if tiled is None or sha256 in self.writer.store:
            self.report.known += 1
            self.writer.name(sha256, *name)
            self.progress(self.report)
            return
        self._claimed.add(sha256)
        self._batch.append((sha256, name, tiled))
        if sum(len(tiled.tiles) for *_, tiled in self._batch) >= self.batch_size:
            self._send()

    def _send(self) -> None:
        """Start encoding the current batch, and write the previous one."""
        batch = self._batch
        if not batch:
            return
        start = time.perf_counter()
        features = self.encoder.encode([tiled for *_, tiled in batch])
        mx.async_eval([f.rows for f in features])
        self.report.seconds["tower"] += time.perf_counter() - start
        self._write()
        self._flying = [(sha256, name, f) for (sha256, name, _), f in zip(batch, features, strict=True)]
        self._batch = []
        patch = self.encoder.config.patch_size
        for tile in (tile for *_, tiled in batch for tile in tiled.tiles):
            self.report.flops += self.encoder.flops((tile.shape[1] // patch * patch, tile.shape[0] // patch * patch))

    def _write(self) -> None:
        """Store the encoded batch. If interrupted, it can be called again."""
        flying = self._flying
        if not flying:
            return
        start = time.perf_counter()
        mx.eval([f.rows for *_, f in flying])
        middle = time.perf_counter()
        # Names first: a name without features is harmless, but features without a name cannot be found.
        for sha256, name, _ in flying:
            self.writer.name(sha256, *name)
        with mx.stream(self._host):
            new = self.writer.add([(sha256, f) for sha256, _, f in flying])
        self._claimed.difference_update(sha256 for sha256, *_ in flying)
        self._flying = None
        self.report.new += new
        self.report.known += len(flying) - new  # another process was faster
        self.report.seconds["tower"] += middle - start
        self.report.seconds["write"] += time.perf_counter() - middle
        self.progress(self.report)

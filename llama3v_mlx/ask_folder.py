"""Ask about every image of folders: `llama3v generate --images FOLDER --prompt "…" --out answers.jsonl`.

Images are read and cut into tiles in threads, while earlier ones are answered in mlx-lm's continuous batch. An image is
identified by the SHA-256 of its bytes, so one that was answered under another name is not asked about again.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from .answers import AnswerFile, check_settings, to_line
from .batch_generate import Answer, ImageBatch
from .checkpoint import find_checkpoint, name_of
from .cli import error_line, loading_options
from .demo import CHECKPOINT
from .features.image_files import ImageFile, look_up
from .features.lookup import FeatureCache
from .features.sources import Skipped, Source, count_sources, find_sources, reason
from .files import printable
from .generation import load
from .image import image_sha256, tile_image
from .memory import footprint, num_answers
from .schema import Schemas
from .serving.batch import Settings
from .serving.prefix_cache import fingerprint
from .tiling import ImageConfig, TiledImage

WORKERS = min(4, os.cpu_count() or 1)  # threads that decode images
AHEAD = 2 * WORKERS  # images being decoded, or waiting for the batch
BATCH_SIZE = 16  # most answers at once, unless --batch-size says otherwise


class Lines:
    """Answers on stdout, in the order in which they are done; it has the methods of an `AnswerFile`."""

    def __contains__(self, sha256: bytes) -> bool:
        return False

    def has_answer(self, path: str) -> bool:
        return False

    def is_unchanged(self, path: str, stat: object) -> bool:
        return False

    def write(self, row: dict) -> None:
        line = to_line(row).decode().rstrip()
        is_harmless = printable(line) == line  # JSON escapes some of what a terminal obeys, and ASCII has no more
        print(line if is_harmless else json.dumps(row), flush=True)


class Asking:
    """Ask about images, and write a line about each.

    Args:
        batch: generates the answers.
        answers: where the lines go.
        image_config: slicing of the images.
        features: the feature store of the batch.
        is_json: whether answers are JSON, and are written as such.
        progress: called after each image.
    """

    def __init__(
        self,
        batch: ImageBatch,
        answers: AnswerFile | Lines,
        image_config: ImageConfig,
        features: FeatureCache | None,
        is_json: bool,
        progress: Callable[["Asking"], None],
    ):
        self._batch, self._answers, self._features = batch, answers, features
        self._image_config, self._is_json, self._progress = image_config, is_json, progress
        self._waiting: deque[tuple[ImageFile, str, Future]] = deque()
        self._asked: dict[bytes, list[ImageFile]] = {}  # files of the images in the batch
        self.paths: dict[str, None] = {}  # in the order of the sources
        self.new = self.known = self.tokens = 0
        self.failed: list[tuple[str, str]] = []

    @property
    def seen(self) -> int:
        return self.new + self.known + len(self.failed)

    def run(self, sources: Iterator[Source]) -> None:
        """Ask about all images; on any exception, unfinished answers are dropped."""
        pool = ThreadPoolExecutor(WORKERS)
        try:
            more = True
            while more or self._waiting or not self._batch.is_idle:
                while more and len(self._waiting) < AHEAD:
                    source = next(sources, None)
                    more = source is not None
                    if more:
                        self._look_at(source, pool)
                while self._batch.has_room and self._waiting:
                    if not (self._batch.is_idle or self._waiting[0][2].done()):
                        break  # generate meanwhile
                    self._take(*self._waiting.popleft())
                for sha256, answer in self._batch.step():
                    self._write(self._asked.pop(sha256), sha256, answer)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _look_at(self, source: Source, pool: ThreadPoolExecutor) -> None:
        """Start reading a source, unless it is a file that was answered and has not changed."""
        file = look_up([source.name])[source.name]
        if file.path in self.paths:
            return
        self.paths[file.path] = None
        if self._answers.is_unchanged(file.path, file.stat):
            self.known += 1
            self._progress(self)
        elif file.stat is None and not file.is_gone:  # pages and archives' members are "gone", too
            self._fail(file, file.problem, is_unread=True)
        else:
            self._waiting.append((file, source.name, pool.submit(self._prepare, source)))

    def _prepare(self, source: Source) -> tuple[bytes, TiledImage | None]:
        """Return an image's SHA-256, and its tiles unless they are not needed; runs in a thread."""
        image = source.read()
        sha256 = image_sha256(image, self._image_config)
        if sha256 in self._answers or (self._features and sha256 in self._features.store):
            return sha256, None
        return sha256, dataclasses.replace(tile_image(image, self._image_config), sha256=sha256)

    def _take(self, file: ImageFile, name: str, future: Future) -> None:
        try:
            sha256, tiled = future.result()
        except (OSError, ValueError) as e:
            self._fail(file, reason(e, name), is_unread=isinstance(e, OSError))
            return
        if sha256 in self._asked:
            self._asked[sha256].append(file)
        elif sha256 in self._answers:
            self._answers.write({**self._answers.copy(sha256), "path": file.path, "stat": file.stat})
            self.known += 1
            self._progress(self)
        else:
            self._ask(file, sha256, tiled or self._features.stored(sha256))

    def _ask(self, file: ImageFile, sha256: bytes, tiled: TiledImage) -> None:
        try:
            self._batch.add(sha256, tiled)
        except ValueError as e:
            self._fail(file, str(e))
        else:
            self._asked[sha256] = [file]

    def _write(self, files: list[ImageFile], sha256: bytes, answer: Answer | Exception) -> None:
        for file in files:
            if isinstance(answer, Exception):
                self._fail(file, error_line(answer))
                continue
            said: object = answer.text
            if self._is_json and answer.finish_reason == "stop":
                with contextlib.suppress(ValueError):  # Python refuses integers of over 4300 digits
                    said = json.loads(answer.text)
            row = {"path": file.path, "answer": said, "finish_reason": answer.finish_reason}
            row |= {"tokens": answer.num_tokens, "sha256": sha256.hex(), "stat": file.stat}
            self._answers.write(row)
            self.new += 1
            self.tokens += answer.num_tokens
            self._progress(self)

    def _fail(self, file: ImageFile, why: str, is_unread: bool = False) -> None:
        """Write an error; an answer about a file that can no longer be read is kept."""
        if not (is_unread and self._answers.has_answer(file.path)):
            self._answers.write({"path": file.path, "error": why})
        self.failed.append((file.path, why))
        self._progress(self)


def ask_folder(args: argparse.Namespace, prompt: str, schema: dict | None) -> None:
    """Load the model, answer the prompt about each image of `args.images`, and report on stderr."""
    out = None if args.out in (None, "-") else Path(os.path.realpath(args.out))
    seed = 0 if args.seed is None else args.seed
    settings = {"prompt": prompt, "system_prompt": args.system_prompt, "max_tokens": args.max_tokens}
    settings |= {"max_image_tiles": args.max_image_tiles, "seed": seed, "schema": schema}
    if out:
        check_settings(out, settings)  # before a large model is loaded
    skipped = Skipped()
    sources = find_sources(args.images, skipped)
    first = next(sources, None)
    if first is None:
        raise ValueError(f"{', '.join(args.images)}: no images found{skipped.details()}")

    name = args.model or CHECKPOINT
    text = (args.system_prompt or "") + prompt  # a token is at least a byte of it
    needs = {"images": 1, "text_tokens": args.max_tokens + len(text.encode())}
    options = loading_options(args, name, **needs)
    need = footprint(find_checkpoint(name), **needs, max_image_tiles=args.max_image_tiles, **options)
    batch_size = args.batch_size or num_answers(need, BATCH_SIZE)
    model, processor = load(name, max_image_tiles=args.max_image_tiles, adapter_path=args.adapter_path, **options)
    own = {name: getattr(args, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
    sampling = processor.sampling.override(temperature=args.temp, **own)
    settings["sampling"] = dataclasses.asdict(sampling)
    settings["weights"] = fingerprint(model, (model.args, processor.image_config))
    model.release_vision()
    features = FeatureCache(args.features, model, processor.image_config, name_of(name)) if args.features else None
    matcher = None
    if schema is not None:
        matcher = Schemas(processor.tokenizer, model.language_model.args.vocab_size).matcher(schema)
    each = Settings(args.max_tokens, sampling, seed, matcher=matcher)

    with (
        AnswerFile(out, settings, {"model": name_of(name)}) if out else contextlib.nullcontext(Lines()) as answers,
        ImageBatch(model, processor, prompt, each, batch_size, args.system_prompt, features) as batch,
        tqdm(unit="image", smoothing=0, disable=None) as bar,
    ):

        def count() -> None:
            bar.total = min(count_sources(args.images), args.limit or sys.maxsize)

        def progress(asking: Asking) -> None:
            bar.initial = asking.known  # they say nothing about the time that the others take
            bar.update(asking.seen - bar.n)
            bar.set_postfix_str(f"{asking.tokens / (time.perf_counter() - start):.1f} tokens/s", refresh=False)

        # Counting millions of files takes a while and must not delay the first ones.
        threading.Thread(target=count, daemon=True).start()
        asking = Asking(batch, answers, processor.image_config, features, schema is not None, progress)
        start = time.perf_counter()
        try:
            asking.run(islice(chain([first], sources), args.limit))
        except KeyboardInterrupt:
            bar.close()
            if out:
                stopped = f"stopped with {len(answers)} answers in {printable(str(out))}"
                print(f"{stopped}; the same command continues", file=sys.stderr)
            raise
        seconds = time.perf_counter() - start
        if out:
            answers.finish(asking.paths)
    report(asking, skipped, seconds)
    if asking.failed or skipped.denied:
        sys.exit(1)


def report(asking: Asking, skipped: Skipped, seconds: float) -> None:
    """Print what failed, counts and speed to stderr."""
    for path, why in asking.failed:
        print(f"failed: {printable(path)}: {printable(why)}", file=sys.stderr)
    for path, why in skipped.denied:
        print(f"failed: {printable(path)}: the folder cannot be listed ({why})", file=sys.stderr)
    counts = f"{asking.new} images answered, {asking.known} already answered, {len(asking.failed)} failed"
    speed = f"; {asking.new / seconds:.2f} images/s, {asking.tokens / seconds:.1f} tokens/s" if asking.new else ""
    print(f"{counts}{speed}", file=sys.stderr)
    if skipped.suffixes:
        print(f"skipped: {printable(str(skipped))}", file=sys.stderr)

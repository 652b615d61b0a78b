"""The worker that owns the model: it prefills prompts in chunks, and runs a decoding step of all answers in between.

A `Job` goes through three stages: it waits for a place, it is read (its images encoded, its tokens prefilled into
caches of its own, all but the last), and its answers are generated: in mlx-lm's batch, or one alone with drafts. Only
this thread touches MLX.
"""

import logging
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence

import mlx.core as mx
import numpy as np

from ..models.llama3v import Model
from ..prompt import Processor
from ..tiling import TiledImage
from . import batch as mlx_lm
from .batch import BatchAnswer
from .checks import RequestError, internal_error
from .decoding import Decoding
from .jobs import Job, Logprob, NeedImages, StopText, Token
from .prefix_cache import PrefixCache
from .prompts import Block, token_text

log = logging.getLogger(__name__)

SLICE = 0.6  # time for reading between two decoding steps, as a share of a step's median time
LEAST_TOKENS = 4  # tokens prefilled at once at the least, however long they take
RECENT = 15  # decoding steps over which the median is taken
IDLE_TILES = 4  # tiles encoded at once while no answer is generated


class _Answer(BatchAnswer):
    """One answer of a job while it is generated."""

    def __init__(self, job: Job, choice: int, detokenizer):
        super().__init__(job.prompt, job.settings, choice, detokenizer)
        self.job = job
        self.stops = StopText(job.settings.stops)


class Engine:
    """Answer jobs. `submit`, `run` and `stop` may be called from any thread.

    Args:
        model: what answers.
        processor: its tokenizer and image processing.
        prefixes: where prompts that were read are kept.
        concurrency: answers at once; further jobs wait.
        step_size: tokens that are prefilled at once while nobody else is answered.
        clock: seconds, to find out whether drafts pay.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        prefixes: PrefixCache,
        concurrency: int = 16,
        step_size: int = 512,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._model, self._processor, self._prefixes, self._clock = model, processor, prefixes, clock
        self._concurrency, self._step_size = concurrency, step_size
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._parked: set[Job] = set()  # whose images are being decoded
        self._reading: deque[tuple[Job | None, Iterator[None]]] = deque()
        self._answers: list[_Answer] = []
        # Their median says how long reading may take: one slow step makes no room for a long piece.
        self._step_times: deque[float] = deque(maxlen=RECENT)  # seconds of a step of all answers
        self._piece = 16  # tokens that are prefilled between two steps
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a new job, or one whose images have been decoded."""
        self._inbox.put(job)

    def cancel(self, job: Job) -> None:
        """Cancel a job; it gets no more events after the current token."""
        job.cancelled = True
        self._inbox.put(None)

    def run(self, work: Iterator[None]) -> None:
        """Run a generator on the worker, step by step."""
        self._inbox.put(work)

    def stop(self) -> None:
        """Fail unfinished jobs and stop the worker."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join()

    def _work(self) -> None:
        with mx.stream(mlx_lm.generation_stream):
            self._decoding = self._new_decoding()
            while not self._stopping:
                try:
                    self._start_waiting()  # where an answer has ended
                    self._receive()
                    self._drop_cancelled()
                    self._start_waiting()
                    self._read_on()
                    self._step()
                except Exception as e:
                    self._fail_all(e)
            for job in self._jobs():
                job.events.put(RequestError(503, "the server is shutting down", "shutting_down"))
            while self._save_prefix():
                pass
            self._decoding.close()
            mx.synchronize()
        # MLX cannot end a process that has a thread's streams left.
        mx.clear_streams()

    def _new_decoding(self):
        return Decoding(self._model, self._processor, self._concurrency, self._clock)

    def _receive(self) -> None:
        """Receive jobs; when idle, write the prefix cache, then block."""
        idle = not (self._reading or self._answers)
        while True:
            try:
                new = self._inbox.get(block=idle and not self._save_prefix())
            except queue.Empty:
                return
            idle = False
            if new is None:  # there is something else to look at
                continue
            if not isinstance(new, Job):
                self._reading.append((None, new))
            elif new in self._parked:
                self._parked.remove(new)
                self._reading.append((new, self._read(new)))
            else:
                self._waiting.append(new)

    def _save_prefix(self) -> bool:
        try:
            return self._prefixes.save_one()
        except Exception:
            log.exception("the prefix cache failed")
            return False

    def _jobs(self) -> list[Job]:
        """All unfinished jobs, each once."""
        reading = [job for job, _ in self._reading if job is not None]
        answered = [answer.job for answer in self._answers]
        return list(dict.fromkeys([*answered, *reading, *self._parked, *self._waiting]))

    def _drop_cancelled(self) -> None:
        for job in self._jobs():
            if job.cancelled:
                self._drop(job)

    def _drop(self, job: Job) -> None:
        self._decoding.remove([answer for answer in self._answers if answer.job is job])
        self._answers = [answer for answer in self._answers if answer.job is not job]
        self._reading = deque(each for each in self._reading if each[0] is not job)
        self._parked.discard(job)
        if job in self._waiting:
            self._waiting.remove(job)

    def _fail(self, job: Job, error: Exception) -> None:
        self._drop(job)
        job.events.put(error if isinstance(error, RequestError) else internal_error(error))

    def _fail_all(self, error: Exception) -> None:
        """Fail all running answers: after a failed step, the state of the batch's caches is unknown."""
        for job in {answer.job for answer in self._answers}:
            self._answers = [answer for answer in self._answers if answer.job is not job]
            job.events.put(internal_error(error))
        self._decoding.close()
        self._decoding = self._new_decoding()

    def _start_waiting(self) -> None:
        """Look up waiting prompts in the prefix cache, as far as the batch has room."""
        while self._waiting:
            reading = [job for job, _ in self._reading if job is not None]
            places = len(self._answers) + sum(job.settings.choices for job in [*reading, *self._parked])
            job = self._waiting[0]
            if places and places + job.settings.choices > self._concurrency:
                return
            self._waiting.popleft()
            try:
                self._look_up(job)
            except Exception as e:
                self._fail(job, e)

    def _look_up(self, job: Job) -> None:
        job.blocks = job.prompt.blocks()
        job.cached, held = self._prefixes.fetch(job.blocks, len(job.prompt.ids) - 1)
        job.caches = mlx_lm.new_caches(self._model, held)
        missing = [i for i, (start, _) in enumerate(job.prompt.places) if start >= job.cached]
        if missing:
            self._parked.add(job)
            job.progress = f"decoding {len(missing)} image{'s' if len(missing) > 1 else ''}"
            job.events.put(NeedImages(missing))
        else:
            self._reading.append((job, self._read(job)))

    def _read_on(self) -> None:
        """Read for the jobs in turn, a chunk of each, while the next decoding step may wait."""
        begin = now = time.perf_counter()
        while self._reading:
            self._read_piece(*self._reading[0])
            before, now = now, time.perf_counter()
            if now - begin + (now - before) > self._slice():
                return

    def _slice(self) -> float:
        """Seconds for reading between two decoding steps."""
        return SLICE * statistics.median(self._step_times) if self._step_times else 0.0

    def _read_piece(self, job: Job | None, work: Iterator[None]) -> None:
        """Read a chunk for the first job, then move it to the end unless it is done."""
        try:
            next(work)
            self._reading.rotate(-1)
        except StopIteration:
            self._reading.popleft()
        except Exception as e:
            if job is not None:
                self._fail(job, e)
            else:
                self._reading.popleft()
                internal_error(e)

    def _read(self, job: Job) -> Iterator[None]:
        """Encode a job's images, prefill its prompt, and start its answers; yields after every chunk."""
        rows, grids = [], []
        for i, image in sorted(job.tiles.items()):
            grids.append(image.grid)
            rows.append((yield from self._encode(job, i, image)))
        job.tiles = {}
        ids = job.prompt.ids[job.cached : -1]
        if ids:
            embeddings = self._model.splice(mx.array(ids), grids, rows)
        start = 0
        while start < len(ids):
            job.progress = f"reading the prompt, token {start + 1} of {len(ids)}"
            size = self._piece if self._answers else self._step_size
            part = embeddings[start : start + size]
            begin = time.perf_counter()
            mlx_lm.prefill(self._model, part, job.caches)
            if self._answers and len(part) == self._piece:
                self._fit_piece(time.perf_counter() - begin)
            start += len(part)
            yield
        self._store(job.blocks, job.caches, len(job.prompt.ids) - 1)
        self._begin(job)
        mx.clear_cache()

    def _fit_piece(self, seconds: float) -> None:
        """Fit pieces of a prompt between two decoding steps, given the time that the last one took."""
        if seconds > 1.25 * self._slice():
            self._piece = max(LEAST_TOKENS, self._piece * 2 // 3)
        elif seconds < 0.8 * self._slice():
            self._piece = min(self._piece * 5 // 4 + 1, self._step_size)

    def _encode(self, job: Job, index: int, image: TiledImage) -> Generator[None, None, mx.array]:
        """Visual tokens of an image, encoded layer by layer while others are answered, otherwise tiles at a time."""
        rows: dict[int, mx.array] = {}
        waiting = deque(sorted(range(len(image.tiles)), key=lambda i: image.tiles[i].shape))
        while waiting:
            tile, count = len(rows) + 1, len(image.tiles)
            job.progress = f"reading image {index + 1} of {len(job.prompt.images)}, tile {tile} of {count}"
            chosen = [waiting.popleft()]
            shape = image.tiles[chosen[0]].shape
            while not self._answers and waiting and len(chosen) < IDLE_TILES and image.tiles[waiting[0]].shape == shape:
                chosen.append(waiting.popleft())
            stacked = np.stack([image.tiles[i] for i in chosen])
            if self._answers:
                for encoded in self._model.encode_steps(stacked):
                    mx.eval(encoded)
                    yield
            else:
                encoded = self._model.encode_tiles(stacked)
                mx.eval(encoded)
                yield
            rows.update(zip(chosen, encoded, strict=True))
        encoded = mx.concatenate([rows[i] for i in range(len(image.tiles))])
        mx.eval(encoded)
        self._model.release_vision()
        return encoded

    def _store(self, blocks: Sequence[Block], caches: list, length: int) -> None:
        """Store blocks in the prefix cache; a failure is logged and does not fail the request."""
        try:
            known = [block for block in blocks if block.end <= length]
            self._prefixes.store(known, lambda start, end: mlx_lm.held(caches, start, end))
        except Exception:
            log.exception("the prefix cache failed")

    def _begin(self, job: Job) -> None:
        """Begin the answers of a prefilled job."""
        detokenizers = (self._processor.tokenizer.detokenizer for _ in range(job.settings.choices))
        answers = [_Answer(job, i, detokenizer) for i, detokenizer in enumerate(detokenizers)]
        self._decoding.begin(answers, job.caches)
        job.caches = None
        self._answers += answers

    def _step(self) -> None:
        """Decode a token of every answer, or several of one that is alone."""
        if not self._answers:
            return
        start = time.perf_counter()
        responses = self._decoding.next(alone=all(job is None for job, _ in self._reading))
        seconds = time.perf_counter() - start
        if responses:
            self._step_times.append(seconds)
        for answer, response in responses:
            # Its job may have failed, ended or been cancelled a token ago.
            if answer not in self._answers or answer.job.cancelled:
                continue
            try:
                if answer.failure is not None:
                    raise answer.failure
                self._take(answer, response)
            except Exception as e:
                self._fail(answer.job, e)

    def _take(self, answer: _Answer, response) -> None:
        job, finish = answer.job, response.finish_reason
        text, stopped = answer.stops.feed(answer.add(response), finish is not None)
        if finish is not None or stopped:
            self._answers.remove(answer)
            self._decoding.remove([answer])
        if finish is not None:
            length = len(job.prompt.ids) + len(answer.tokens)
            self._store(job.prompt.blocks(answer.tokens), response.prompt_cache, length)
        own, top = self._logprobs(job.settings.num_logprobs, response)
        job.events.put(Token(answer.choice, text, "stop" if stopped else finish, own, top))

    def _logprobs(self, count: int | None, response) -> tuple[Logprob | None, tuple[Logprob, ...]]:
        if count is None:
            return None, ()
        logprobs = np.array(response.logprobs.astype(mx.float32))
        best = np.argpartition(-logprobs, count)[:count] if count else []
        tokens = [response.token, *sorted(map(int, best), key=lambda token: -logprobs[token])]
        # As in OpenAI's answers, what is impossible has -9999: JSON has no infinity.
        found = [Logprob(t, token_text(t, self._processor), max(-9999.0, float(logprobs[t]))) for t in tokens]
        return found[0], tuple(found[1:])

"""The worker that owns the model: it prefills prompts in chunks, and runs a decoding step of all answers in between.

A `Job` goes through three stages: it waits for a place, it is read (its images encoded, its tokens prefilled into
caches of its own, all but the last), and its answers are generated in mlx-lm's batch. Only this thread touches MLX.
"""

import logging
import queue
import statistics
import threading
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..image import TiledImage
from ..models.llama3v import Model
from ..prompt import Processor
from ..sampling import Sampling, on_generated
from ..schema import keep_to
from . import batch as mlx_lm
from .prefix_cache import PrefixCache
from .prompts import Block, RequestPrompt, token_text
from .validate import RequestError

log = logging.getLogger(__name__)

SLICE = 1.0  # steps of all answers: the time for reading between two of them
LEAST_TOKENS = 16  # that are prefilled at once, however long they take
RECENT = 15  # steps, and pieces of prompts, from which times are worked out
IDLE_TILES = 4  # tiles that are encoded at once while nobody is answered


@dataclass(frozen=True)
class Settings:
    """Generation settings of a job."""

    max_tokens: int
    sampling: Sampling
    seed: int | None = None
    choices: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stops: tuple[str, ...] = ()
    num_logprobs: int | None = None  # top log-probabilities besides the chosen token's; None: none
    matcher: Any = None  # llguidance's


@dataclass(frozen=True)
class Logprob:
    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """A token of an answer, and the text completed by it."""

    choice: int
    text: str
    finish_reason: str | None = None  # "stop" or "length" with the last one
    logprob: Logprob | None = None
    top_logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class NeedImages:
    """Images that the prefix cache lacks: put their tiles into the job and submit it again."""

    indices: Sequence[int]


Event = Token | NeedImages | RequestError


@dataclass(eq=False)
class Job:
    """A prompt and its progress. The worker puts events; other threads set `tiles` and `cancelled`."""

    prompt: RequestPrompt
    settings: Settings
    events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    tiles: dict[int, TiledImage] = field(default_factory=dict)
    cancelled: bool = False
    progress: str = "waiting for a place"  # for people
    cached: int = 0  # tokens that the prefix cache had
    # Of the worker:
    blocks: list[Block] = field(default_factory=list)
    caches: list | None = None


class StopText:
    """Find stop strings in streamed text, holding back text that may begin one."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""

    def feed(self, text: str, last: bool) -> tuple[str, bool]:
        """Add text; return the text that can be sent, and whether a stop string was found."""
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            return self._held[: min(found)], True
        end = len(self._held)
        if not last:
            most = max(map(len, self._stops), default=0)
            starts = range(max(0, end - most + 1), end)
            end = next((i for i in starts if any(s.startswith(self._held[i:]) for s in self._stops)), end)
        certain, self._held = self._held[:end], self._held[end:]
        return certain, False


class _Answer:
    """One answer of a job while it is generated."""

    def __init__(self, job: Job, choice: int, detokenizer):
        self.job, self.choice = job, choice
        self.detokenizer, self.stops = detokenizer, StopText(job.settings.stops)
        self.tokens: list[int] = []
        self.failure: Exception | None = None

    def guarded(self, process):
        """Wrap a logits processor so that its failure fails this answer, not the batch."""

        def guarded(tokens: mx.array, logits: mx.array) -> mx.array:
            if self.failure is None:
                try:
                    return process(tokens, logits)
                except Exception as e:
                    self.failure = e
            return logits

        return guarded


class Engine:
    """Answer jobs. `submit`, `run` and `stop` may be called from any thread.

    Args:
        model: what answers.
        processor: its tokenizer and image processing.
        prefixes: where prompts that were read are kept.
        concurrency: answers at once; further jobs wait.
        step_size: tokens that are prefilled at once while nobody else is answered.
    """

    def __init__(
        self, model: Model, processor: Processor, prefixes: PrefixCache, concurrency: int = 16, step_size: int = 512
    ):
        self._model, self._processor, self._prefixes = model, processor, prefixes
        self._concurrency, self._step_size = concurrency, step_size
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._parked: set[Job] = set()  # whose images are being decoded
        self._reading: deque[tuple[Job | None, Iterator[None]]] = deque()
        self._answers: dict[int, _Answer] = {}
        # Medians of them say how long reading may take: one slow step makes no room for a long piece.
        self._step_times: deque[float] = deque(maxlen=RECENT)  # seconds of a step of all answers
        self._token_times: deque[float] = deque(maxlen=RECENT)  # of a token that is prefilled meanwhile
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
            self._batch = self._new_batch()
            while not self._stopping:
                try:
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
            self._batch.close()
            mx.synchronize()
        # MLX cannot end a process that has a thread's streams left.
        mx.clear_streams()

    def _new_batch(self):
        return mlx_lm.new_batch(self._model, self._processor.tokenizer.eos_token_ids, self._concurrency)

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
        answered = [answer.job for answer in self._answers.values()]
        return list(dict.fromkeys([*answered, *reading, *self._parked, *self._waiting]))

    def _drop_cancelled(self) -> None:
        for job in self._jobs():
            if job.cancelled:
                self._drop(job)

    def _drop(self, job: Job) -> None:
        uids = [uid for uid, answer in self._answers.items() if answer.job is job]
        if uids:
            self._batch.remove(uids)
        for uid in uids:
            del self._answers[uid]
        self._reading = deque(each for each in self._reading if each[0] is not job)
        self._parked.discard(job)
        if job in self._waiting:
            self._waiting.remove(job)

    def _fail(self, job: Job, error: Exception) -> None:
        self._drop(job)
        job.events.put(error if isinstance(error, RequestError) else internal_error(error))

    def _fail_all(self, error: Exception) -> None:
        """Fail all running answers: after a failed step, the state of the batch's caches is unknown."""
        for job in {answer.job for answer in self._answers.values()}:
            self._answers = {uid: answer for uid, answer in self._answers.items() if answer.job is not job}
            job.events.put(internal_error(error))
        self._batch.close()
        self._batch = self._new_batch()

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
            part = embeddings[None, start : start + self._num_tokens()]
            begin = time.perf_counter()
            self._model(mx.zeros(part.shape[:2], mx.int32), job.caches, part)
            mx.eval([cache.state for cache in job.caches])
            if self._answers:
                self._token_times.append((time.perf_counter() - begin) / part.shape[1])
            start += part.shape[1]
            yield
        self._store(job.blocks, job.caches, len(job.prompt.ids) - 1)
        self._begin(job)
        mx.clear_cache()

    def _num_tokens(self) -> int:
        """Number of tokens to prefill at once; while others are answered, what fits between two decoding steps."""
        if not self._answers:
            return self._step_size
        fitting = self._slice() / statistics.median(self._token_times) if self._token_times else 0
        return max(LEAST_TOKENS, min(int(fitting), self._step_size))

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
        """Insert a prefilled job into the batch."""
        settings = job.settings
        answers = [_Answer(job, i, self._processor.tokenizer.detokenizer) for i in range(settings.choices)]
        processors = []
        for answer in answers:
            own = mlx_lm.logits_processors(
                settings.sampling, settings.presence_penalty, settings.frequency_penalty, settings.logit_bias
            )
            if settings.matcher is not None:
                own.append(on_generated(keep_to(settings.matcher), 1))
            processors.append([answer.guarded(process) for process in own])
        uids = self._batch.insert(
            [job.prompt.ids[-1:]] * len(answers),
            max_tokens=[settings.max_tokens] * len(answers),
            caches=[job.caches] * len(answers),
            samplers=[mlx_lm.sampler(settings.sampling, settings.seed, i) for i in range(len(answers))],
            logits_processors=processors,
        )
        job.caches = None
        self._answers.update(zip(uids, answers, strict=True))

    def _step(self) -> None:
        """Decode one token of every answer."""
        if not self._answers:
            return
        start = time.perf_counter()
        _, responses = self._batch.next()
        seconds = time.perf_counter() - start
        if responses:
            self._step_times.append(seconds)
        for response in responses:
            answer = self._answers.get(response.uid)
            if answer is None:  # its job failed a moment ago
                continue
            try:
                if answer.failure is not None:
                    raise answer.failure
                self._take(answer, response)
            except Exception as e:
                if response.finish_reason is not None:
                    del self._answers[response.uid]
                self._fail(answer.job, e)

    def _take(self, answer: _Answer, response) -> None:
        job, token, finish = answer.job, response.token, response.finish_reason
        answer.tokens.append(token)
        if finish != "stop":
            answer.detokenizer.add_token(token)
        if finish is not None:
            answer.detokenizer.finalize()
        text, stopped = answer.stops.feed(answer.detokenizer.last_segment, finish is not None)
        if finish is not None or stopped:
            del self._answers[response.uid]
        if stopped and finish is None:
            self._batch.remove([response.uid])
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


def internal_error(error: Exception) -> RequestError:
    """Log an unexpected error under an id; return the error for the client, with that id."""
    number = uuid.uuid4().hex[:12]
    log.error("internal error %s", number, exc_info=error)
    return RequestError(500, f"internal error {number}; the server's log says more", "internal_error")

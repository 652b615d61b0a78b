"""Generate tokens with drafts: the same tokens as mlx-lm's `generate_step`, in fewer passes through Llama.

A block of the last token and the tokens drafted after it is read in one pass. At each place the next token is drawn as
without drafts; it ends the block unless it is the drafted one. So greedy output is the same, and so are the tokens that
a seed draws. Without drafts, tokens are generated one ahead, as in mlx-lm.
"""

import functools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import greedy_sampler

from ..models.llama3v import PREFILL_STEP
from ..sampling import Sampler
from .drafters import Drafter

# A pass of several tokens may round otherwise than a pass of one. A token whose lead over the second most likely one is
# at most this, relative to the largest logit (two units in the last place of half precision), gets a pass of its own.
CLOSE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
RECENT = 15  # single passes of which the median time is taken
CLEAR_EVERY = 256  # tokens between releases of MLX's buffers, as in mlx-lm


@dataclass(frozen=True)
class Step:
    """A generated token."""

    token: int
    logprobs: mx.array  # (vocab_size,)
    from_draft: bool
    passes: int  # through Llama, for the answer so far


def can_draft(cache: Sequence) -> bool:
    """Return True if rejected tokens can be removed from a prompt cache at any time."""
    return all(isinstance(each, (KVCache, QuantizedKVCache)) for each in cache)


class Decoder:
    """Llama with its cache, sampler and logits processors."""

    def __init__(
        self,
        model: nn.Module,
        cache: list,
        sampler: Callable[[mx.array], mx.array],
        processors: Sequence[Callable[[mx.array, mx.array], mx.array]],
        kv_bits: int | None,
        kv_group_size: int,
        quantized_kv_start: int,
    ):
        self.passes = 0
        self._model, self._cache, self._sampler = model, cache, sampler
        self._processors = list(processors)
        self._tokens = mx.array([], mx.uint32)  # in the cache since the prompt's first, for the processors
        self._quantize = functools.partial(
            maybe_quantize_kv_cache, quantized_kv_start=quantized_kv_start, kv_group_size=kv_group_size, kv_bits=kv_bits
        )
        self._kv_start = math.inf if kv_bits is None else quantized_kv_start

    def prefill(self, ids: mx.array, embeddings: mx.array | None, step: int, progress: Callable[[int, int], None]):
        """Read a prompt (L,), all but its last token, in chunks; `embeddings` (L, hidden_size) replace its ids."""
        length = len(ids)
        progress(0, length)
        for start in range(0, length - 1, step):
            part = slice(start, min(start + step, length - 1))
            given = None if embeddings is None else embeddings[None, part]
            with mx.stream(generation_stream):
                self._model(ids[None, part], cache=self._cache, input_embeddings=given)
                self._quantize(self._cache)
                mx.eval([cache.state for cache in self._cache])
            progress(part.stop, length)
            mx.clear_cache()
        self._tokens = ids[:-1].astype(mx.uint32)

    def single(self, token: mx.array, embedding: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """Start a pass of one token (1,); return the next token (1,) and log-probabilities (1, vocab_size), lazy."""
        with mx.stream(generation_stream):
            logits = self._forward(token, embedding)
            self._append(token)
            logprobs = self._process(logits[:, -1], self._tokens)
            drawn = self._sampler(logprobs)
            mx.async_eval(drawn, logprobs)
        return drawn, logprobs

    def longest(self, most: int) -> int:
        """Number of drafted tokens, at most `most`, that a block may have before the cache is quantized."""
        offset = self._cache[0].offset
        return most if offset >= self._kv_start else int(min(most, max(0, self._kv_start - offset - 1)))

    def block(self, last: int, draft: list[int]) -> tuple[list[Step], bool]:
        """Read the last token and those drafted after it.

        Returns:
            The tokens that follow it, none or several; and True if the next one needs a pass of its own.
        """
        before = self._cache[0].offset
        steps: list[Step] = []
        with mx.stream(generation_stream):
            logits = self._forward(mx.array([last, *draft], mx.uint32))
            self._append(mx.array([last], mx.uint32))
            for token, logprobs in self._draw(logits):
                if token is None:
                    break
                accepted = len(steps) < len(draft) and token == draft[len(steps)]
                steps.append(Step(token, logprobs, accepted, self.passes))
                if not accepted:
                    break
                self._append(mx.array([token], mx.uint32))
        # The cache holds everything but the last of the known tokens, as before.
        keep = before + len(steps)
        trim_prompt_cache(self._cache, self._cache[0].offset - keep)
        if self._processors and token is None:
            self._tokens = self._tokens[:-1]
        return steps, token is None

    def _draw(self, logits: mx.array) -> Iterator[tuple[int | None, mx.array]]:
        """Draw a block's tokens in turn from logits (1, 1 + drafted, vocab_size); None where rounding may decide."""
        if self._sampler is greedy_sampler and not self._processors:
            logprobs = self._process(logits[0], None)
            tokens, close = self._sampler(logprobs), _close(logprobs, logits[0])
            mx.eval(tokens, close, logprobs)
            decided = zip(tokens.tolist(), close.tolist(), strict=True)
            for i, (token, undecided) in enumerate(decided):
                yield None if undecided else token, logprobs[i]
            return
        for i in range(logits.shape[1]):
            row = self._process(logits[:, i], self._tokens)
            yield self._decide(row, logits[:, i]), row[0]

    def _decide(self, logprobs: mx.array, logits: mx.array) -> int | None:
        """Draw a token of a block; None, and the random key unchanged, if rounding may decide."""
        if self._sampler is greedy_sampler:
            return None if _close(logprobs, logits).item() else self._sampler(logprobs).item()
        if not isinstance(self._sampler, Sampler):
            return self._sampler(logprobs).item()
        key = self._sampler.key
        token, scores = self._sampler.draw(logprobs)
        if _close(scores * self._sampler.sampling.temperature, logits).item():
            self._sampler.key = key
            return None
        return token.item()

    def _forward(self, tokens: mx.array, embedding: mx.array | None = None) -> mx.array:
        self.passes += 1
        given = {} if embedding is None else {"input_embeddings": embedding[None]}
        logits = self._model(tokens[None], cache=self._cache, **given)
        self._quantize(self._cache)
        return logits

    def _append(self, tokens: mx.array) -> None:
        if self._processors:
            self._tokens = mx.concatenate([self._tokens, tokens.astype(mx.uint32)])

    def _process(self, logits: mx.array, tokens: mx.array | None) -> mx.array:
        """Log-probabilities (L, vocab_size) of logits (L, vocab_size) after the processors."""
        for processor in self._processors:
            logits = processor(tokens, logits)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _close(scores: mx.array, logits: mx.array) -> mx.array:
    """Bool (L,): rounding of logits (L, vocab_size) may decide between the two highest of scores (L, N)."""
    best = mx.argmax(scores, axis=-1, keepdims=True)
    others = mx.put_along_axis(scores, best, mx.array(-mx.inf, scores.dtype), axis=-1)
    lead = mx.take_along_axis(scores, best, axis=-1)[:, 0] - mx.max(others, axis=-1)
    return lead <= CLOSE[logits.dtype] * mx.max(mx.abs(logits), axis=-1)


def drafted_steps(*args, **kwargs) -> Iterator[Step]:
    """Yield the tokens of `drafted_passes` one by one."""
    for steps in drafted_passes(*args, **kwargs):
        yield from steps


def drafted_passes(
    prompt: mx.array,
    model: nn.Module,
    drafters: Sequence[Drafter],
    *,
    known: Sequence[int] = (),
    eos: Iterable[int] = (),
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: Sequence[Callable[[mx.array, mx.array], mx.array]] | None = None,
    prompt_cache: list | None = None,
    prefill_step_size: int = PREFILL_STEP,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    input_embeddings: mx.array | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[list[Step], bool | None, None]:
    """Generate tokens like mlx-lm's `generate_step`, whose arguments these are, with drafts.

    Args:
        prompt: ids (L,).
        model: Llama3-V or a Llama.
        drafters: asked in turn; the first draft is verified.
        known: ids that precede the prompt in the conversation, for the drafters.
        eos: tokens that end an answer; nothing is drafted after them.
        clock: seconds, to find out whether drafts pay.

    Yields:
        The tokens of each pass, after EOS as well. Sending True ends the answer after the pass in flight, whose token
        is yielded too if there is one; the cache then holds everything but the last of the tokens.
    """
    cache = make_prompt_cache(model) if prompt_cache is None else prompt_cache
    quantization = (kv_bits, kv_group_size, quantized_kv_start)
    decoder = Decoder(model, cache, sampler or greedy_sampler, logits_processors or (), *quantization)
    progress = prompt_progress_callback or (lambda *_: None)
    decoder.prefill(prompt, input_embeddings, prefill_step_size, progress)
    for drafter in drafters:
        drafter.begin()
        drafter.see([*known, *prompt.tolist()])
    stop = frozenset(eos)
    most_tokens = math.inf if max_tokens < 0 else max_tokens
    times: deque[float] = deque(maxlen=RECENT)
    written, cleared, alone = 0, 0, False
    start = clock()
    pending = decoder.single(prompt[-1:], None if input_embeddings is None else input_embeddings[-1:])
    while True:
        # A pass is in flight. Unless a draft is likely after its token, start the next one before it is known.
        likely = [] if alone else [d for d in drafters if d.budget.room() and d.is_likely()]
        following = None
        if not likely and written + 1 < most_tokens:
            following = decoder.single(pending[0])
        token = pending[0].item()
        times.append(clock() - start)
        if written == 0:
            progress(len(prompt), len(prompt))
        written += 1
        _see(drafters, [token])
        ended = yield [Step(token, pending[1][0], False, decoder.passes - (following is not None))]
        if ended and following is not None:
            yield [Step(following[0].item(), following[1][0], False, decoder.passes)]
        if ended or written >= most_tokens:
            return
        start = clock()
        if written - cleared >= CLEAR_EVERY:
            cleared = written
            mx.clear_cache()
        for drafter in drafters:
            drafter.budget.single()
        alone = False
        while following is None and not alone:
            most = decoder.longest(int(min(most_tokens - written - 1, 2**31)))
            drafter, draft = _first_draft(drafters, most, stop)
            if not draft:
                break
            steps, alone = decoder.block(token, draft)
            single = statistics.median(times)
            seconds = clock() - start
            size = len(draft)
            # A block costs at most as much as its tokens one by one; anything above that is a delay elsewhere.
            drafter.budget.verified(size, len(steps), min(seconds / single, size + 1) if single else 1)
            _see(drafters, [step.token for step in steps])
            likely = []
            if steps:
                written, token = written + len(steps), steps[-1].token
                ended = yield steps
                if ended or written >= most_tokens:
                    return
            start = clock()
        if following is None:
            for drafter in likely:
                if not drafter.waits:
                    drafter.budget.waited()
            following = decoder.single(mx.array([token], mx.uint32))
        pending = following


def _see(drafters: Sequence[Drafter], tokens: list[int]) -> None:
    for drafter in drafters:
        drafter.see(tokens)


def _first_draft(drafters: Sequence[Drafter], most: int, stop: frozenset[int]) -> tuple[Drafter | None, list[int]]:
    """The first draft that there is, up to a token that ends the answer."""
    for drafter in drafters:
        room = min(most, drafter.budget.room())
        if draft := drafter.draft(room) if room else []:
            end = next((i + 1 for i, token in enumerate(draft) if token in stop), len(draft))
            return drafter, draft[:end]
    return None, []

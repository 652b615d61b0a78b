"""Interface to mlx-lm's undocumented `BatchGenerator`, the server's only one; `tests/test_engine.py` checks it.

`BatchGenerator` runs one step for all answers at a time. A prompt is read into caches of its own first, all but the
last token, and joins the batch with them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generation_stream
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_frequency_penalty, make_presence_penalty

from ..prompt import Prompt
from ..sampling import Sampling, on_generated
from ..schema import keep_to
from .prompts import RequestPrompt

__all__ = ["BatchGenerator", "KVCache", "generation_stream"]

ALL = 2**31 - 1  # tokens that a penalty looks back on


@dataclass(frozen=True)
class Settings:
    """Generation settings of a prompt's answers."""

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


class BatchAnswer:
    """An answer while it is generated.

    Args:
        prompt: what it answers, with its `ids`.
        settings: of the prompt's answers.
        choice: which of them it is.
        detokenizer: of its own.
    """

    def __init__(self, prompt: RequestPrompt | Prompt, settings: Settings, choice: int, detokenizer):
        self.prompt, self.settings, self.choice, self._detokenizer = prompt, settings, choice, detokenizer
        self.tokens: list[int] = []
        self.failure: Exception | None = None  # of a logits processor
        # These have a state, so they are the same wherever the answer is generated.
        self.sampler = sampler(settings.sampling, settings.seed, choice)
        own = logits_processors(
            settings.sampling, settings.presence_penalty, settings.frequency_penalty, settings.logit_bias
        )
        if settings.matcher is not None:
            own.append(on_generated(keep_to(settings.matcher), 1))
        self.processors = [self.guarded(process) for process in own]

    @property
    def context(self) -> list[int]:
        """Tokens that logits processors see: the prompt's last one, and the answer's."""
        return [self.prompt.ids[-1], *self.tokens]

    @property
    def room(self) -> int:
        """Number of tokens that the answer may still get."""
        return self.settings.max_tokens - len(self.tokens)

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

    def add(self, response) -> str:
        """Add the token of a response; return the text that it completes."""
        self.tokens.append(response.token)
        if response.finish_reason != "stop":
            self._detokenizer.add_token(response.token)
        if response.finish_reason is not None:
            self._detokenizer.finalize()
        return self._detokenizer.last_segment


def new_batch(model, eos_token_ids: Iterable[int], concurrency: int) -> BatchGenerator:
    """An empty batch of up to `concurrency` answers, which end at any of `eos_token_ids`."""
    return BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(eos_token_ids)],
        completion_batch_size=concurrency,
        prefill_batch_size=concurrency,
    )


def new_caches(model, held: mx.array | None = None) -> list[KVCache]:
    """Key-value caches of a model's layers, empty or with keys and values (layers, 2, 1, heads, length, head_dim)."""
    caches = model.make_cache()
    if held is not None:
        for cache, (keys, values) in zip(caches, held, strict=True):
            cache.update_and_fetch(keys, values)
    return caches


def prefill(model, embeddings: mx.array, caches: Sequence[KVCache]) -> None:
    """Read embeddings (length, hidden_size) of a prompt into its caches."""
    model(mx.zeros((1, len(embeddings)), mx.int32), caches, embeddings[None])
    mx.eval([cache.state for cache in caches])


def insert(batch: BatchGenerator, answers: Sequence[BatchAnswer], caches: Sequence[KVCache]) -> list[int]:
    """Generate answers in the batch; return their uids.

    Args:
        batch: mlx-lm's.
        answers: of one prompt, new ones or a single one that has been begun.
        caches: they hold prompt and answer, all but the last token.
    """
    return batch.insert(
        [answer.context[-1:] for answer in answers],
        max_tokens=[answer.room for answer in answers],
        caches=[caches] * len(answers),
        all_tokens=[answer.context[:-1] for answer in answers],
        samplers=[answer.sampler for answer in answers],
        logits_processors=[answer.processors for answer in answers],
    )


def held(caches: Sequence[KVCache], start: int, end: int) -> mx.array:
    """Copy keys and values (layers, 2, 1, heads, end - start, head_dim) of caches from `start` to `end`."""
    layers = [mx.stack([x[..., start:end, :] for x in cache.keys_and_values()]) for cache in caches]
    copy = mx.stack(layers)
    mx.eval(copy)
    return copy


def logits_processors(
    sampling: Sampling, presence_penalty: float, frequency_penalty: float, logit_bias: dict[int, float] | None
) -> list[Callable[[mx.array, mx.array], mx.array]]:
    """Logits processors of an answer, on (1, vocab_size); penalties apply to generated tokens only.

    They see the prompt's last token first, which is not generated.
    """
    processors = sampling.logits_processors(1)
    if presence_penalty:
        processors.append(on_generated(make_presence_penalty(presence_penalty, ALL), 1))
    if frequency_penalty:
        processors.append(on_generated(make_frequency_penalty(frequency_penalty, ALL), 1))
    if logit_bias:
        tokens, biases = mx.array(list(logit_bias)), mx.array(list(logit_bias.values()))
        processors.append(lambda _, logits: logits.at[:, tokens].add(biases.astype(logits.dtype)))
    return processors


def sampler(sampling: Sampling, seed: int | None, choice: int) -> Callable[[mx.array], mx.array]:
    """Sampler with its own random state, so that an answer does not depend on the rest of the batch.

    Args:
        sampling: temperature and cutoffs.
        seed: any 64-bit integer; None: another one each time.
        choice: which of a request's answers it is for.
    """
    key = None if seed is None else mx.random.split(mx.random.key(seed % 2**64), choice + 1)[choice]
    return sampling.sampler(key)

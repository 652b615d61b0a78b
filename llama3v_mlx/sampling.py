"""Sampling of the next token."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_p, greedy_sampler, make_repetition_penalty

from .fields import Number

RANGES = {
    "temperature": Number(0),
    "top_p": Number(0, 1),
    "top_k": Number(0, whole=True),
    "min_p": Number(0, 1),
    "repetition_penalty": Number(0),
}


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; the defaults are those of the reference and the released generation config.

    Raises:
        ValueError: if one is out of its range.
    """

    temperature: float = 0.7  # 0: greedy
    top_p: float = 0.8  # nucleus sampling: cumulative probability cutoff; 1: off
    top_k: int = 100  # number of most likely tokens to sample from; 0: all
    min_p: float = 0.0  # minimum probability relative to the most likely token; 0: off
    repetition_penalty: float = 1.05  # of generated tokens, never of the prompt's; 1: off

    def __post_init__(self):
        for name, number in RANGES.items():
            number.check(name, getattr(self, name))

    @classmethod
    def from_config(cls, config: dict) -> "Sampling":
        """Read a validated generation config; `do_sample: false` is greedy decoding, temperature 0."""
        own = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        return cls(**own if config.get("do_sample", True) else {**own, "temperature": 0.0})

    def override(self, **parameters: float | None) -> "Sampling":
        """Return a copy with these parameters, except for those that are None."""
        return replace(self, **{name: value for name, value in parameters.items() if value is not None})

    def sampler(self, key: mx.array | None = None) -> Callable[[mx.array], mx.array]:
        """Sampler of log-probabilities (1, vocab_size), greedy at temperature 0.

        Args:
            key: random key, uint32 (2,); by default one is drawn from MLX's global random state.
        """
        if self.temperature == 0:
            return greedy_sampler
        return Sampler(self, mx.random.randint(0, 2**32 - 1, (2,), mx.uint32) if key is None else key)

    def filter(self, logprobs: mx.array) -> tuple[mx.array | None, mx.array]:
        """Return the tokens to sample from, None for the whole vocabulary, and their log-probabilities."""
        logits = logprobs.astype(mx.float32) / self.temperature
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        tokens = None
        if 0 < self.top_k < logprobs.shape[-1]:
            # From here on the vocabulary is these tokens, in its order, so that ties are broken as in all of it.
            tokens = mx.sort(mx.argpartition(-logprobs, kth=self.top_k - 1, axis=-1)[..., : self.top_k])
            logprobs = mx.take_along_axis(logprobs, tokens, axis=-1)
        if 0 < self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p > 0:
            logprobs = apply_min_p(logprobs, self.min_p)
        return tokens, logprobs

    def logits_processors(self, num_prompt_tokens: int) -> list[Callable[[mx.array, mx.array], mx.array]]:
        """Return mlx-lm's repetition penalty, on generated tokens only: the reference never sees the prompt's ids."""
        if self.repetition_penalty in (0, 1):
            return []
        penalize = make_repetition_penalty(self.repetition_penalty, context_size=2**31 - 1)
        return [on_generated(penalize, num_prompt_tokens)]


class Sampler:
    """Sampler of log-probabilities (1, vocab_size), in Hugging Face's order: temperature, top-k, top-p, min-p.

    It draws by the Gumbel-max trick, with noise of each token's own: with the same key, two models that agree on most
    of the probability mostly draw the same token.

    Args:
        sampling: parameters, with a temperature above 0.
        key: random key, which each draw replaces.
    """

    def __init__(self, sampling: Sampling, key: mx.array):
        self.sampling, self.key = sampling, key

    def __call__(self, logprobs: mx.array) -> mx.array:
        return self.draw(logprobs)[0]

    def draw(self, logprobs: mx.array) -> tuple[mx.array, mx.array]:
        """Draw a token (1,); also return the scores (1, N) of the tokens left, the highest of which is the token's."""
        self.key, own = mx.random.split(self.key)
        noise = mx.random.gumbel(logprobs.shape, key=own)
        tokens, scores = self.sampling.filter(logprobs)
        if tokens is None:
            scores = scores + noise
            return mx.argmax(scores, axis=-1), scores
        scores = scores + mx.take_along_axis(noise, tokens, axis=-1)
        best = mx.argmax(scores, axis=-1, keepdims=True)
        return mx.take_along_axis(tokens, best, axis=-1)[..., 0], scores

    def copy(self) -> "Sampler":
        return Sampler(self.sampling, self.key)


def on_generated(process: Callable, num_prompt_tokens: int) -> Callable:
    """Wrap a logits processor so that it sees generated tokens only."""

    def processed(tokens: mx.array, logits: mx.array) -> mx.array:
        return process(tokens[num_prompt_tokens:], logits)

    return processed

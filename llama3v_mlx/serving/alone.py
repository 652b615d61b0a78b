"""One answer with drafts, while no other request shares its passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..drafting.drafters import Forced, NGrams
from ..drafting.verify import drafted_passes
from ..models.llama3v import Model
from ..prompt import Processor
from .batch import BatchAnswer, KVCache


@dataclass(frozen=True)
class Response:
    """A token, with the fields of mlx-lm's batch."""

    token: int
    logprobs: mx.array  # (vocab_size,)
    finish_reason: str | None
    prompt_cache: Sequence[KVCache] | None


class Alone:
    """An answer with drafts from its prompt, itself and its schema.

    Args:
        model: what answers.
        processor: its tokenizer.
        answer: a new one, or one that has been begun.
        caches: they hold prompt and answer, all but the last token.
        clock: seconds, to find out whether drafts pay.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        answer: BatchAnswer,
        caches: Sequence[KVCache],
        clock: Callable[[], float],
    ):
        self.answer, self.caches = answer, caches
        self._model, self._ends, self._begun = model, processor.tokenizer.eos_token_ids, False
        ids, matcher = answer.prompt.ids, answer.settings.matcher
        forced = [] if matcher is None else [Forced(matcher, len(ids))]
        before = mx.array(answer.context[:-1], mx.uint32)

        def after(process: Callable) -> Callable:
            return lambda tokens, logits: process(mx.concatenate([before, tokens]), logits)

        self._passes = drafted_passes(
            mx.array(answer.context[-1:], mx.uint32),
            model,
            [*forced, NGrams(processor.prompt_tokens.image)],
            known=[*ids, *answer.tokens][:-1],
            eos=self._ends,
            max_tokens=answer.room,
            sampler=answer.sampler,
            logits_processors=[after(process) for process in answer.processors],
            prompt_cache=caches,
            clock=clock,
        )

    def next(self, last: bool) -> list[Response]:
        """Run a pass; if it shall be the `last`, only take the token of one in flight: [] if there is none."""
        if last and not self._begun:
            return []
        try:
            steps = self._passes.send(last if self._begun else None)
        except StopIteration:
            return []
        self._begun = True
        responses: list[Response] = []
        for step in steps:
            ended = step.token in self._ends
            finish = "stop" if ended else "length" if len(responses) + 1 == self.answer.room else None
            responses.append(Response(step.token, step.logprobs, finish, self.caches if finish else None))
            if finish is not None:
                self._complete([response.token for response in responses])
                break
        return responses

    def _complete(self, tokens: Sequence[int]) -> None:
        """Read the last token too if it ends a block for the prefix cache."""
        self._passes.close()
        block = self.answer.prompt.blocks([*self.answer.tokens, *tokens])[-1:]
        if block and block[0].end > self.caches[0].offset:
            self._model(mx.array([tokens[-1:]]), self.caches)

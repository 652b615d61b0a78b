"""Decode answers: several in mlx-lm's batch, one alone with drafts, and move an answer from one to the other.

An answer moves between two tokens: its caches hold everything but its last token, and its sampler and logits
processors, which have a state, go with it.
"""

from collections.abc import Callable, Sequence

from mlx_lm.models.cache import trim_prompt_cache

from ..models.llama3v import Model
from ..prompt import Processor
from . import batch as mlx_lm
from .alone import Alone, Response
from .batch import BatchAnswer, KVCache


class Decoding:
    """Decode all answers, a pass at a time.

    Args:
        model: what answers.
        processor: its tokenizer.
        concurrency: answers at once.
        clock: seconds, to find out whether drafts pay.
    """

    def __init__(self, model: Model, processor: Processor, concurrency: int, clock: Callable[[], float]):
        self._model, self._processor, self._clock = model, processor, clock
        self._batch = mlx_lm.new_batch(model, processor.tokenizer.eos_token_ids, concurrency)
        self._batched: dict[int, BatchAnswer] = {}  # by uid
        self._alone: Alone | None = None

    def begin(self, answers: Sequence[BatchAnswer], caches: Sequence[KVCache]) -> None:
        """Begin the answers of a prompt, which is in `caches` except for its last token."""
        if len(answers) == 1 and self._alone is None and not self._batched:
            self._alone = Alone(self._model, self._processor, answers[0], caches, self._clock)
        else:
            self._insert(answers, caches)

    def next(self, alone: bool) -> list[tuple[BatchAnswer, Response | None]]:
        """Run a pass.

        Args:
            alone: whether no other request is being read.

        Returns:
            Its tokens; instead of a token, None for an answer that has a `failure`.
        """
        if alone and self._alone is None and len(self._batched) == 1:
            self._leave_batch()
        if self._alone is not None:
            answer = self._alone.answer
            try:
                responses = self._alone.next(last=not alone or bool(self._batched))
            except Exception as e:  # the batch's caches are not concerned
                answer.failure = e
                return [(answer, None)]
            if responses:
                return [(answer, response) for response in responses]
            self._insert([answer], self._alone.caches)
            self._alone = None
        _, responses = self._batch.next()
        answers = [self._batched[response.uid] for response in responses]
        return list(zip(answers, responses, strict=True))

    def remove(self, answers: Sequence[BatchAnswer]) -> None:
        """Remove answers; those that mlx-lm has removed already are forgotten."""
        uids = [uid for uid, answer in self._batched.items() if answer in answers]
        for uid in uids:
            del self._batched[uid]
        if uids:
            self._batch.remove(uids)
        if self._alone is not None and self._alone.answer in answers:
            self._alone = None

    def close(self) -> None:
        self._batch.close()

    def _insert(self, answers: Sequence[BatchAnswer], caches: Sequence[KVCache]) -> None:
        self._batched.update(zip(mlx_lm.insert(self._batch, answers, caches), answers, strict=True))

    def _leave_batch(self) -> None:
        """Take the only answer out of the batch, unless its seed's next random number has been used."""
        ((uid, answer),) = self._batched.items()
        if answer.settings.seed is not None and answer.settings.sampling.temperature > 0:
            return
        caches, _ = self._batch.remove([uid], return_prompt_caches=True)[uid]
        del self._batched[uid]
        known = len(answer.prompt.ids) + len(answer.tokens)
        trim_prompt_cache(caches, caches[0].offset - (known - 1))
        self._alone = Alone(self._model, self._processor, answer, caches, self._clock)

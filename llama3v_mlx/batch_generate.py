"""Answer one question about many images, each in a prompt of its own, in mlx-lm's continuous batch."""

import hashlib
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, replace

import mlx.core as mx

from .features.lookup import FeatureCache
from .generation import check_length
from .models.llama3v import PREFILL_STEP, TILE_BATCH_SIZE, Model
from .prompt import Processor, Prompt
from .serving import batch as mlx_lm
from .serving.batch import BatchAnswer, Settings
from .tiling import TiledImage


@dataclass(frozen=True)
class Answer:
    """A complete answer about one image."""

    text: str
    finish_reason: str  # "stop" or "length"
    num_tokens: int  # generated, the end-of-turn token included


class ImageBatch:
    """Generate answers to one question about many images; for one thread, and in a `with` statement.

    An answer does not depend on the others, except for rounding: a sampled one draws from a random state of its own,
    which follows from the seed and the image's SHA-256.

    Args:
        model, processor: from `load`.
        question: the text after the image.
        settings: of each answer.
        batch_size: answers that are generated at once.
        system_prompt: precedes the question.
        features: a store to look images up in and to add new ones to.

    Raises:
        ValueError: if the question alone is too long for the context.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor,
        question: str,
        settings: Settings,
        batch_size: int,
        system_prompt: str | None = None,
        features: FeatureCache | None = None,
    ):
        self._model, self._question, self._system_prompt = model, question, system_prompt
        self._processor = replace(processor, tiler=lambda image: image)  # images come in tiles
        self._settings, self._batch_size = settings, batch_size
        self._encode = features.encode if features else model.encode_image
        self._context = model.language_model.args.max_position_embeddings
        check_length(len(processor.encode(question, (), system_prompt).ids), self._context)
        self._queued: deque[tuple[Hashable, Prompt]] = deque()
        self._encoded: deque[tuple[Hashable, Prompt, mx.array]] = deque()
        self._answers: dict[int, tuple[Hashable, BatchAnswer, list[str]]] = {}

    def __enter__(self) -> "ImageBatch":
        self._stream = mx.stream(mlx_lm.generation_stream)
        self._stream.__enter__()
        self._batch = mlx_lm.new_batch(self._model, self._processor.tokenizer.eos_token_ids, self._batch_size)
        return self

    def __exit__(self, *error) -> None:
        self._batch.close()
        self._stream.__exit__(*error)

    @property
    def is_idle(self) -> bool:
        """True if there is nothing to do."""
        return not (self._queued or self._encoded or self._answers)

    @property
    def has_room(self) -> bool:
        """True if `add` should be called: images wait, encoded or not, for as many answers as there may be at once."""
        return len(self._queued) + len(self._encoded) < self._batch_size

    def add(self, key: Hashable, image: TiledImage) -> None:
        """Queue an image, whose SHA-256 must be set.

        Raises:
            ValueError: if its prompt is too long for the context.
        """
        prompt = self._processor.encode(self._question, [image], self._system_prompt)
        check_length(len(prompt.ids), self._context)
        self._queued.append((key, prompt))

    def step(self) -> list[tuple[Hashable, Answer | Exception]]:
        """Start answers for which there is room, and generate a token of each; return those that are complete.

        An answer that failed is returned as its exception.
        """
        while len(self._answers) < self._batch_size and (self._queued or self._encoded):
            if not self._encoded:
                self._encode_queued()
            self._begin(*self._encoded.popleft())
        if not self._answers:
            return []
        done = []
        for response in self._batch.next()[1]:
            key, answer, texts = self._answers[response.uid]
            texts.append(answer.add(response))
            if answer.failure is not None and response.finish_reason is None:
                self._batch.remove([response.uid])
            if answer.failure is not None or response.finish_reason is not None:
                del self._answers[response.uid]
                whole = Answer("".join(texts).strip(), response.finish_reason, len(answer.tokens))
                done.append((key, answer.failure or whole))
        return done

    def _encode_queued(self) -> None:
        """Encode one queued image, and further ones as long as their tiles fit one batch of the tower."""
        chosen, tiles = [], 0
        while self._queued and (not chosen or tiles + self._queued[0][1].images[0].num_tiles <= TILE_BATCH_SIZE):
            chosen.append(self._queued.popleft())
            tiles += chosen[-1][1].images[0].num_tiles
        rows = self._encode([prompt.images[0] for _, prompt in chosen])
        self._encoded += [(*each, visual_tokens) for each, visual_tokens in zip(chosen, rows, strict=True)]

    def _begin(self, key: Hashable, prompt: Prompt, visual_tokens: mx.array) -> None:
        """Prefill a prompt, all but its last token, and start its answer."""
        [image] = prompt.images
        embeddings = self._model.splice(mx.array(prompt.ids[:-1]), [image.grid], [visual_tokens])
        caches = mlx_lm.new_caches(self._model)
        for start in range(0, len(embeddings), PREFILL_STEP):
            mlx_lm.prefill(self._model, embeddings[start : start + PREFILL_STEP], caches)
        most = self._settings.max_tokens
        if self._context:
            most = min(most, self._context - len(prompt.ids))
        settings = replace(self._settings, max_tokens=most, seed=_seed(self._settings.seed, image.sha256))
        answer = BatchAnswer(prompt, settings, 0, self._processor.tokenizer.detokenizer)
        [uid] = mlx_lm.insert(self._batch, [answer], caches)
        self._answers[uid] = key, answer, []
        mx.clear_cache()


def _seed(seed: int | None, sha256: bytes) -> int | None:
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed} {sha256.hex()}".encode()).digest()[:8])

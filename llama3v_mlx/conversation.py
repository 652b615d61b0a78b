"""A conversation whose key-value cache is kept: a follow-up prefills its own text, and no image is ever read twice."""

import json
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache, trim_prompt_cache

from .features.lookup import FeatureCache
from .generation import GenerationResponse, stream_generate
from .image import ImageSource
from .models.llama3v import Model
from .prompt import EOT, Processor, Prompt

# The caches of mlx-lm that a saved conversation may hold: its loader would take any name.
CACHES = {"KVCache", "QuantizedKVCache"}


@dataclass
class Turn:
    """A question and its answer."""

    text: str
    images: list[str]  # what they are called
    answer: str = ""
    start: int = 0  # how many tokens come before the question
    num_tokens: int = 0  # of the question, its images included


@dataclass
class Conversation:
    """Questions and answers about images, one after another.

    `ids` are all tokens so far, each image one run of placeholders; the cache holds all of them but perhaps the last.
    """

    model: Model
    processor: Processor
    system_prompt: str | None = None
    features: FeatureCache | None = None
    options: dict[str, Any] = field(default_factory=dict)  # for `stream_generate`
    turns: list[Turn] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)

    def __post_init__(self):
        self._cache = make_prompt_cache(self.model)

    @property
    def context(self) -> int:
        """How many tokens there is room for."""
        return self.model.language_model.args.max_position_embeddings

    def ask(self, text: str, images: Sequence[ImageSource] = (), names: Sequence[str] = ()) -> Generator:
        """Answer the next question, piece by piece, as `stream_generate` does.

        If the generator is closed early, what was answered until then is kept.

        Raises:
            ValueError: if the context has no room for the question; the conversation is then as it was before.
            ImageError: if an image cannot be used; likewise.
        """
        tic = time.perf_counter()
        encoded = self._encode(text, images)
        new = encoded.ids
        turn = Turn(text, list(names) or [str(image) for image in images], "", len(self.ids), len(new))
        if len(self.ids) + len(new) >= self.context:
            raise ValueError(
                f"the question takes {len(new)} tokens, and of the context's {self.context} only "
                f"{self.context - len(self.ids)} are left; drop the last question (/undo) or start anew (/clear)"
            )
        # The last token of an answer may not have gone through the model yet.
        prompt = Prompt(self.ids[self._cache[0].offset :] + new, encoded.images)
        seconds, answer = time.perf_counter() - tic, []
        options = {**self.options, "features": self.features, "prompt_cache": self._cache}
        stream = stream_generate(self.model, self.processor, prompt, **options)
        try:
            for response in stream:
                response.preprocess_seconds += seconds
                answer.append(response.token)
                turn.answer += response.text
                yield response
        finally:
            stream.close()
            if answer:
                self.ids += new + answer
                self.turns.append(turn)
            # It runs ahead by a token of its own choice, and is cut where the answer was.
            self._trim(len(self.ids))

    def undo(self) -> Turn | None:
        """Take the last question and its answer back; None if there is none."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.ids = self.ids[: turn.start]
        self._trim(turn.start)
        return turn

    def clear(self) -> None:
        """Forget everything."""
        self.turns, self.ids = [], []
        self._cache = make_prompt_cache(self.model)

    def save(self, path: Path, name: str) -> None:
        """Write questions, answers and cache to a safetensors file, with the model's `name`."""
        talk = {"model": name, "system_prompt": self.system_prompt, "ids": self.ids}
        talk["turns"] = list(map(asdict, self.turns))
        partial = path.with_name(f"{path.stem}.partial.safetensors")
        save_prompt_cache(str(partial), self._cache, {"conversation": json.dumps(talk)})
        os.replace(partial, path)

    def load(self, path: Path, name: str) -> None:
        """Go on with a conversation that was saved.

        Raises:
            ValueError: if the file is something else, or of another model.
        """
        try:
            _, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
            talk = json.loads(metadata["0.conversation"])
            known = {value for key, value in metadata.items() if key.startswith("1.")} <= CACHES
        except (RuntimeError, OSError, KeyError, ValueError):
            raise ValueError(f"{path}: is not a conversation that /save wrote") from None
        if not known or talk["model"] != name:
            raise ValueError(f"{path}: was made with {talk['model']}, and this is {name}")
        self._cache = load_prompt_cache(str(path))
        self.system_prompt, self.ids = talk["system_prompt"], talk["ids"]
        self.turns = [Turn(**turn) for turn in talk["turns"]]

    def _encode(self, text: str, images: Sequence[ImageSource]) -> Prompt:
        """What the next question adds: the end of the last answer if need be, the question, the head of its answer."""
        messages = [{"role": "user", "content": [*({"type": "image", "image": image} for image in images), text]}]
        if not self.turns and self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        tiler = self.features.tile if self.features else None
        encoded = replace(self.processor, tiler=tiler).encode(messages)
        if not self.turns:
            return encoded
        eot = self.processor.tokenizer.convert_tokens_to_ids(EOT)
        end = [] if self.ids[-1] == eot else [eot]
        return Prompt(end + encoded.ids[1:], encoded.images)  # without another BOS

    def _trim(self, length: int) -> None:
        trim_prompt_cache(self._cache, max(0, self._cache[0].offset - length))


def last_figures(response: GenerationResponse, conversation: Conversation) -> str:
    """What an answer took, in one line."""
    first = response.preprocess_seconds + response.vision_seconds + response.prefill_seconds
    parts = [f"first token {first:.2f} s"]
    if response.num_tiles:
        parts[0] += (
            f" (preprocess {response.preprocess_seconds:.2f}, vision {response.vision_seconds:.2f}, "
            f"prefill {response.prefill_seconds:.2f})"
        )
    parts.append(f"{response.prompt_tokens} tokens read")
    parts.append(f"{response.generation_tokens} written at {response.generation_tps:.1f}/s")
    parts.append(f"context {len(conversation.ids)} of {conversation.context}")
    return ", ".join(parts)

"""Multi-turn conversation that keeps its key-value cache: a follow-up only prefills its own tokens."""

import json
import os
import re
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    QuantizedKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from .checkpoint import check_shard, check_tensors
from .config import TOKEN_ID, one_line
from .features.lookup import FeatureCache
from .fields import Items, Object, Text, check_fields
from .files import beside, check_name
from .generation import GenerationResponse, stream_generate
from .image import ImageSource
from .models.llama3v import Model
from .prompt import Processor, Prompt
from .prompt_tokens import EOT

# mlx-lm cache classes allowed in a saved conversation; mlx-lm's loader would accept any name.
CACHES = {"KVCache", "QuantizedKVCache"}
# Names in its file: mlx-lm's loader would make a list of 10^8 for one with that number.
_PLACE = re.compile(r"0\.conversation|\d{1,4}(\.\d{1,4}){0,3}")
# Keys of a saved conversation, and of its turns.
SAVED = {"model": Text(), "system_prompt": Text(), "ids": Items(TOKEN_ID), "turns": Items(Object())}
TURN = {"text": Text(), "images": Items(Text()), "answer": Text(), "start": TOKEN_ID, "num_tokens": TOKEN_ID}


@dataclass
class Turn:
    """Question and answer."""

    text: str
    images: list[str]  # names of the images
    answer: str = ""
    start: int = 0  # number of tokens before the question
    num_tokens: int = 0  # tokens of the question, including its images


@dataclass
class Conversation:
    """Conversation about images.

    `ids` are all tokens so far, each image as one run of placeholders; the cache may lack the last one.
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
        """Context length in tokens."""
        return self.model.language_model.args.max_position_embeddings

    def ask(self, text: str, images: Sequence[ImageSource] = (), names: Sequence[str] = ()) -> Generator:
        """Answer the next question; yields responses like `stream_generate`.

        If the generator is closed early, the partial answer is kept.

        Raises:
            ValueError: if the question does not fit the context; the conversation is unchanged.
            ImageError: if an image is unusable; the conversation is unchanged.
        """
        tic = time.perf_counter()
        encoded = self._encode(text, images)
        new = encoded.ids
        turn = Turn(text, list(names) or [str(image) for image in images], "", len(self.ids), len(new))
        if len(self.ids) + len(new) >= self.context:
            raise ValueError(
                f"the question takes {len(new)} tokens, but only {self.context - len(self.ids)} of the context's "
                f"{self.context} are left; remove the last question (/undo) or start over (/clear)"
            )
        # The last token of an answer may not be in the cache yet.
        prompt = Prompt(self.ids[self._cache[0].offset :] + new, encoded.images)
        seconds, answer = time.perf_counter() - tic, []
        read = self.ids[: len(self.ids) + len(new) - len(prompt.ids)]
        options = {**self.options, "features": self.features, "prompt_cache": self._cache, "history": read}
        stream = stream_generate(self.model, self.processor, prompt, **options)
        try:
            for response in stream:
                response.preprocess_seconds += seconds
                answer.append(response.token)
                turn.answer += response.text
                yield response
        except KeyboardInterrupt:
            # In the middle of a pass, whose keys and values may be incomplete: the answer is read again.
            self._trim(max(0, len(self.ids) + len(new) - 1))
            raise
        finally:
            stream.close()
            if answer:
                self.ids += new + answer
                self.turns.append(turn)
            # Tokens are generated ahead, so the cache is trimmed to the answer.
            self._trim(len(self.ids))

    def undo(self) -> Turn | None:
        """Remove and return the last question and its answer; None if there is none."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        self.ids = self.ids[: turn.start]
        self._trim(turn.start)
        return turn

    def clear(self) -> None:
        """Start over with an empty conversation."""
        self.turns, self.ids = [], []
        self._cache = make_prompt_cache(self.model)

    def save(self, path: Path, name: str) -> None:
        """Write the turns, the cache and the model's `name` to a safetensors file."""
        talk = {"model": name, "system_prompt": self.system_prompt, "ids": self.ids}
        talk["turns"] = list(map(asdict, self.turns))
        check_name(path)
        with beside(path) as partial:
            save_prompt_cache(str(partial), self._cache, {"conversation": json.dumps(talk)})

    def load(self, path: Path, name: str) -> None:
        """Load a saved conversation.

        Raises:
            ValueError: if there is no such file, or it is not a conversation, or is another model's.
        """
        if not os.path.lexists(path):
            raise ValueError(f"{path}: no such file")
        try:
            names = check_shard(path)
            _, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
            talk = json.loads(metadata["0.conversation"])
            if not all(_PLACE.fullmatch(name) for name in (*names, *metadata)):
                raise ValueError
            known = {value for key, value in metadata.items() if key.startswith("1.")} <= CACHES
            talk = check_fields(str(path), talk, SAVED, ("model", "ids", "turns"))
            turns = [Turn(**check_fields(f"{path}: turn {i}", t, TURN, (*TURN,))) for i, t in enumerate(talk["turns"])]
        except (RuntimeError, OSError, KeyError, ValueError, RecursionError):
            raise ValueError(f"{path}: is not a conversation written by /save, or is damaged") from None
        if not known or talk["model"] != name:
            raise ValueError(f"{path}: was saved with the model {talk['model']}, not {name}")
        try:
            cache = load_prompt_cache(str(path))
            self._check(talk["ids"], turns, cache)
        except Exception as e:  # mlx-lm's loader raises almost anything on damaged data
            raise ValueError(f"{path}: is damaged ({one_line(e)})") from e
        self._cache, self.turns = cache, turns
        self.system_prompt, self.ids = talk.get("system_prompt"), talk["ids"]

    def _check(self, ids: list[int], turns: list[Turn], cache: list) -> None:
        """Raise ValueError unless a loaded conversation fits this model: MLX checks neither ids nor offsets."""
        args = self.model.language_model.args
        width = args.head_dim or args.hidden_size // args.num_attention_heads
        if any(id >= args.vocab_size for id in ids) or len(ids) > self.context:
            raise ValueError("its ids are beyond the model's vocabulary or context")
        starts = [0, *(turn.start for turn in turns), len(ids)]
        if starts != sorted(starts) or (ids and not turns):
            raise ValueError("its turns do not fit its ids")
        if len(cache) != len(self._cache):
            raise ValueError(f"its cache has {len(cache)} layers, but the model {len(self._cache)}")
        for layer in cache if ids else ():
            if type(layer.offset) is not int or layer.offset not in (len(ids), len(ids) - 1):
                raise ValueError("its cache does not fit its ids")
            arrays = {"keys": layer.keys, "values": layer.values}
            held = layer.keys[0].shape[2] if isinstance(layer, QuantizedKVCache) else layer.keys.shape[2]
            whole = mx.zeros((1, args.num_key_value_heads, held, width))
            if isinstance(layer, QuantizedKVCache):
                packed = mx.quantize(whole, group_size=layer.group_size, bits=layer.bits)
                expected = {"keys": list(packed), "values": list(packed)}
            else:
                expected = {"keys": whole, "values": whole}
            if held < layer.offset:
                raise ValueError("its cache is shorter than its ids")
            check_tensors(Path("cache"), expected, dict(tree_flatten(arrays)))

    def _encode(self, text: str, images: Sequence[ImageSource]) -> Prompt:
        """Encode the next question, with the last answer's end-of-turn token if missing, and the answer's header."""
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
        """Trim the cache to `length` tokens; after Ctrl-C, some layers may have more than others."""
        for cache in self._cache:
            trim_prompt_cache([cache], max(0, cache.offset - length))


def last_figures(response: GenerationResponse, conversation: Conversation) -> str:
    """Format the timings and token counts of an answer in one line."""
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

"""Constrain answers to a JSON schema by llguidance, of the `json` extra."""

import functools
import json
import threading
from collections.abc import Callable

import mlx.core as mx
import numpy as np

COMPACT = {"whitespace_flexible": False}  # else a model that knows no JSON may write spaces without end
MAX_SCHEMA = 1 << 16  # characters


class Schemas:
    """Compile JSON schemas into matchers; methods may be called from any thread.

    Args:
        tokenizer: mlx-lm's wrapped tokenizer.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._guide = None  # takes a second for a large vocabulary
        self._lock = threading.Lock()

    def matcher(self, schema: dict):
        """Matcher of a JSON schema.

        Raises:
            ValueError: if the schema is too long or cannot be kept to, or llguidance is missing.
        """
        if len(json.dumps(schema)) > MAX_SCHEMA:
            raise ValueError(f"has over {MAX_SCHEMA:,} characters")
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise ValueError("needs llguidance; pip install 'llama3v-mlx[json]' brings it") from None
        with self._lock:
            if self._guide is None:
                fast = self._tokenizer.backend_tokenizer
                ends = sorted(self._tokenizer.eos_token_ids)
                self._guide = LLTokenizer(fast.to_str(), n_vocab=self._vocab_size, eos_token=ends)
        try:
            matcher = LLMatcher(self._guide, LLMatcher.grammar_from_json_schema(schema, COMPACT), log_level=0)
        except Exception as e:  # whatever llguidance raises on a schema
            raise ValueError(" ".join(str(e).split())) from e
        if matcher.is_error():
            raise ValueError(" ".join(matcher.get_error().split()))
        return matcher


@functools.lru_cache(maxsize=1)
def schemas_of(tokenizer, vocab_size: int) -> Schemas:
    """Compiler of schemas for a tokenizer, kept from one call to the next."""
    return Schemas(tokenizer, vocab_size)


def keep_to(matcher) -> Callable[[mx.array, mx.array], mx.array]:
    """Logits processor on generated tokens that masks what a matcher does not allow."""
    matcher = matcher.deep_copy()
    consumed = 0

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal consumed
        new = np.array(tokens[consumed:]).tolist()
        consumed += len(new)
        matcher.consume_tokens(new)
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: logits.shape[-1]].astype(bool)
        return mx.where(mx.array(allowed), logits, -mx.inf)

    return process

"""OpenAI's `response_format`: only tokens that a JSON schema allows are drawn. The `json` extra brings llguidance."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

COMPACT = {"whitespace_flexible": False}  # else a model that knows no JSON may write spaces without end


class SchemaError(ValueError):
    """A `response_format` that cannot be had."""


class Schemas:
    """Makes logits processors of response formats.

    Args:
        tokenizer: mlx-lm's wrapped tokenizer.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._guide = None  # takes a second for a large vocabulary

    def processor(self, response_format: dict) -> Callable[[Sequence[int], mx.array], mx.array] | None:
        """A logits processor, which is to be given generated tokens alone; None if any text will do.

        Raises:
            SchemaError: if the format is unknown, its schema cannot be kept to, or llguidance is missing.
        """
        kind = response_format.get("type") if isinstance(response_format, dict) else None
        if kind == "text":
            return None
        if kind not in ("json_object", "json_schema"):
            raise SchemaError(f"response_format has the type {kind!r}; it must be text, json_object or json_schema")
        schema = {"type": "object"}
        if kind == "json_schema":
            schema = (response_format.get("json_schema") or {}).get("schema")
            if not isinstance(schema, dict):
                raise SchemaError("response_format.json_schema.schema must be an object")
        try:
            from llguidance import LLMatcher, LLTokenizer
        except ImportError:
            raise SchemaError("this server has no llguidance; pip install 'llama3v-mlx[json]' brings it") from None
        if self._guide is None:
            fast = self._tokenizer.backend_tokenizer
            ends = sorted(self._tokenizer.eos_token_ids)
            self._guide = LLTokenizer(fast.to_str(), n_vocab=self._vocab_size, eos_token=ends)
        grammar = LLMatcher.grammar_from_json_schema(schema, COMPACT)
        matcher = LLMatcher(self._guide, grammar, log_level=0)
        if matcher.is_error():
            raise SchemaError(f"response_format: {matcher.get_error()}")
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

"""Constrain answers to a JSON schema by llguidance, of the `json` extra."""

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from .config import read_json

COMPACT = {"whitespace_flexible": False}  # else a model that knows no JSON may write spaces without end
MAX_SCHEMA = 1 << 16  # characters


class SchemaError(ValueError):
    """Raised when answers cannot be constrained to a schema."""


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
            SchemaError: if the schema is too long or cannot be kept to, or llguidance is missing.
        """
        LLMatcher, LLTokenizer = llguidance()
        grammar = _grammar(schema)
        with self._lock:
            if self._guide is None:
                described = _with_plain_text(self._tokenizer.backend_tokenizer.to_str())
                ends = sorted(self._tokenizer.eos_token_ids)
                self._guide = LLTokenizer(described, n_vocab=self._vocab_size, eos_token=ends)
        try:
            matcher = LLMatcher(self._guide, grammar, log_level=0)
        except Exception as e:  # whatever llguidance raises on a schema
            raise SchemaError(" ".join(str(e).split())) from e
        if matcher.is_error():
            raise SchemaError(" ".join(matcher.get_error().split()))
        matcher.compute_bitmask()
        if matcher.is_stopped():  # before the first token
            raise SchemaError("no answer satisfies it, such as one that is a $ref to itself")
        return matcher


def _grammar(schema: dict) -> str:
    LLMatcher, _ = llguidance()
    if len(json.dumps(schema)) > MAX_SCHEMA:
        raise SchemaError(f"has over {MAX_SCHEMA:,} characters")
    try:
        return LLMatcher.grammar_from_json_schema(schema, COMPACT)
    except Exception as e:  # whatever llguidance raises on a schema
        raise SchemaError(" ".join(str(e).split())) from e


def _with_plain_text(tokenizer: str) -> str:
    """Rename a tokenizer.json's special tokens to what no JSON text has, a control character.

    Where a schema forces a text, llguidance takes the tokenizer's own encoding of it. That must not be <|eot_id|> for
    its name in an enum, nor a special "!", which is also an ordinary token of the released vocabulary.
    """
    described = json.loads(tokenizer)
    ordinary = described["model"]["vocab"]
    added = [each for each in described["added_tokens"] if each["content"] not in ordinary]
    described["added_tokens"] = [{**each, "content": f"\0{each['id']}"} if each["special"] else each for each in added]
    return json.dumps(described)


@functools.lru_cache(maxsize=1)
def schemas_of(tokenizer, vocab_size: int) -> Schemas:
    """Compiler of schemas for a tokenizer, kept from one call to the next."""
    return Schemas(tokenizer, vocab_size)


def read_schema(path: Path) -> dict:
    """Read a JSON schema from a file.

    Raises:
        CheckpointError: if the file is not a JSON object.
        SchemaError: if the schema cannot be kept to, or llguidance is missing.
    """
    schema = read_json(path)
    LLMatcher, _ = llguidance()
    try:
        if error := LLMatcher.validate_grammar(_grammar(schema)):
            raise SchemaError(error)
    except Exception as e:  # whatever llguidance raises on a schema
        raise SchemaError(f"{path}: is not a JSON schema that answers can be constrained to: {e}") from e
    return schema


def llguidance():
    """Return LLMatcher and LLTokenizer of llguidance.

    Raises:
        SchemaError: if it is not installed.
    """
    try:
        from llguidance import LLMatcher, LLTokenizer
    except ImportError:
        raise SchemaError("JSON schemas need llguidance: pip install 'llama3v-mlx[json]'") from None
    return LLMatcher, LLTokenizer


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

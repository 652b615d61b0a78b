"""OpenAI's `response_format`: an answer that keeps to a JSON schema."""

import json

from ..schema import SchemaError, Schemas
from .checks import RequestError


class ResponseFormats:
    """Compile response formats into matchers; methods may be called from any thread.

    Args:
        tokenizer: mlx-lm's wrapped tokenizer.
        vocab_size: of the model.
    """

    def __init__(self, tokenizer, vocab_size: int):
        self._schemas = Schemas(tokenizer, vocab_size)

    def matcher(self, response_format: dict | None):
        """Matcher of a response format; None if any text is allowed.

        Raises:
            RequestError: if the format is unknown, its schema cannot be kept to, or llguidance is missing.
        """
        if response_format is None:
            return None
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind not in ("json_object", "json_schema"):
            raise _error(f"type is {json.dumps(kind)[:50]}; it must be text, json_object or json_schema")
        schema = {"type": "object"}
        if kind == "json_schema":
            named = response_format.get("json_schema")
            schema = named.get("schema") if isinstance(named, dict) else None
            if not isinstance(schema, dict):
                raise _error("json_schema.schema must be an object")
        try:
            return self._schemas.matcher(schema)
        except SchemaError as e:
            raise _error(f"{kind} {e}") from e


def _error(message: str) -> RequestError:
    text = " ".join(message.split())[:500]
    return RequestError(400, f"response_format: {text}", "invalid_response_format", "response_format")

"""Requests as frozen dataclasses; their fields, types and ranges are exactly what the server accepts."""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..features.grammar import parse_date
from .checks import (
    RequestError,
    an_object,
    anything,
    bad,
    boolean,
    integer,
    list_of,
    number,
    one_of,
    optional,
    parse,
    required,
    text,
    unsupported,
)

MAX_STOPS = 16
MAX_CHOICES = 8


@dataclass(frozen=True)
class Limits:
    """Upper bounds of a request."""

    vocab_size: int
    context: int  # tokens
    longest_token: int  # characters of the vocabulary's longest
    max_images: int = 16
    max_pixels: int = 100_000_000  # of all images of a request


def stops(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    return list_of(text(1000, least=1), most=MAX_STOPS)(value, where)


def logit_bias(value: Any, where: str) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > 1024:
        raise bad(where, "must be an object of at most 1,024 token ids")
    biases = {}
    for key, bias in value.items():
        if not re.fullmatch(r"\d{1,9}", key, re.ASCII):
            raise bad(where, f"{key[:20]!r} is not a token id")
        biases[int(key)] = number(-100, 100)(bias, f"{where}.{key}")
    return biases


@dataclass(frozen=True)
class ImagePart:
    """An image part of a message."""

    uri: str
    where: str
    detail: str = "auto"


detail = one_of("auto", "low", "high", "original")


@dataclass(frozen=True)
class ImageURL:
    url: str = required(text(1 << 31, least=1))
    detail: str = optional(detail, "auto")


@dataclass(frozen=True)
class Message:
    role: str
    content: tuple[str | ImagePart, ...]


@dataclass(frozen=True)
class _RawMessage:
    role: str = required(one_of("system", "developer", "user", "assistant"))
    content: Any = optional(lambda value, where: _content(value, where), ())
    name: None = optional(anything)
    refusal: None = optional(unsupported(""))
    annotations: None = optional(anything)
    # What clients leave in messages that they send again; none of it is read.
    id: None = optional(anything)
    parsed: None = optional(anything)
    reasoning: None = optional(anything)
    reasoning_content: None = optional(anything)
    cache_control: None = optional(anything)
    copilot_cache_control: None = optional(anything)
    audio: None = optional(unsupported())
    tool_calls: None = optional(unsupported([]))
    function_call: None = optional(unsupported())


def message(value: Any, where: str) -> Message:
    raw = parse(_RawMessage, value, where)
    if not raw.content and raw.role != "assistant":
        raise bad(f"{where}.content", "is missing", "missing_field")
    return Message("system" if raw.role == "developer" else raw.role, raw.content)


def _content(value: Any, where: str) -> tuple[str | ImagePart, ...]:
    if isinstance(value, str):
        return (text(1 << 31)(value, where),)
    return list_of(_part)(value, where)


def _part(value: Any, where: str) -> str | ImagePart:
    kind = an_object(value, where).get("type")
    if kind in ("text", "input_text"):
        return text(1 << 31)(parse(_TextPart, value, where).text, f"{where}.text")
    if kind in ("image_url", "input_image"):
        part = parse(_ImagePart, value, where)
        return ImagePart(part.image_url.url, f"{where}.image_url", part.detail or part.image_url.detail)
    shown = json.dumps(kind)[:50] if isinstance(kind, str) else "missing or not text"
    raise bad(f"{where}.type", f"is {shown}; it must be text or image_url", "invalid_content")


def image_url(value: Any, where: str) -> ImageURL:
    return parse(ImageURL, {"url": value} if isinstance(value, str) else value, where)


@dataclass(frozen=True, kw_only=True)
class _Part:
    type: str = required(anything)
    cache_control: None = optional(anything)
    prompt_cache_breakpoint: None = optional(anything)


@dataclass(frozen=True, kw_only=True)
class _TextPart(_Part):
    text: str = required(text(1 << 31))


@dataclass(frozen=True, kw_only=True)
class _ImagePart(_Part):
    image_url: ImageURL = required(image_url)
    detail: str | None = optional(detail)


@dataclass(frozen=True)
class StreamOptions:
    include_usage: bool = optional(boolean, False)
    include_obfuscation: None = optional(anything)


@dataclass(frozen=True)
class GenerationRequest:
    """Common fields of chat and plain completions."""

    model: str | None = optional(text(1000))  # whatever it is, the one model answers
    max_tokens: int | None = optional(integer(1, 1 << 31))
    temperature: float | None = optional(number(0, 2))
    top_p: float | None = optional(number(0, 1))
    top_k: int | None = optional(integer(0, 1 << 31))
    min_p: float | None = optional(number(0, 1))
    repetition_penalty: float | None = optional(number(0, 10, above=True))
    presence_penalty: float = optional(number(-2, 2), 0.0)
    frequency_penalty: float = optional(number(-2, 2), 0.0)
    logit_bias: dict[int, float] | None = optional(logit_bias)
    n: int = optional(integer(1, MAX_CHOICES), 1)
    seed: int | None = optional(integer(-(1 << 63), (1 << 64) - 1))
    stop: tuple[str, ...] = optional(stops, ())
    stream: bool = optional(boolean, False)
    stream_options: StreamOptions | None = optional(lambda value, where: parse(StreamOptions, value, where))
    user: None = optional(anything)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, limits: Limits) -> None:
        """Check combinations of fields, and values against this model.

        Raises:
            RequestError: if a value is out of range, or two fields exclude each other.
        """
        if self.stream_options is not None and not self.stream:
            raise bad("stream_options", "is allowed only with stream")
        for token in self.logit_bias or ():
            if token >= limits.vocab_size:
                raise bad("logit_bias", f"{token} is not one of the model's {limits.vocab_size:,} tokens")


@dataclass(frozen=True, kw_only=True)
class ChatRequest(GenerationRequest):
    messages: tuple[Message, ...] = required(list_of(message, least=1, most=4096))
    max_completion_tokens: int | None = optional(integer(1, 1 << 31))
    max_image_tiles: int | None = optional(integer(1, 10))  # per image, the overview included
    logprobs: bool = optional(boolean, False)
    top_logprobs: int | None = optional(integer(0, 20))
    response_format: dict | None = optional(an_object)
    metadata: None = optional(anything)
    store: None = optional(unsupported(False))
    service_tier: None = optional(one_of("auto", "default"))
    safety_identifier: None = optional(anything)
    prompt_cache_key: None = optional(anything)
    prompt_cache_options: None = optional(anything)
    prompt_cache_retention: None = optional(anything)
    parallel_tool_calls: None = optional(boolean)
    modalities: None = optional(unsupported(["text"]))
    tools: None = optional(unsupported([]))
    tool_choice: None = optional(unsupported("none", "auto"))
    functions: None = optional(unsupported([]))
    function_call: None = optional(unsupported("none", "auto"))
    audio: None = optional(unsupported())
    prediction: None = optional(unsupported())
    reasoning_effort: None = optional(unsupported("none", "minimal", "low", "medium"))  # it never reasons
    moderation: None = optional(unsupported())
    verbosity: None = optional(unsupported("medium"))
    web_search_options: None = optional(unsupported())
    chat_template: None = optional(unsupported())
    chat_template_kwargs: None = optional(unsupported())

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.top_logprobs and not self.logprobs:
            raise bad("top_logprobs", "is allowed only with logprobs")

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def prompt(value: Any, where: str) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str):
        return text(1 << 31, least=1)(value, where)
    if not isinstance(value, list) or any(isinstance(each, (str, list)) for each in value):
        raise bad(where, "must be one text, or one list of token ids", "invalid_prompt")
    return list_of(integer(0, 1 << 31), least=1)(value, where)


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(GenerationRequest):
    prompt: str | tuple[int, ...] = required(prompt)
    logprobs: int | None = optional(integer(0, 5))
    echo: None = optional(unsupported(False))
    suffix: None = optional(unsupported(""))
    best_of: None = optional(unsupported(1))

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if not isinstance(self.prompt, str) and max(self.prompt) >= limits.vocab_size:
            raise bad("prompt", f"{max(self.prompt)} is not one of the model's {limits.vocab_size:,} tokens")

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def inputs(value: Any, where: str) -> tuple[str, ...]:
    return list_of(text(1 << 31, least=1), least=1, most=256)([value] if isinstance(value, str) else value, where)


@dataclass(frozen=True)
class EmbeddingRequest:
    input: tuple[str, ...] = required(inputs)  # texts, and images as data: URIs
    model: str | None = optional(text(1000))
    encoding_format: str = optional(one_of("float", "base64"), "float")
    dimensions: None = optional(unsupported())
    user: None = optional(anything)


@dataclass(frozen=True)
class TilesRequest:
    """Request for the tiling of an image, from the page."""

    image: str = required(text(1 << 31, least=1))
    max_image_tiles: int | None = optional(integer(1, 10))


def date(value: Any, where: str) -> datetime:
    try:
        return parse_date(text(40)(value, where))
    except RequestError:
        raise
    except ValueError:
        raise bad(where, "is not a date like 2024, 2024-05 or 2024-05-17") from None


@dataclass(frozen=True)
class LibrarySearchRequest:
    query: str | None = optional(text(1000))  # by the grammar of `llama3v search`, but naming no files
    image: str | None = optional(text(1 << 31, least=1))  # a data: URI, added to the query
    after: datetime | None = optional(date)
    before: datetime | None = optional(date)
    folder: str | None = optional(text(4096))  # relative to the library
    top: int = optional(integer(1, 200), 60)


@dataclass(frozen=True)
class LibraryUpdateRequest:
    """Request to bring the library up to date."""

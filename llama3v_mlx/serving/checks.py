"""Check the values of a request: a body is parsed into a dataclass whose fields have a check each.

What a body has beside these fields is refused by name.
"""

import dataclasses
import json
import logging
import re
import uuid
from collections.abc import Callable
from dataclasses import field
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
Check = Callable[[Any, str], Any]  # (value, where it stands) to the value that is used; raises RequestError

MAX_DEPTH = 64  # of nested arrays and objects
MAX_VALUES = 200_000  # in a body: a parsed value takes up to thirty times its text
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{\]},]', re.DOTALL)


class RequestError(ValueError):
    """Raised for a request that cannot be served.

    Args:
        status: of HTTP.
        message: for the client, one line.
        code: a name of the kind of error.
        param: the field that is to blame.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def bad(where: str, message: str, code: str = "invalid_value") -> RequestError:
    return RequestError(400, f"{where}: {message}", code, where)


def internal_error(error: Exception) -> RequestError:
    """Log an unexpected error under an id; return the error for the client, with that id."""
    number = uuid.uuid4().hex[:12]
    log.error("internal error %s", number, exc_info=error)
    return RequestError(500, f"internal error {number}; the server's log says more", "internal_error")


def read_json(data: bytes) -> Any:
    """Parse a JSON body; depth and number of values are bounded before anything is built.

    Raises:
        RequestError: if it is not JSON in UTF-8, or out of bounds.
    """
    depth = count = 0
    for found in _TOKENS.finditer(data):
        first = data[found.start()]
        if first == 0x22:  # a quote
            continue
        count += 1
        depth += (first in b"[{") - (first in b"]}")
        if depth > MAX_DEPTH or count > MAX_VALUES:
            what = f"is nested more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else f"has over {MAX_VALUES:,} values"
            raise RequestError(400, f"the body {what}", "invalid_json")

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=constant)
    except (ValueError, RecursionError) as e:
        raise RequestError(400, f"the body is not JSON: {e}", "invalid_json") from e


def text(most: int = 1 << 20, least: int = 0) -> Check:
    def check(value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise bad(where, "must be text")
        if not least <= len(value) <= most:
            raise bad(where, f"must have {least} to {most:,} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise bad(where, "is not Unicode: it has a lone surrogate") from None
        return value

    return check


def number(low: float, high: float, above: bool = False) -> Check:
    def check(value: Any, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise bad(where, "must be a number")
        if not low <= value <= high or (above and value == low):
            raise bad(where, f"must be {'above' if above else 'at least'} {low} and at most {high}")
        return float(value)

    return check


def integer(low: int, high: int) -> Check:
    def check(value: Any, where: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(where, "must be a whole number")
        if not low <= value <= high:
            raise bad(where, f"must be from {low} to {high}")
        return value

    return check


def boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise bad(where, "must be true or false")
    return value


def one_of(*values: Any) -> Check:
    def check(value: Any, where: str) -> Any:
        if not any(type(value) is type(each) and value == each for each in values):
            raise bad(where, f"must be {' or '.join(map(json.dumps, values))}")
        return value

    return check


def unsupported(*harmless: Any) -> Check:
    """Refuse a field of OpenAI's API, except for values without effect."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(each) and value == each for each in harmless):
            raise bad(where, "is not supported by this server", "unsupported_field")

    return check


def anything(value: Any, where: str) -> None:
    """Accept a field that does not influence answers."""


def list_of(check: Check, least: int = 0, most: int = MAX_VALUES) -> Check:
    def check_list(value: Any, where: str) -> tuple:
        if not isinstance(value, list):
            raise bad(where, "must be a list")
        if not least <= len(value) <= most:
            raise bad(where, f"must have {least} to {most:,} entries")
        return tuple(check(each, f"{where}[{i}]") for i, each in enumerate(value))

    return check_list


def an_object(value: Any, where: str) -> dict:
    if not isinstance(value, dict):
        raise bad(where, "must be an object")
    return value


def parse(kind: type[T], body: Any, where: str = "") -> T:
    """Parse an object of a request into the dataclass `kind`; null means absent.

    Raises:
        RequestError: if a field is unknown, missing, or not as its check wants it.
    """
    if not isinstance(body, dict):
        raise bad(where or "body", "must be an object")
    known = {each.name: each for each in dataclasses.fields(kind)}
    values = {}
    for name, value in body.items():
        path = f"{where}.{name}" if where else name
        if name not in known:
            raise bad(path[:200], "is not a field that this server knows", "unknown_field")
        if value is not None:
            values[name] = known[name].metadata["check"](value, path)
    for name, each in known.items():
        if name not in values and each.default is dataclasses.MISSING:
            raise bad(f"{where}.{name}" if where else name, "is missing", "missing_field")
    return kind(**values)


def required(check: Check) -> Any:
    return field(metadata={"check": check})


def optional(check: Check, default: Any = None) -> Any:
    return field(default=default, metadata={"check": check})

"""Queries of a picture search: a text, an image, or sums and differences of both."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..files import find_path
from ..formats import EXTENSIONS

GRAMMAR = """A query is a text, the path of an image, or a sum:

  '"dog" + ./pool.jpg - "fruit"'   two texts and an image, quoted for the shell
  '2:dog + 0.5:./pool.jpg'         with weights

Terms are joined by + or - between spaces. Each is a text in double quotes, the
path of an existing image, or either of them, also a text without quotes, after
WEIGHT and a colon. Anything else is a plain text: black-and-white,
salt + pepper, 16:9 photo."""

_OPERATOR = re.compile(r"\s+([+-])\s+")
_QUOTED = re.compile(r'["“”]([^"“”]+)["“”]')
_LOOSE_END = re.compile(r"[+-]\s|.*\s[+-]$", re.DOTALL)
_WEIGHT = re.compile(r"(\d+(?:\.\d+)?):(?=\S)")


class QueryError(ValueError):
    """Raised for a query that cannot be understood, or one that cancels out."""


@dataclass(frozen=True)
class Term:
    """Text or image of a query."""

    text: str | None
    image: Path | str | None = None
    weight: float = 1.0


def find_image(text: str) -> Path | None:
    """Return the path of an existing image, or None for any other text."""
    try:
        path = find_path(Path(text).expanduser())
        return path if path.suffix.lower() in EXTENSIONS and path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null character, an unknown user
        return None


def parse_query(query: str, find: Callable[[str], Path | None] = find_image) -> list[Term]:
    """Parse a query by `GRAMMAR`.

    Args:
        query: the query.
        find: returns the image that a text names, if any.

    Raises:
        QueryError: if some terms of a sum are marked as terms, but another is not or is missing.
    """
    query = query.strip()
    if _LOOSE_END.match(query) and _QUOTED.search(query):
        raise QueryError(f"{query}: a sum neither begins nor ends with + or -")
    terms, bare, plain, rest, sign = [], [], 0, query, 1.0
    while True:
        weighted = bool(_WEIGHT.match(rest))
        term, marked, rest = _first_term(rest, find)
        terms.append(Term(term.text, term.image, sign * term.weight))
        plain += not marked
        if not marked and not weighted:
            bare.append(term.text)
        if not rest:
            break
        operator = _OPERATOR.match(rest)
        sign, rest = (1.0 if operator[1] == "+" else -1.0), rest[operator.end() :]
    if len(terms) == 1:
        return [Term(query) if plain else Term(terms[0].text, terms[0].image)]
    if len(bare) == len(terms):
        return [Term(query)]
    if bare:
        kind = "no such image" if "/" in bare[0] or Path(bare[0]).suffix.lower() in EXTENSIONS else "a text"
        raise QueryError(f'{bare[0]}: is {kind}; in a sum, put a text in double quotes: "{bare[0]}"')
    return terms


def terms_of(text: str | None, image: str | None) -> list[Term]:
    """Return the terms of a query, or of a search by an image.

    Raises:
        QueryError: see `parse_query`.
    """
    return parse_query(text) if image is None else [Term(None, image)]


def _first_term(rest: str, find: Callable[[str], Path | None]) -> tuple[Term, bool, str]:
    """Return the first term of a sum, whether it is quoted or an image, and the rest, which begins with an operator."""
    weight, start = 1.0, 0
    if match := _WEIGHT.match(rest):
        weight, start = float(match[1]), match.end()
    if (match := _QUOTED.match(rest, start)) and (match.end() == len(rest) or _OPERATOR.match(rest, match.end())):
        return Term(match[1], None, weight), True, rest[match.end() :]
    ends = [*(match.start() for match in _OPERATOR.finditer(rest, start)), len(rest)]
    for end in reversed(ends):  # a file name may contain " - "
        if (image := find(rest[start:end])) is not None:
            return Term(None, image, weight), True, rest[end:]
    return Term(rest[start : ends[0]], None, weight), False, rest[ends[0] :]


@dataclass(frozen=True)
class Filters:
    """Restrictions of a search to some files."""

    after: datetime | None = None  # taken at this time or later, in local time
    before: datetime | None = None  # taken earlier
    folder: str | None = None  # in this resolved folder or its subfolders

    def __bool__(self) -> bool:
        return self != ALL

    def sql(self) -> tuple[str, list]:
        """Return a condition on the table `files`, and its parameters.

        A photo's date is that of its EXIF, in local time, or else the file's.
        """
        conditions, parameters = ["sha256 != X''"], []
        for bound, sign in ((self.after, ">="), (self.before, "<")):
            if bound is not None:
                conditions.append(f"CASE WHEN taken IS NULL THEN mtime_ns {sign} ? ELSE taken {sign} ? END")
                parameters += [int(bound.timestamp() * 1e9), bound.replace(tzinfo=UTC).timestamp()]
        if self.folder is not None:
            prefix = self.folder.rstrip("/").encode("utf-8", "surrogatepass")
            conditions.append("path >= ? AND path < ?")
            parameters += [prefix + b"/", prefix + b"0"]  # 0 follows / in ASCII
        return " AND ".join(conditions), parameters


ALL = Filters()


def parse_date(text: str) -> datetime:
    """Parse 2024, 2024-05, 2024-05-17 or a time like 2024-05-17T18:30 to the beginning of that period.

    Raises:
        ValueError: if it is no date.
    """
    if match := re.fullmatch(r"(\d{4})(?:-(\d{1,2}))?(?:-(\d{1,2}))?", text):
        date = datetime(*(int(part or 1) for part in match.groups()))
    else:
        date = datetime.fromisoformat(text)
    if not 1902 <= date.year <= 2200:  # beyond what every system's clock can express
        raise ValueError(f"{text} is too far from now")
    return date.replace(tzinfo=None)

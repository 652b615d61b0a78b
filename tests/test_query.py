"""The grammar of queries: what is a plain text, and what a sum of texts and images."""

import shutil
from pathlib import Path

import pytest

from llama3v_mlx.demo import IMAGES
from llama3v_mlx.features.grammar import QueryError, Term, parse_query


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with pool.jpg and IMG 1 - Copy.jpg."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("pool.jpg", "IMG 1 - Copy.jpg", "a:b.jpg"):
        shutil.copy(IMAGES / "two-red-stars.jpg", name)
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "a red bicycle",
        "black-and-white",
        "salt + pepper",
        "2 - 1",
        "16:9 photo",
        "2:dog",
        "C++",
        "- x",
        "pool",
        "nowhere.jpg",
    ]
    + ['a "quoted" word', "“", "x" * 5000, "1:", "~nobody/x.jpg", "a\0b.jpg", "+ + +", "dog +"],
)
def test_plain_texts(here: Path, text: str) -> None:
    assert parse_query(text) == [Term(text)]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ('"dog" + ./pool.jpg - "fruit"', [("dog", None, 1), (None, "pool.jpg", 1), ("fruit", None, -1)]),
        ("2:dog + 0.5:pool.jpg", [("dog", None, 2), (None, "pool.jpg", 0.5)]),
        ('3:"a - b" - 2:"c + d"', [("a - b", None, 3), ("c + d", None, -2)]),
        ("1:red stars + 2:blue circles", [("red stars", None, 1), ("blue circles", None, 2)]),
        ("“smart quotes” - pool.jpg", [("smart quotes", None, 1), (None, "pool.jpg", -1)]),
        ('IMG 1 - Copy.jpg - "x"', [(None, "IMG 1 - Copy.jpg", 1), ("x", None, -1)]),
        ("pool.jpg", [(None, "pool.jpg", 1)]),
        ("~/pool.jpg", [(None, "~/pool.jpg", 1)]),
        ('"16:9 photo"', [("16:9 photo", None, 1)]),
        ('7:"dog"', [("dog", None, 1)]),
    ],
)
def test_sums(here: Path, text: str, terms: list) -> None:
    expected = [Term(word, Path(path).expanduser() if path else None, weight) for word, path, weight in terms]
    assert parse_query(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"dog" + cat', 'cat: is a text; in a sum, put a text in double quotes: "cat"'),
        ('"dog" + ./pol.jpg', "./pol.jpg: is no such image"),
        ("2:dog - pool.png", "pool.png: is no such image"),
        ('"dog" +', "neither begins nor ends with + or -"),
        ('- "dog"', "neither begins nor ends with + or -"),
    ],
)
def test_sums_that_are_not_clear(here: Path, text: str, message: str) -> None:
    with pytest.raises(QueryError, match=message.replace("+", r"\+")):
        parse_query(text)

"""Drafters that need no network: n-grams of the conversation, and tokens that a JSON schema forces."""

from collections.abc import Sequence
from typing import Protocol

from .budget import Budget

PAIR = 2  # tokens that must have occurred before for a draft to be likely
MATCH = 3  # tokens that must have occurred before for a draft
CANDIDATES, LONGEST = 8, 16  # earlier places looked at, and tokens compared at each


class Drafter(Protocol):
    """Source of drafts for one answer."""

    budget: Budget
    waits: bool  # True: it may draft after any token, but needs to know it

    def begin(self) -> None:
        """Begin another answer."""

    def see(self, tokens: Sequence[int]) -> None:
        """Append tokens of the conversation: everything before the answer, then the answer's, as they are known."""

    def is_likely(self) -> bool:
        """Return True if there will probably be a draft once the next token is known."""

    def draft(self, most: int) -> list[int]:
        """Draft up to `most` tokens that may follow the last one seen."""


class NGrams:
    """Draft what followed the last few tokens where they occurred before (prompt lookup).

    Args:
        placeholder: id of an image's tokens, which match nothing.
    """

    waits = False

    def __init__(self, placeholder: int):
        self._placeholder = placeholder
        self.begin()

    def begin(self) -> None:
        self.budget = Budget()
        self._tokens: list[int] = []
        self._last: dict[tuple[int, int], int] = {}  # pair → number of tokens up to its last occurrence
        self._earlier: list[int] = [0]  # the same of the pair's occurrence before; 0: none

    def see(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._tokens.append(token)
            pair = tuple(self._tokens[-PAIR:])
            if len(pair) < PAIR or self._placeholder in pair:
                self._earlier.append(0)
            else:
                self._earlier.append(self._last.get(pair, 0))
                self._last[pair] = len(self._tokens)

    def is_likely(self) -> bool:
        return self._earlier[-1] > 0

    def draft(self, most: int) -> list[int]:
        start, length = self._longest()
        tokens = list(self._tokens[start : start + most]) if length >= MATCH else []
        if self._placeholder in tokens:
            tokens = tokens[: tokens.index(self._placeholder)]
        elif tokens:
            # A continuation that reaches the end of what is known repeats.
            period = len(tokens)
            tokens += [tokens[i % period] for i in range(period, most)]
        return tokens

    def _longest(self) -> tuple[int, int]:
        """Find the longest match of the last tokens, the latest of equal ones: its end, and its length."""
        tokens, best, place = self._tokens, (0, 0), self._earlier[-1]
        for _ in range(CANDIDATES):
            if place == 0:
                break
            length = PAIR
            while length < min(LONGEST, place) and tokens[place - length - 1] == tokens[-length - 1]:
                if tokens[-length - 1] == self._placeholder:
                    break
                length += 1
            if length > best[1]:
                best = place, length
            place = self._earlier[place]
        return best


class Forced:
    """Draft the tokens that a JSON schema forces: llguidance's fast-forward tokens.

    They are drafts like others, since a schema also allows other tokens that spell the same text.

    Args:
        matcher: llguidance's, at the beginning of an answer.
        num_prompt_tokens: tokens that are seen before the answer.
    """

    waits = True

    def __init__(self, matcher, num_prompt_tokens: int):
        self._matcher, self._prompt = matcher, num_prompt_tokens
        self.begin()

    def begin(self) -> None:
        self.budget = Budget()
        self._state, self._left = self._matcher.deep_copy(), self._prompt

    def see(self, tokens: Sequence[int]) -> None:
        skipped = min(self._left, len(tokens))
        self._left -= skipped
        if len(tokens) > skipped:
            self._state.consume_tokens(list(tokens[skipped:]))

    def is_likely(self) -> bool:
        return True

    def draft(self, most: int) -> list[int]:
        return [] if self._state.is_stopped() else self._state.compute_ff_tokens()[:most]

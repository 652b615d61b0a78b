"""Jobs for the worker that owns the model, and the events that it sends back."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..tiling import TiledImage
from .batch import Settings
from .checks import RequestError
from .prompts import Block, RequestPrompt


@dataclass(frozen=True)
class Logprob:
    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """A token of an answer, and the text completed by it."""

    choice: int
    text: str
    finish_reason: str | None = None  # "stop" or "length" with the last one
    logprob: Logprob | None = None
    top_logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class NeedImages:
    """Images that the prefix cache lacks: put their tiles into the job and submit it again."""

    indices: Sequence[int]


Event = Token | NeedImages | RequestError


@dataclass(eq=False)
class Job:
    """A prompt and its progress. The worker puts events; other threads set `tiles` and `cancelled`."""

    prompt: RequestPrompt
    settings: Settings
    events: "queue.SimpleQueue[Event]" = field(default_factory=queue.SimpleQueue)
    tiles: dict[int, TiledImage] = field(default_factory=dict)
    cancelled: bool = False
    progress: str = "waiting for a place"  # for people
    cached: int = 0  # tokens that the prefix cache had
    # Of the worker:
    blocks: list[Block] = field(default_factory=list)
    caches: list | None = None


class StopText:
    """Find stop strings in streamed text, holding back text that may begin one."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""

    def feed(self, text: str, last: bool) -> tuple[str, bool]:
        """Add text; return the text that can be sent, and whether a stop string was found."""
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            return self._held[: min(found)], True
        end = len(self._held)
        if not last:
            most = max(map(len, self._stops), default=0)
            starts = range(max(0, end - most + 1), end)
            end = next((i for i in starts if any(s.startswith(self._held[i:]) for s in self._stops)), end)
        certain, self._held = self._held[:end], self._held[end:]
        return certain, False

"""Instruction data in LLaVA's format: rows found in a file, checked, encoded, and grouped into batches by length.

A row is `{"id": …, "image": "a.jpg" or a list, "conversations": [{"from": "human", "value": "<image>\\nWhat…"},
{"from": "gpt", "value": …}, …]}`, in a JSON list or one to a line. A file is never in memory whole.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..features.store import FeatureStore
from ..image import ImageError, TiledImage
from ..prompt import Processor

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
MARK = "<image>"
POOL = 50  # batches whose rows are sorted by length together


class DataError(ValueError):
    """A row that cannot be used, or a file without any."""


@dataclass(frozen=True)
class Dialogue:
    """A row, encoded: its ids with all blocks written out."""

    ids: np.ndarray  # int32 (L,)
    answers: np.ndarray  # bool (L,): what is learnt
    images: tuple[bytes, ...]  # SHA-256 of the image files, in the order of their visual tokens


class StoredTiler:
    """A processor's tiler by which image paths are found in a feature store, and the images are not read.

    Args:
        store: of features.
        known: the SHA-256 of each path's file.
        unusable: why, for the others.
    """

    def __init__(self, store: FeatureStore, known: dict[str, bytes], unusable: dict[str, str]):
        self._store, self._known, self._unusable = store, known, unusable

    def __call__(self, path: str) -> TiledImage:
        if path not in self._known:
            raise DataError(f"{path}: {self._unusable[path]}")
        return TiledImage((), self._store.grid(self._known[path]), self._known[path])


class Dialogues:
    """The rows of a file that can be used.

    Args:
        path: a .json or .jsonl file.
        image_folder: what the rows' image paths start from.
        strict: raise at the first row that cannot be used; else it is put into `rejected` and left out.

    Raises:
        DataError: if the file is not there, is no list of rows, or has no usable one.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None, strict: bool = False):
        self.path, self.folder, self.strict = Path(path), Path(image_folder or ""), strict
        self.rejected: list[str] = []
        if not self.path.is_file() or not self.path.stat().st_size:
            raise DataError(f"{path}: no such file, or an empty one")
        with self.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        lines = self.path.suffix == ".jsonl"
        self.image_paths: set[str] = set()
        kept = []
        for number, (start, end) in enumerate(_rows_of_lines(self._data) if lines else self._rows_of_list(), 1):
            messages = self._try(number, self._parse, start, end)
            if messages is not None:
                kept.append((number, start, end))
                self.image_paths.update(_images(messages))
        self._rows = np.array(kept, np.int64).reshape(-1, 3)
        self.lengths, self.digests = np.zeros(0, np.int32), np.zeros(0, np.uint64)
        self._check_some()

    def __len__(self) -> int:
        return len(self._rows)

    def digest(self) -> str:
        """SHA-256 of the file, in hex."""
        return hashlib.sha256(self._data).hexdigest()

    def examples_digest(self) -> str:
        """SHA-256, in hex, of the rows that can be used, as `measure` has encoded them: tokens and images."""
        return hashlib.sha256(self.numbers.tobytes() + self.digests.tobytes()).hexdigest()

    @property
    def numbers(self) -> np.ndarray:
        """The numbers of the rows in the file, from 1 on."""
        return self._rows[:, 0]

    def measure(self, processor: Processor, max_seq_length: int) -> None:
        """Encode every row once for its length and digest; reject those too long, or that show an unusable image.

        Args:
            processor: its tiler is a `StoredTiler`.
            max_seq_length: in tokens; a longer row is left out, never cut.

        Raises:
            DataError: if no row is left.
        """

        def measure_row(i: int) -> tuple[int, int]:
            row = self.encode(i, processor)
            if len(row.ids) > max_seq_length:
                raise DataError(f"{len(row.ids)} tokens are more than --max-seq-length {max_seq_length}")
            digest = hashlib.sha256(b"".join((row.ids.tobytes(), row.answers.tobytes(), *row.images)))
            return len(row.ids), int.from_bytes(digest.digest()[:8], "little")

        found = [self._try(number, measure_row, i) or (0, 0) for i, number in enumerate(self.numbers.tolist())]
        self.lengths = np.array([length for length, _ in found], np.int32)
        self.digests = np.array([digest for _, digest in found], np.uint64)
        used = self.lengths > 0
        self._rows, self.lengths, self.digests = self._rows[used], self.lengths[used], self.digests[used]
        self._check_some()

    def encode(self, i: int, processor: Processor) -> Dialogue:
        """Row i, its images found by the processor's tiler."""
        _, start, end = self._rows[i].tolist()
        prompt, answers = processor.encode_answered(self._parse(start, end))
        grids = [image.grid for image in prompt.images]
        ids = processor.prompt_tokens.expand(np.array(prompt.ids, np.int32), grids, processor.num_queries)
        return Dialogue(ids, np.array(answers), tuple(image.sha256 for image in prompt.images))

    def batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """The rows of each batch of an epoch: all of one size, rows of like length together, in random order.

        What does not fill a batch is left out, other rows in every epoch.
        """
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self))[: len(self) // size * size]
        pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        return list(rng.permutation(order.reshape(-1, size)))

    def _parse(self, start: int, end: int) -> list[dict]:
        """A row as messages, image parts with their paths."""
        try:
            row = json.loads(self._data[start:end])
        except ValueError as e:
            raise DataError(f"not JSON: {e}") from e
        return messages_of(row, lambda path: str(self.folder / path))

    def _rows_of_list(self) -> Iterator[tuple[int, int]]:
        """Where the objects of a JSON list are, by its strings and brackets alone."""
        depth, start = 0, 0
        for token in re.finditer(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', self._data):
            if token[0] in (b"[", b"{"):
                start = token.start() if depth == 1 else start
                depth += 1
            elif token[0] in (b"]", b"}"):
                depth -= 1
                if depth == 1:
                    yield start, token.end()
        if depth:
            raise DataError(f"{self.path}: is cut short: a bracket is never closed")

    def _try(self, number: int, function: Callable, *args):
        """What `function` returns; None if the row is rejected."""
        try:
            return function(*args)
        except (DataError, ImageError) as e:
            reason = f"{self.path}, row {number}: {e}"
            if self.strict:
                raise DataError(reason) from e
            self.rejected.append(reason)
            return None

    def _check_some(self) -> None:
        if not len(self._rows):
            first = f"; the first: {self.rejected[0]}" if self.rejected else ""
            raise DataError(f"{self.path}: has no row that can be used{first}")


def messages_of(row: object, locate: Callable[[str], str]) -> list[dict]:
    """A row as messages of the chat format: its marks replaced by its images, each path as `locate` gives it.

    Raises:
        DataError: if the row is not in the format, or its answers are empty.
    """
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list) or not row["conversations"]:
        raise DataError("has no list of conversations")
    paths = row.get("image") or []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise DataError("image must be a path or a list of paths")
    turns = row["conversations"]
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError('a turn is not {"from": …, "value": text}')
        if turn.get("from") not in ROLES:
            raise DataError(f"unknown role {turn.get('from')!r}; it must be one of {', '.join(ROLES)}")
        if turn["from"] == "gpt" and not turn["value"].strip():
            raise DataError("has an empty answer")
    first = turns[0]["from"] == "system"
    rest = [turn["from"] for turn in turns[first:]]
    if not rest or rest != ["human", "gpt"] * (len(rest) // 2):
        raise DataError("its turns are not human and gpt in alternation")
    marks = sum(turn["value"].count(MARK) for turn in turns if turn["from"] == "human")
    if marks != len(paths) and (marks or not paths):
        raise DataError(f"{marks} {MARK} marks, but {len(paths)} images")
    waiting = map(locate, paths)
    messages = []
    for turn in turns:
        content: str | list = turn["value"]
        if turn["from"] == "human":
            texts = content.split(MARK)
            content = [] if marks else [_image(path) for path in waiting]
            for i, text in enumerate(texts):
                content += [_image(next(waiting))] if i else []
                content += [text.strip()] if text.strip() else []
        messages.append({"role": ROLES[turn["from"]], "content": content})
    return messages


def _image(path: str) -> dict:
    return {"type": "image", "image": path}


def _images(messages: Sequence[dict]) -> list[str]:
    parts = (part for message in messages if isinstance(message["content"], list) for part in message["content"])
    return [part["image"] for part in parts if isinstance(part, dict)]


def _rows_of_lines(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            yield start, end
        start = end + 1

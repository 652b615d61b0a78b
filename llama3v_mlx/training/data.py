"""Instruction data in LLaVA's format: rows are parsed, checked, tokenized, and grouped into batches by length.

A row is `{"id": …, "image": "a.jpg" or a list, "conversations": [{"from": "human", "value": "<image>\\nWhat…"},
{"from": "gpt", "value": …}, …]}`, in a JSON list or one per line. Files are memory-mapped.
"""

import hashlib
import json
import mmap
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..features.store import FeatureStore
from ..image import ImageError
from ..prompt import Processor
from ..tiling import TiledImage

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
MARK = "<image>"
POOL = 50  # batches among whose rows those of similar length are batched


class DataError(ValueError):
    """Raised for an unusable row, or a file without usable rows."""


@dataclass(frozen=True)
class Dialogue:
    """An encoded row, the blocks of its images written out."""

    ids: np.ndarray  # int32 (L,)
    answers: np.ndarray  # bool (L,): tokens in the loss
    images: tuple[bytes, ...]  # SHA-256 of the image files, in the order of their visual tokens


class StoredTiler:
    """Find images by their paths in a feature store, instead of reading and tiling them.

    Args:
        store: features.
        known: SHA-256 of the file at each path.
        unusable: reasons for the other paths.
    """

    def __init__(self, store: FeatureStore, known: dict[str, bytes], unusable: dict[str, str]):
        self._store, self._known, self._unusable = store, known, unusable

    def __call__(self, path: str) -> TiledImage:
        if path not in self._known:
            raise DataError(f"{path}: {self._unusable[path]}")
        return TiledImage((), self._store.grid(self._known[path]), self._known[path])


class Dialogues:
    """The usable rows of a file, parsed and tokenized once.

    Tokens are kept with one placeholder per image, so a row takes 5 bytes per token of text. `find_images` must be
    called before rows are read.

    Args:
        path: a .json or .jsonl file.
        image_folder: folder that the rows' image paths start from.
        processor: tokenizes; images are not read.
        strict: raise at the first unusable row; otherwise it is added to `rejected` and skipped.

    Raises:
        DataError: if the file is missing, is not a list of rows, or has no usable row.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None, processor: Processor, strict: bool = False):
        self.path, self.folder, self.strict = Path(path), Path(image_folder or ""), strict
        self._prompt_tokens, self.num_queries = processor.prompt_tokens, processor.num_queries
        self.rejected: list[str] = []
        if not self.path.is_file() or not self.path.stat().st_size:
            raise DataError(f"{path}: no such file, or an empty one")
        with self.path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        rows = _rows_of_lines(self._data) if self.path.suffix == ".jsonl" else self._rows_of_list()
        ids, answers, ends, numbers = array("i"), bytearray(), [0], []
        self._paths: list[tuple[str, ...]] = []
        for number, (start, end) in enumerate(rows, 1):
            row = self._try(number, self._tokenize, start, end, processor)
            if row is not None:
                ids.extend(row[0])
                answers.extend(row[1])
                ends.append(len(ids))
                numbers.append(number)
                self._paths.append(row[2])
        self._ids, self._answers = np.array(ids, np.int32), np.array(answers, bool)
        self._ends, self.numbers = np.array(ends, np.int64), np.array(numbers, np.int64)
        self._kept = np.arange(len(numbers))  # indices into `_ends`, `_paths` and `_images` of the usable rows
        self._images: list[tuple[TiledImage, ...]] = []
        self.lengths, self.digests = np.zeros(0, np.int32), np.zeros(0, np.uint64)
        self._check_some()

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, i: int) -> Dialogue:
        """Row i, encoded."""
        return self._encode(self._kept[i], self._images[self._kept[i]])

    @property
    def image_token(self) -> int:
        return self._prompt_tokens.image

    @property
    def image_paths(self) -> set[str]:
        """Paths of all rows' images."""
        return {path for paths in self._paths for path in paths}

    def digest(self) -> str:
        """SHA-256 of the file, in hex."""
        return hashlib.sha256(self._data).hexdigest()

    def examples_digest(self) -> str:
        """SHA-256, in hex, of the usable rows' numbers, tokens and images."""
        return hashlib.sha256(self.numbers.tobytes() + self.digests.tobytes()).hexdigest()

    def find_images(self, tiler: Callable[[str], TiledImage], max_seq_length: int) -> None:
        """Look up all rows' images; reject rows that are too long or have an unusable image.

        Args:
            tiler: returns the grid and the SHA-256 of the image at a path.
            max_seq_length: in tokens; longer rows are skipped, never truncated.

        Raises:
            DataError: if no row is left.
        """

        def look_up(i: int) -> tuple[tuple[TiledImage, ...], int, int]:
            images = tuple(map(tiler, self._paths[i]))
            row = self._encode(i, images)
            if len(row.ids) > max_seq_length:
                raise DataError(f"{len(row.ids)} tokens are more than --max-seq-length {max_seq_length}")
            digest = hashlib.sha256(b"".join((row.ids.tobytes(), row.answers.tobytes(), *row.images)))
            return images, len(row.ids), int.from_bytes(digest.digest()[:8], "little")

        found = [self._try(number, look_up, i) or ((), 0, 0) for i, number in enumerate(self.numbers.tolist())]
        self._images = [images for images, _, _ in found]
        self.lengths = np.array([length for _, length, _ in found], np.int32)
        self.digests = np.array([digest for _, _, digest in found], np.uint64)
        self._kept = np.flatnonzero(self.lengths)
        self.numbers, self.lengths, self.digests = (
            values[self._kept] for values in (self.numbers, self.lengths, self.digests)
        )
        self._check_some()

    def _encode(self, i: int, images: Sequence[TiledImage]) -> Dialogue:
        """Write out the image blocks of row i of those tokenized."""
        span = slice(self._ends[i], self._ends[i + 1])
        ids, answers = self._ids[span], self._answers[span]
        grids = [image.grid for image in images]
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == self.image_token] = [len(self._prompt_tokens.block(grid, self.num_queries)) for grid in grids]
        ids = self._prompt_tokens.expand(np.repeat(ids, repeats), grids, self.num_queries)
        return Dialogue(ids, np.repeat(answers, repeats), tuple(image.sha256 for image in images))

    def _tokenize(self, start: int, end: int, processor: Processor) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """Ids of a row with one placeholder per image, the mask of its answers, and its images' paths."""
        try:
            row = json.loads(self._data[start:end])
        except (ValueError, RecursionError) as e:
            raise DataError(f"not JSON: {e}") from e
        paths = []

        def tile(path: str) -> TiledImage:
            paths.append(path)
            return TiledImage((), None)

        messages = messages_of(row, lambda path: str(self.folder / path))
        prompt, answers = replace(processor, tiler=tile).encode_answered(messages)
        ids = np.array(prompt.ids, np.int32)
        is_image = ids == self.image_token
        first = ~(is_image & np.r_[False, is_image[:-1]])  # of each run of placeholders
        return ids[first], np.array(answers)[first], tuple(paths)

    def batches(self, size: int, seed: int, epoch: int) -> list[np.ndarray]:
        """Rows of each batch of an epoch: full batches of rows of similar length, in random order.

        Rows that do not fill a batch are left out, different ones in every epoch.
        """
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(self))[: len(self) // size * size]
        pools = [order[i : i + POOL * size] for i in range(0, len(order), POOL * size)]
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        return list(rng.permutation(order.reshape(-1, size)))

    def _rows_of_list(self) -> Iterator[tuple[int, int]]:
        """Byte ranges of the objects in a JSON list, found by strings and brackets only."""
        depth, start = 0, 0
        for token in re.finditer(rb'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', self._data):
            if token[0] in (b"[", b"{"):
                start = token.start() if depth == 1 else start
                depth += 1
            elif token[0] in (b"]", b"}"):
                depth -= 1
                if depth == 1:
                    yield start, token.end()
        if depth:
            raise DataError(f"{self.path}: is cut short: unclosed bracket")

    def _try(self, number: int, function: Callable, *args):
        """Call `function`; return None and note the reason if it rejects the row."""
        try:
            return function(*args)
        except (DataError, ImageError) as e:
            reason = f"{self.path}, row {number}: {e}"
            if self.strict:
                raise DataError(reason) from e
            self.rejected.append(reason)
            return None

    def _check_some(self) -> None:
        if not len(self):
            first = f"; the first: {self.rejected[0]}" if self.rejected else ""
            raise DataError(f"{self.path}: has no usable row{first}")


def messages_of(row: object, locate: Callable[[str], str]) -> list[dict]:
    """Convert a row to chat messages, its marks replaced by its images, whose paths are mapped by `locate`.

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
        try:
            turn["value"].encode()
        except UnicodeEncodeError:
            raise DataError(f"{turn['value'][:40]!r} is no text: it has a lone surrogate") from None
        if turn.get("from") not in tuple(ROLES):
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


def _rows_of_lines(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            yield start, end
        start = end + 1

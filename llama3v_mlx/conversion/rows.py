"""Prompts with images and answers, from a file, to calibrate and verify a conversion with; and their embeddings.

A row is one of training (see `training.data`), or `{"image": "a.jpg" or a list, "prompt": "What…"}` without an answer.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..generation import check_length
from ..models.llama3v import Model
from ..prompt import Processor
from ..tiling import TiledImage
from ..tokenizer import load_tokenizer
from ..training.data import DataError, messages_of
from .verify import Weights

HELD_OUT = 32  # rows to verify with, unless told
MAX_TOKENS = 65_536  # to calibrate with: 2 GB of hidden states of an 8B


@dataclass(frozen=True)
class Row:
    """An encoded prompt, with or without answers."""

    ids: np.ndarray  # (L,); each image is one run of placeholders
    images: list[TiledImage]
    positions: np.ndarray  # positions that an answer's token is predicted from; the last one if there is no answer


def read_sets(
    folder: Path,
    config: dict,
    verify: bool,
    calibrate: str | Path | None,
    image_folder: str | Path | None,
    verify_data: str | Path | None,
    verify_prompts: int | None,
) -> tuple[list[Row], list[Row]]:
    """Read rows to calibrate with and rows to verify with, none of them in both.

    Args:
        folder, config: the source checkpoint, and its config in our layout.
        verify: read rows to verify with.
        calibrate: .json or .jsonl file whose first rows are to be calibrated with, up to MAX_TOKENS; or None.
        image_folder: folder that image paths start from (default: the file's).
        verify_data: file whose last rows are to be verified with (default: `calibrate`).
        verify_prompts: number of rows to verify with (default: up to HELD_OUT, and a quarter of `calibrate`).

    Raises:
        DataError: if a file is missing or has too few rows, or at the first row that cannot be used.
    """
    if not calibrate and not (verify and verify_data):
        return [], []
    processor = Processor.from_config(config, load_tokenizer(folder, config))
    rows = _split(calibrate) if calibrate else []
    held_out = []
    if verify:
        held_out = _split(verify_data) if verify_data else rows
        count = verify_prompts or min(HELD_OUT, len(held_out) if verify_data else max(1, len(rows) // 4))
        rows = rows if verify_data else rows[:-count]
        if len(held_out) < count or (calibrate and not rows):
            few = f"{verify_data or calibrate}: its {len(held_out)} rows are too few to verify with {count} of them"
            raise DataError(f"{few}; give fewer --verify-prompts, or another --verify-data")
        held_out = held_out[-count:]
    sets = []
    for path, lines, most in ((calibrate, rows, MAX_TOKENS), (verify_data or calibrate, held_out, math.inf)):
        sets.append([])
        for number, text in lines:
            try:
                row = _encode(json.loads(text), _folder(path, image_folder), processor)
                check_length(len(row.ids), config["text_config"]["max_position_embeddings"])
            except (ValueError, OSError, RecursionError) as e:
                raise DataError(f"{path}, row {number}: {e}") from e
            most -= len(row.ids)
            if most < 0 and sets[-1]:
                break
            sets[-1].append(row)
    return sets[0], sets[1]


def _folder(path: str | Path, image_folder: str | Path | None) -> Path:
    return Path(image_folder or Path(path).parent).expanduser()


def _split(path: str | Path) -> list[tuple[int, str]]:
    """Split a file into rows, which are numbered from 1 and not parsed yet."""
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
        # Not splitlines(), which also splits at characters that JSON allows in strings.
        lines = text.split("\n") if path.suffix == ".jsonl" else [json.dumps(row) for row in json.loads(text)]
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from e
    except (ValueError, TypeError, RecursionError) as e:
        raise DataError(f"{path}: is not a JSON list in UTF-8: {e}") from e
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: has no rows")
    return rows


def _encode(row: object, folder: Path, processor: Processor) -> Row:
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and "conversations" not in row:
        paths = row.get("image") or []
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise DataError("image must be a path or a list of paths")
        prompt = processor.encode(row["prompt"], [str(folder / path) for path in paths])
        return Row(np.array(prompt.ids), prompt.images, np.array([len(prompt.ids) - 1]))
    prompt, answers = processor.encode_answered(messages_of(row, lambda path: str(folder / path)))
    return Row(np.array(prompt.ids), prompt.images, np.flatnonzero(answers[1:]))


def embed_rows(
    weights: Weights, model: Model, rows: Sequence[Row], tables: Sequence[Callable[[mx.array], mx.array]]
) -> list[list[mx.array]]:
    """Embed rows with their images in float32, as (1, L, hidden_size) arrays, once for each embedding table.

    Args:
        weights: of the checkpoint; those of tower and projector are taken.
        model: from `build_model`, without weights; its tower and projector are loaded.
        rows: encoded prompts.
        tables: each maps ids to rows of an embedding table.
    """
    weights.fill(model.vision_tower, "vision_tower")
    weights.fill(model.projector, "projector")
    embedded: list[list[mx.array]] = [[] for _ in tables]
    for row in rows:
        visual, grids = model.encode_image(row.images), [image.grid for image in row.images]
        for table, xs in zip(tables, embedded, strict=True):
            model.language_model.model.embed_tokens = table
            xs.append(model.splice(mx.array(row.ids), grids, visual)[None])
            mx.eval(xs[-1])
    return embedded

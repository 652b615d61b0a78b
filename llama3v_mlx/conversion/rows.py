"""Prompts with images and answers, from a file, to calibrate and verify a conversion with; and their embeddings.

A row is one of training (see `training.data`), or `{"image": "a.jpg" or a list, "prompt": "What…"}` without an answer.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoint import load_tokenizer
from ..image import ImageError, TiledImage
from ..models.llama3v import Model
from ..prompt import Processor
from ..training.data import DataError, messages_of
from .verify import Weights

HELD_OUT = 32  # rows to verify with, unless told


@dataclass(frozen=True)
class Row:
    """An encoded prompt, with or without answers."""

    ids: np.ndarray  # (L,); each image is one run of placeholders
    images: list[TiledImage]
    positions: np.ndarray  # positions that an answer's token is predicted from; the last one if there is no answer


def read_rows(path: str | Path, image_folder: str | Path | None, processor: Processor) -> list[Row]:
    """Read and encode all rows of a .json or .jsonl file.

    Args:
        path: the file.
        image_folder: folder that image paths start from (default: the file's).
        processor: of the checkpoint to be converted.

    Raises:
        DataError: if the file is missing or has no rows, or at the first row that cannot be used.
    """
    path = Path(path).expanduser()
    folder = path.parent if image_folder is None else Path(image_folder).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        is_lines = path.suffix == ".jsonl"
        # not splitlines(), which also splits at characters that JSON allows in strings
        lines = enumerate(text.split("\n"), 1) if is_lines else enumerate(map(json.dumps, json.loads(text)), 1)
        lines = [(number, line) for number, line in lines if line.strip()]
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from e
    except (ValueError, TypeError) as e:
        raise DataError(f"{path}: not JSON rows: {e}") from e
    if not lines:
        raise DataError(f"{path}: has no rows")
    rows = []
    for number, line in lines:
        try:
            rows.append(_encode(json.loads(line), folder, processor))
        except (ValueError, ImageError, OSError) as e:
            raise DataError(f"{path}, row {number}: {e}") from e
    return rows


def read_sets(
    folder: Path,
    config: dict,
    verify: bool,
    calibrate: str | Path | None,
    image_folder: str | Path | None,
    verify_data: str | Path | None,
    verify_prompts: int | None,
) -> tuple[list[Row], list[Row]]:
    """Rows to calibrate with and rows to verify with, none of them in both.

    Args:
        folder, config: the source checkpoint, and its config in our layout.
        verify: return rows to verify with.
        calibrate: file to calibrate with, or None.
        image_folder: see `read_rows`.
        verify_data: file whose last rows are to be verified with (default: `calibrate`).
        verify_prompts: number of rows to verify with (default: up to HELD_OUT, and a quarter of `calibrate`).

    Raises:
        DataError: if a file cannot be used, or has too few rows.
    """
    processor = Processor.from_config(config, load_tokenizer(folder, config["eos_token_id"]))
    rows = read_rows(calibrate, image_folder, processor) if calibrate else []
    if not verify or not (calibrate or verify_data):
        return rows, []
    if verify_data:
        held_out = read_rows(verify_data, image_folder, processor)
        count = verify_prompts or min(HELD_OUT, len(held_out))
    else:
        held_out, count = rows, verify_prompts or min(HELD_OUT, max(1, len(rows) // 4))
        rows = rows[:-count]
    if len(held_out) < count or (calibrate and not rows):
        few = f"{verify_data or calibrate}: its {len(held_out)} rows are too few to verify with {count} of them"
        raise DataError(f"{few}; give fewer --verify-prompts, or another --verify-data")
    return rows, held_out[-count:]


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

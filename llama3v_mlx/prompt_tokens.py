"""Special tokens of the released prompt format: those of Llama's headers, and those around an image's visual tokens."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
HEADER_START, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of an image's block; `TEXTS` has the tokens.

    Without the structural ids, an image is only its visual tokens, before the text, as in the original article.
    """

    image: int  # one visual token
    image_start: int | None = None
    image_end: int | None = None
    slice_start: int | None = None
    slice_end: int | None = None
    newline: int | None = None  # between rows of slices

    TEXTS: ClassVar[dict[str, str]] = {
        "image": "<unk>",
        "image_start": "<image>",
        "image_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "newline": "\n",
    }

    def block(self, grid: tuple[int, int] | None, num_queries: int) -> list[int]:
        """Return the ids of an image: the overview, then, given a (columns, rows) grid, the slices row by row."""
        tile = [self.image] * num_queries
        if self.image_start is not None:
            tile = [self.image_start, *tile, self.image_end]
        if grid is None:
            return tile
        columns, rows = grid
        ids = [*tile, self.slice_start]
        for row in range(rows):
            ids += ([self.newline] if row else []) + tile * columns
        return [*ids, self.slice_end]

    def expand(self, ids: np.ndarray, grids: Sequence[tuple[int, int] | None], num_queries: int) -> np.ndarray:
        """Replace each image's run of placeholders in a prompt's ids (L,) by its block.

        Raises:
            ValueError: if runs and images differ in number or length.
        """
        ids = np.array(ids)
        is_image = ids == self.image
        starts = np.flatnonzero(is_image & ~np.r_[False, is_image[:-1]])
        ends = np.flatnonzero(is_image & ~np.r_[is_image[1:], False]) + 1
        if len(starts) != len(grids):
            raise ValueError(f"the prompt has placeholders for {len(starts)} images, but {len(grids)} were given")
        for start, end, grid in zip(starts, ends, grids, strict=True):
            block = self.block(grid, num_queries)
            if end - start != len(block):
                raise ValueError(f"an image of {len(block)} tokens does not fit its run of {end - start} placeholders")
            ids[start:end] = block
        return ids


def chat_template(special_tokens: Iterable[str]) -> str:
    """Return the prompt format as a Jinja template, for mlx-lm's own tools: an image part becomes one placeholder.

    Special tokens in user text are split by a zero-width space, because those tools tokenize after templating.
    """
    specials = json.dumps([token for token in special_tokens if token.startswith("<")])
    return _TEMPLATE.replace("SPECIALS", specials)


_TEMPLATE = """\
{%- set specials = SPECIALS %}
{%- macro plain(text) %}
    {%- set ns = namespace(text=text) %}
    {%- for token in specials %}
        {%- set ns.text = ns.text.replace(token, '<\\u200b' + token[1:]) %}
    {%- endfor %}
    {{- ns.text }}
{%- endmacro %}
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {%- set ns = namespace(parts=[]) %}
    {%- if message['content'] is string %}
        {%- set ns.parts = [plain(message['content'])] %}
    {%- else %}
        {%- for part in message['content'] %}
            {%- set ns.parts = ns.parts + ([plain(part['text'])] if part['type'] == 'text' else ['<unk>']) %}
        {%- endfor %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- ns.parts | join('\\n') | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

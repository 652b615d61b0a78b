"""Chat messages and images to token ids, in the released prompt format, and mlx-lm's processor contract.

An image's whole block (`<image>…</image><slice>…</slice>`) is written as one run of its placeholder token; the model
lays the block's true rows in. Text that a user wrote never becomes a special token.
"""

from __future__ import annotations

import itertools
import json
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, ClassVar

import numpy as np

from .image import ImageConfig, ImageSource, TiledImage, Tiling, page_zoom, plan_tiles, tile_image
from .pdf import PdfPage
from .sampling import Sampling

BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
HEADER_START, HEADER_END = "<|start_header_id|>", "<|end_header_id|>"
ROLES = ("system", "user", "assistant")

# A message's content: text, or texts and images in order (OpenAI's and Hugging Face's parts, or bare).
Content = str | Sequence[Any]


@dataclass(frozen=True)
class PromptTokens:
    """The ids that an image's block is made of; `TEXTS` has the tokens.

    Without the marks, an image is its visual tokens and nothing else, in front of the text: the original article's way.
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
        """The ids of an image: the overview, then the slices row by row if there is a (columns, rows) grid."""
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
        """A prompt's ids (L,) with each image's run of placeholders written out as its block.

        Raises:
            ValueError: if the runs and the images differ in number or length.
        """
        ids = np.array(ids)
        is_image = ids == self.image
        starts = np.flatnonzero(is_image & ~np.r_[False, is_image[:-1]])
        ends = np.flatnonzero(is_image & ~np.r_[is_image[1:], False]) + 1
        if len(starts) != len(grids):
            raise ValueError(f"the prompt has places for {len(starts)} images, but {len(grids)} were given")
        for start, end, grid in zip(starts, ends, grids, strict=True):
            block = self.block(grid, num_queries)
            if end - start != len(block):
                raise ValueError(f"an image of {len(block)} tokens does not fit its place of {end - start} tokens")
            ids[start:end] = block
        return ids


@dataclass(frozen=True)
class Prompt:
    """What goes into the model."""

    ids: list[int]  # each image one run of placeholders
    images: list[TiledImage]  # in the order of their runs


@dataclass(frozen=True)
class Processor:
    """Turns conversations with images into prompts; `processor.tokenizer` is mlx-lm's wrapped tokenizer."""

    image_config: ImageConfig
    num_queries: int  # visual tokens per tile
    prompt_tokens: PromptTokens
    tokenizer: Any = None  # None where mlx-lm, which has its own, made the processor
    tiler: Callable[[ImageSource], TiledImage] | None = None  # instead of `tile_image`: a feature store's
    sampling: Sampling = Sampling()  # of the checkpoint's generation config

    image_token: ClassVar[str] = PromptTokens.TEXTS["image"]

    @classmethod
    def from_config(cls, config: dict, tokenizer: Any = None) -> Processor:
        """The processor of a converted checkpoint's config."""
        return cls(
            image_config=ImageConfig(**config["image_config"]),
            num_queries=config["projector_config"]["num_queries"],
            prompt_tokens=PromptTokens(**config["prompt_tokens"]),
            tokenizer=tokenizer,
        )

    def with_max_tiles(self, max_tiles: int | None) -> Processor:
        """The same, for at most `max_tiles` tiles per image."""
        return replace(self, image_config=self.image_config.with_max_tiles(max_tiles))

    def tile(self, image: ImageSource) -> TiledImage:
        """The image as the model sees it."""
        return self.tiler(image) if self.tiler else tile_image(image, self.image_config)

    def num_image_tokens(self, image: TiledImage | Tiling) -> int:
        """How many tokens of the context an image takes."""
        return len(self.prompt_tokens.block(image.grid, self.num_queries))

    def check_pages(self, images: Sequence[ImageSource], room: int) -> None:
        """Check that the pages of PDFs among images take at most `room` tokens, before any is rendered.

        Raises:
            ValueError: if they take more.
        """
        pages = [image for image in images if isinstance(image, PdfPage)]
        sizes = [page.pixels(page_zoom(page, self.image_config)) for page in pages]
        tokens = [self.num_image_tokens(plan_tiles(*size, self.image_config)) for size in sizes]
        if sum(tokens) > room:
            name, fit = pages[0].file.name, sum(total <= room for total in itertools.accumulate(tokens))
            of_one = fit and pages[fit - 1].file == pages[0].file
            some = f"name fewer ({name}#{pages[0].number}-{pages[fit - 1].number}), or " if of_one else ""
            raise ValueError(
                f"{name}: {len(pages)} pages take {sum(tokens)} tokens, and the context has room for {room}; "
                f"{some}take fewer tiles of each (--max-image-tiles)"
            )

    def __call__(self, text: str, *, images: Sequence[ImageSource]) -> tuple[str, list[TiledImage]]:
        """mlx-lm's contract: each placeholder of a templated `text` grown to its image's length, and the images tiled.

        A text without any placeholder gets the images in front of its last user turn.

        Raises:
            ValueError: if the numbers of placeholders and images differ.
            ImageError: if an image cannot be used.
        """
        if images and self.image_token not in text:
            head = f"{HEADER_START}user{HEADER_END}\n\n"
            before, found, after = text.rpartition(head)
            text = before + found + f"{self.image_token}\n" * len(images) + after
        parts = text.split(self.image_token)
        if len(parts) - 1 != len(images):
            raise ValueError(f"the text has places for {len(parts) - 1} images, but {len(images)} were given")
        tiled = [self.tile(image) for image in images]
        grown = parts[0]
        for image, part in zip(tiled, parts[1:], strict=True):
            grown += self.image_token * self.num_image_tokens(image) + part
        return grown, tiled

    def encode(
        self,
        prompt: str | Sequence[dict] | Sequence[int] | Prompt,
        images: Sequence[ImageSource] = (),
        system_prompt: str | None = None,
    ) -> Prompt:
        """The prompt for a question, a conversation, or a text already templated.

        Args:
            prompt: a question of the user; or messages, dicts of `role` and `content`, whose image parts may hold
                their image or stand for the next of `images`; or a templated text, which starts with
                `<|begin_of_text|>`; or ids, in a list or an array; or a Prompt, which is returned.
            images: they go in front of a question, or fill the places of messages or of a templated text.
            system_prompt: goes before a question or messages.

        Raises:
            ValueError: if messages are malformed, places and images do not match, or `system_prompt` has no place.
            ImageError: if an image cannot be used.
        """
        if not isinstance(prompt, (str, Prompt)):
            prompt = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
            if not prompt:
                raise ValueError("the prompt is empty: there are no messages and no ids in it")
        is_ids = isinstance(prompt, list) and all(isinstance(i, Integral) for i in prompt)
        is_templated = isinstance(prompt, str) and prompt.startswith(BOS)
        if system_prompt is not None and (is_ids or is_templated or isinstance(prompt, Prompt)):
            raise ValueError("a system prompt goes before a question or messages; ids and templated texts are complete")
        if isinstance(prompt, Prompt):
            return prompt
        if is_ids:
            return Prompt(list(map(int, prompt)), [self.tile(image) for image in images])
        if is_templated:
            text, tiled = self(prompt, images=images)
            return Prompt(self.tokenizer.encode(text, add_special_tokens=False), tiled)
        if isinstance(prompt, str):
            prompt, images = [{"role": "user", "content": [*map(_Image, images), prompt]}], ()
        if system_prompt is not None:
            prompt = [{"role": "system", "content": system_prompt}, *prompt]
        return self._encode_messages(prompt, images)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def encode_answered(self, messages: Sequence[dict]) -> tuple[Prompt, list[bool]]:
        """A conversation with its answers, and which of its ids are answers: what a model is trained on.

        An answer's own end-of-turn token is part of it. The images are in the messages.

        Raises:
            ValueError: if messages are malformed.
            ImageError: if an image cannot be used.
        """
        ids, answers, tiled = [self._special(BOS)], [False], []
        for message in messages:
            head, body, images = self._encode_message(message, iter(()))
            ids += head + body
            answers += [False] * len(head) + [message["role"] == "assistant"] * len(body)
            tiled += images
        return Prompt(ids, tiled), answers

    def _encode_messages(self, messages: Sequence[dict], images: Sequence[ImageSource]) -> Prompt:
        waiting = iter(images)
        ids, tiled = [self._special(BOS)], []
        for message in messages:
            head, body, own = self._encode_message(message, waiting)
            ids += head + body
            tiled += own
        if next(waiting, None) is not None:
            raise ValueError(f"{len(images)} images were given, but the messages have places for fewer")
        ids += [self._special(HEADER_START), *self._text("assistant"), self._special(HEADER_END), *self._text("\n\n")]
        return Prompt(ids, tiled)

    def _encode_message(
        self, message: dict, waiting: Iterable[ImageSource]
    ) -> tuple[list[int], list[int], list[TiledImage]]:
        """The ids of a message's header and of its content, and its images."""
        if not isinstance(message, dict):
            raise ValueError(f"a message is {reprlib.repr(message)}; it must be a dict of role and content")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"a message has the role {role!r}; it must be one of {', '.join(ROLES)}")
        head = [self._special(HEADER_START), *self._text(role), self._special(HEADER_END)]
        ids, tiled, text = [], [], "\n\n"
        if role == "assistant":  # its newlines are the prompt's, and no part of the answer
            head, text = head + self._text(text), ""
        for i, part in enumerate(_trimmed(_parts(message.get("content"), waiting))):
            text += "\n" if i else ""
            if isinstance(part, str):
                text += part
                continue
            image = self.tile(part.source)
            tiled.append(image)
            ids += self._text(text) + [self.prompt_tokens.image] * self.num_image_tokens(image)
            text = ""
        return head, [*ids, *self._text(text), self._special(EOT)], tiled

    def _special(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def _text(self, text: str) -> list[int]:
        """Ids of text as text: what looks like a special token is spelled out."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []


@dataclass(frozen=True)
class _Image:
    source: ImageSource


def _parts(content: Content | None, waiting: Iterable[ImageSource]) -> list[str | _Image]:
    """The texts and images of a message's content, those without a source of their own taken from `waiting`."""
    if content is None or isinstance(content, str):
        return [content or ""]
    parts: list[str | _Image] = []
    for part in content:
        if isinstance(part, (str, _Image)):
            parts.append(part)
        elif not isinstance(part, dict):
            parts.append(_Image(part))
        elif part.get("type") == "text":
            parts.append(str(part.get("text", "")))
        elif part.get("type") in ("image", "image_url", "input_image"):
            source = part.get("image", part.get("image_url"))
            if isinstance(source, dict):
                source = source.get("url")
            if source is None and (source := next(waiting, None)) is None:
                raise ValueError("the messages have places for more images than were given")
            parts.append(_Image(source))
        else:
            raise ValueError(f"a message part has the type {part.get('type')!r}; it must be text or image")
    return parts


def _trimmed(parts: list[str | _Image]) -> list[str | _Image]:
    """The reference trims a message's content at both ends."""
    if parts and isinstance(parts[0], str):
        parts[0] = parts[0].lstrip()
    if parts and isinstance(parts[-1], str):
        parts[-1] = parts[-1].rstrip()
    return parts


def chat_template(special_tokens: Iterable[str]) -> str:
    """The same format as a Jinja template, for mlx-lm's own tools: an image part becomes one placeholder.

    Special tokens in a user's text are broken up by a zero-width space, for there the text is parsed after templating.
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

"""Prompts of requests: ids, tilings of images, and keys of blocks in the prefix cache.

Tokens are worked out from the images' headers, so that what the context cannot hold is refused before anything is
decoded.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..image import ImageError, tile_image
from ..prompt import Processor
from ..prompt_tokens import BOS
from ..tiling import TiledImage, Tiling, plan_tiles
from .checks import RequestError, bad
from .images import RequestImage, read_images
from .requests import ChatRequest, CompletionRequest, Limits

BLOCK = 16  # text tokens in a block of the prefix cache

# Hugging Face's fast tokenizers change their settings while they encode.
TOKENIZING = threading.Lock()
# Decoded images are large: one at a time, whatever number of requests comes.
DECODING = threading.Lock()


@dataclass(frozen=True)
class PlannedImage:
    """An image and its tiling; it is decoded later, and only if the prefix cache lacks it."""

    source: RequestImage
    tiling: Tiling
    max_tiles: int | None

    def tile(self, processor: Processor) -> TiledImage:
        """Decode the image.

        Raises:
            RequestError: if it is damaged.
        """
        config = processor.with_max_tiles(self.max_tiles).image_config
        try:
            with DECODING:
                return tile_image(self.source.data, config)
        except ImageError as e:
            raise bad(self.source.where, str(e), "invalid_image") from e


@dataclass(frozen=True)
class Block:
    """Tokens cached together: a run of text, or a whole image."""

    digest: str  # of the model's input from the beginning to `end`
    start: int
    end: int


@dataclass(frozen=True)
class RequestPrompt:
    ids: list[int]  # each image one run of placeholders
    images: tuple[PlannedImage, ...] = ()
    places: tuple[tuple[int, int], ...] = ()  # (start, end) of each image's run

    def blocks(self, answer: Sequence[int] = ()) -> list[Block]:
        """Full blocks of prompt and answer: one per image, and `BLOCK` tokens each of text.

        Text in front of an image is a block whatever its length, so that an image's block always ends with the image.
        """
        ids = [*self.ids, *answer]
        blocks, digest, start = [], b"", 0

        def add(end: int, key: str) -> None:
            nonlocal digest, start
            digest = hashlib.sha256(digest + key.encode()).digest()
            blocks.append(Block(digest.hex(), start, end))
            start = end

        def add_text(end: int, whole: bool) -> None:
            while end - start >= (1 if whole else BLOCK):
                stop = min(start + BLOCK, end)
                add(stop, repr(ids[start:stop]))

        for image, (first, last) in zip(self.images, self.places, strict=True):
            add_text(first, whole=True)
            add(last, f"image {image.source.sha256.hex()} {image.tiling}")
        add_text(len(ids), whole=False)
        return blocks


def plan_image(image: RequestImage, processor: Processor, max_tiles: int | None) -> PlannedImage:
    """Plan the tiling of an image.

    Raises:
        RequestError: if it is so long and thin that its tiles would be larger than the model's own.
    """
    max_tiles = 1 if image.overview_only else max_tiles
    config = processor.with_max_tiles(max_tiles).image_config
    tiling = plan_tiles(*image.size, config)
    most = 4 * config.scale_resolution**2
    if any(width * height > most for width, height in filter(None, (tiling.overview, tiling.cell))):
        width, height = image.size
        raise bad(image.where, f"{width}x{height} pixels are too long and thin; cut the image", "invalid_image")
    return PlannedImage(image, tiling, max_tiles)


def num_tokens(image: PlannedImage, processor: Processor) -> int:
    """Number of tokens of an image's block."""
    return len(processor.prompt_tokens.block(image.tiling.grid, processor.num_queries))


def chat_prompt(request: ChatRequest, processor: Processor, limits: Limits) -> RequestPrompt:
    """Prompt of a chat, its images not decoded yet.

    Raises:
        RequestError: if an image cannot be used, or the context has no room.
    """
    images = read_images(request.messages, limits)
    planned = {part: plan_image(image, processor, request.max_image_tiles) for part, image in images.items()}
    total = sum(num_tokens(image, processor) for image in planned.values())
    texts = [part.strip() for message in request.messages for part in message.content if isinstance(part, str)]
    _check_context(total, sum(map(len, texts)), "messages", limits)

    def as_planned(part) -> TiledImage:
        return TiledImage((), planned[part].tiling.grid)

    messages = [
        {
            "role": each.role,
            "content": [p if isinstance(p, str) else {"type": "image", "image": p} for p in each.content],
        }
        for each in request.messages
    ]
    with TOKENIZING:
        ids = replace(processor, tiler=as_planned).encode(messages).ids
    _check_length(len(ids), "messages", limits)
    ordered = tuple(planned.values())
    return RequestPrompt(ids, ordered, tuple(_places(ids, [num_tokens(i, processor) for i in ordered], processor)))


def completion_prompt(request: CompletionRequest, processor: Processor, limits: Limits) -> RequestPrompt:
    """Prompt of a plain completion; special tokens in its text are parsed.

    Raises:
        RequestError: if the context has no room, or an image's placeholder is among the tokens.
    """
    ids = request.prompt
    if isinstance(ids, str):
        _check_context(0, len(ids), "prompt", limits)
        prompt = ids if ids.startswith(BOS) else BOS + ids
        with TOKENIZING:
            ids = processor.tokenizer.encode(prompt, add_special_tokens=False)
    _check_length(len(ids), "prompt", limits)
    if processor.prompt_tokens.image in ids:
        raise bad("prompt", f"{processor.image_token} stands for an image, and only a chat has images")
    return RequestPrompt(list(ids))


def token_text(token: int, processor: Processor) -> str:
    """Text of a single token."""
    with TOKENIZING:
        return processor.tokenizer.decode([token])


def _check_context(image_tokens: int, characters: int, where: str, limits: Limits) -> None:
    """Refuse a text that cannot fit the context, before tokenizing it."""
    _check_length(image_tokens + characters // limits.longest_token, where, limits, "at least ")


def _check_length(length: int, where: str, limits: Limits, at_least: str = "") -> None:
    if length >= limits.context:
        raise RequestError(
            400,
            f"{where}: {at_least}{length} tokens are too long for the context of {limits.context}; use fewer or "
            "smaller images, fewer tiles per image, or less text",
            "context_length_exceeded",
            where,
        )


def _places(ids: list[int], lengths: list[int], processor: Processor) -> list[tuple[int, int]]:
    """(start, end) of the runs of placeholders, given their lengths."""
    places, end = [], 0
    for length in lengths:
        start = ids.index(processor.prompt_tokens.image, end)
        end = start + length
        places.append((start, end))
    return places

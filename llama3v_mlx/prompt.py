"""Encode chat messages and images as token ids in the released prompt format; mlx-lm's processor interface.

An image's whole block (`<image>…</image><slice>…</slice>`) is encoded as one run of its placeholder token; the model
splices the block's embeddings in. User text never becomes a special token.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, ClassVar

from .image import ImageSource, tile_image
from .pdf import PdfPage
from .prompt_tokens import BOS, EOT, HEADER_END, HEADER_START, PromptTokens
from .sampling import Sampling
from .tiling import ImageConfig, TiledImage, Tiling, plan_tiles

ROLES = ("system", "user", "assistant")

# Content of a message: text, or texts and images in order (OpenAI's or Hugging Face's parts, or bare values).
Content = str | Sequence[Any]


@dataclass(frozen=True)
class Prompt:
    """Encoded prompt: the input of the model."""

    ids: list[int]  # each image is one run of placeholders
    images: list[TiledImage]  # in the order of their runs


@dataclass(frozen=True)
class Processor:
    """Encode conversations with images as prompts; `processor.tokenizer` is mlx-lm's wrapped tokenizer."""

    image_config: ImageConfig
    num_queries: int  # visual tokens per tile
    prompt_tokens: PromptTokens
    tokenizer: Any = None  # None if mlx-lm created the processor, as it has its own
    tiler: Callable[[ImageSource], TiledImage] | None = None  # replaces `tile_image`, for a feature store
    sampling: Sampling = Sampling()  # from the checkpoint's generation config

    image_token: ClassVar[str] = PromptTokens.TEXTS["image"]

    @classmethod
    def from_config(cls, config: dict, tokenizer: Any = None) -> Processor:
        """Create a processor from a converted checkpoint's config."""
        return cls(
            image_config=ImageConfig(**config["image_config"]),
            num_queries=config["projector_config"]["num_queries"],
            prompt_tokens=PromptTokens(**config["prompt_tokens"]),
            tokenizer=tokenizer,
        )

    def with_max_tiles(self, max_tiles: int | None) -> Processor:
        """Return a copy with at most `max_tiles` tiles per image."""
        return replace(self, image_config=self.image_config.with_max_tiles(max_tiles))

    def tile(self, image: ImageSource) -> TiledImage:
        """Cut an image into the tiles that the model sees."""
        return self.tiler(image) if self.tiler else tile_image(image, self.image_config)

    def num_image_tokens(self, image: TiledImage | Tiling) -> int:
        """Return the number of context tokens of an image."""
        return len(self.prompt_tokens.block(image.grid, self.num_queries))

    def check_pages(self, images: Sequence[ImageSource], room: int) -> None:
        """Check that the PDF pages among images take at most `room` tokens, without rendering any.

        Raises:
            ValueError: if they take more.
        """
        pages = [image for image in images if isinstance(image, PdfPage)]
        config = self.image_config
        tokens = [self.num_image_tokens(plan_tiles(*page.pixels(config), config)) for page in pages]
        if sum(tokens) > room:
            name, fit = pages[0].file.name, sum(total <= room for total in itertools.accumulate(tokens))
            of_one = fit and pages[fit - 1].file == pages[0].file
            some = f"select fewer ({name}#{pages[0].number}-{pages[fit - 1].number}), or " if of_one else ""
            raise ValueError(
                f"{name}: {len(pages)} pages take {sum(tokens)} tokens, but the context has room for {room}; "
                f"{some}use fewer tiles per page (--max-image-tiles)"
            )

    def __call__(self, text: str, *, images: Sequence[ImageSource]) -> tuple[str, list[TiledImage]]:
        """Expand each placeholder in templated `text` to its image's length, and tile the images: mlx-lm's interface.

        If the text has no placeholder, the images are inserted at the start of its last user turn.

        Raises:
            ValueError: if the numbers of placeholders and images differ.
            ImageError: if an image is unusable.
        """
        if images and self.image_token not in text:
            head = f"{HEADER_START}user{HEADER_END}\n\n"
            before, found, after = text.rpartition(head)
            text = before + found + f"{self.image_token}\n" * len(images) + after
        parts = text.split(self.image_token)
        if len(parts) - 1 != len(images):
            raise ValueError(f"the text has placeholders for {len(parts) - 1} images, but {len(images)} were given")
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
        """Encode a question, a conversation, or a templated text.

        Args:
            prompt: a user's question; or messages, dicts with `role` and `content`, whose image parts may contain
                their image or stand for the next of `images`; or a templated text, which starts with
                `<|begin_of_text|>`; or ids, in a list or an array; or a `Prompt`, which is returned as is.
            images: inserted before a question, or substituted for placeholders in messages or a templated text.
            system_prompt: precedes a question or messages.

        Raises:
            ValueError: if messages are malformed, placeholders and images do not match, or `system_prompt` is passed
                with another kind of prompt.
            ImageError: if an image is unusable.
        """
        if not isinstance(prompt, (str, Prompt)):
            if not isinstance(prompt, Iterable):
                raise TypeError(f"a prompt must be a text, messages or ids, not {type(prompt).__name__}")
            prompt = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
            if not prompt:
                raise ValueError("the prompt is empty: it has no messages or ids")
        is_ids = isinstance(prompt, list) and all(isinstance(i, Integral) for i in prompt)
        is_templated = isinstance(prompt, str) and prompt.startswith(BOS)
        if system_prompt is not None and (is_ids or is_templated or isinstance(prompt, Prompt)):
            raise ValueError("a system prompt goes before a question or messages; ids and templated text are complete")
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
        """Encode a conversation for training; also return which of its ids belong to answers.

        An answer includes its end-of-turn token. The images are in the messages.

        Raises:
            ValueError: if messages are malformed.
            ImageError: if an image is unusable.
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
            raise ValueError(f"{len(images)} images were given, but the messages have placeholders for fewer")
        ids += [self._special(HEADER_START), *self._text("assistant"), self._special(HEADER_END), *self._text("\n\n")]
        return Prompt(ids, tiled)

    def _encode_message(
        self, message: dict, waiting: Iterable[ImageSource]
    ) -> tuple[list[int], list[int], list[TiledImage]]:
        """Encode a message; return the ids of its header, the ids of its content, and its images."""
        if not isinstance(message, dict):
            raise ValueError(f"a message is {reprlib.repr(message)}; it must be a dict with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"a message has the role {role!r}; it must be one of {', '.join(ROLES)}")
        head = [self._special(HEADER_START), *self._text(role), self._special(HEADER_END)]
        ids, tiled, text = [], [], "\n\n"
        if role == "assistant":  # its newlines belong to the prompt, not to the answer
            head, text = head + self._text(text), ""
        for part in _joined(_parts(message.get("content"), waiting)):
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
        """Tokenize plain text: what looks like a special token is split into ordinary tokens.

        Raises:
            ValueError: if the text has a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{text[:40]!r} is no text: it has a lone surrogate") from None
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []


@dataclass(frozen=True)
class _Image:
    source: ImageSource


def _parts(content: Content | None, waiting: Iterable[ImageSource]) -> list[str | _Image]:
    """Return a message's texts and images; image parts without a source take the next one from `waiting`."""
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
                raise ValueError("the messages have placeholders for more images than were given")
            parts.append(_Image(source))
        else:
            raise ValueError(f"a message part has the type {part.get('type')!r}; it must be text or image")
    return parts


def _joined(parts: Sequence[str | _Image]) -> list[str | _Image]:
    """Join a message's parts by newlines and strip the whole, like the reference: text, image, text, …, text."""
    joined: list[str | _Image] = [""]
    for i, part in enumerate(parts):
        joined[-1] += "\n" if i else ""
        if isinstance(part, str):
            joined[-1] += part
        else:
            joined += [part, ""]
    joined[0] = joined[0].lstrip()
    joined[-1] = joined[-1].rstrip()
    return joined

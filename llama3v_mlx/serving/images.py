"""Images of requests: `data:` URIs, bounded in number and in pixels; nothing is decoded but their headers."""

import hashlib
import math
from dataclasses import dataclass

from ..image import ImageError, decode_data_uri, read_size
from .checks import bad
from .requests import ImagePart, Limits, Message


@dataclass(frozen=True)
class RequestImage:
    """An image of a request, its header read."""

    data: bytes  # the file
    size: tuple[int, int]  # (width, height) in pixels, upright
    where: str
    overview_only: bool = False  # OpenAI's `detail: "low"`

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.data).digest()


def read_image(uri: str, where: str, overview_only: bool = False) -> RequestImage:
    """Parse an image given as a `data:` URI and read its header.

    Raises:
        RequestError: if it is something else, or no image.
    """
    if uri[:5].lower() != "data:":
        raise bad(where, "images must be data: URIs; this server fetches none and reads no files", "invalid_image")
    try:
        data = decode_data_uri(uri)
        return RequestImage(data, read_size(data), where, overview_only)
    except ImageError as e:
        raise bad(where, str(e), "invalid_image") from e


def read_images(messages: tuple[Message, ...], limits: Limits) -> dict[ImagePart, RequestImage]:
    """Images of messages by their parts; bounds are checked and nothing is decoded.

    Raises:
        RequestError: if there are too many, in number or in pixels, or one is no image.
    """
    parts = [part for each in messages for part in each.content if isinstance(part, ImagePart)]
    if len(parts) > limits.max_images:
        raise bad("messages", f"{len(parts)} images are over the limit of {limits.max_images}", "too_many_images")
    images, pixels = {}, 0
    for part in parts:
        images[part] = image = read_image(part.uri, part.where, part.detail == "low")
        pixels += math.prod(image.size)
        if pixels > limits.max_pixels:
            raise bad(
                part.where,
                f"images of {pixels:,} pixels and more are over the limit of {limits.max_pixels:,}; resize them first",
                "too_many_pixels",
            )
    return images

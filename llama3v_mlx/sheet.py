"""Contact sheets of images."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .features.sources import read_named
from .files import beside, printable
from .image import ImageError, load_image

CELL, GAP, LINE = 240, 12, 17  # sizes in pixels


def draw_sheet(images: Sequence[tuple[str | None, str, str]], path: Path) -> None:
    """Draw images in a grid, in rows, and write the sheet atomically.

    Args:
        images: (name, see `read_named`, or None; label; caption) of each.
        path: image file to write; PNG if its suffix is unknown.
    """
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height = CELL + 2 * LINE + GAP
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (name, label, caption) in enumerate(images):
        x, y = GAP + i % columns * (CELL + GAP), GAP + i // columns * height
        draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), "#f2f2f2")
        try:
            image = load_image(read_named(name or ""))
            image.thumbnail((CELL, CELL))
            sheet.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))
        except (OSError, ImageError):
            draw.text((x + CELL / 2, y + CELL / 2), "file not found", "#666666", font, "mm")
        draw.text((x, y + CELL + 2), label, "#222222", font)
        caption = printable(caption)
        while draw.textlength(caption, font) > CELL:
            caption = f"{caption.removesuffix('…')[:-1]}…"
        draw.text((x, y + CELL + 2 + LINE), caption, "#666666", font)
    with beside(path) as partial:
        sheet.save(partial, Image.registered_extensions().get(path.suffix.lower(), "PNG"))

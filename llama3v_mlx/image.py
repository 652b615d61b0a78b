"""Images to tiles: load any source as upright RGB and cut it into the overview and slices that Llama3-V sees.

The tiles match those of the released code bit for bit: Pillow's bicubic on uint8. Needs only numpy and Pillow.
"""

import base64
import contextlib
import hashlib
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from .files import find_path, printable, read_file
from .formats import CONVERT, FORMATS, MAX_SCANS, RAW, BoundedFile, has_many_scans, is_heif, refusal
from .pdf import PdfError, PdfPage, find_pages
from .tiling import RELEASED, ImageConfig, TiledImage, plan_tiles

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | PdfPage

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class ImageError(ValueError):
    """Raised for an unusable image; the message says which one and why, in one line."""


class ImageFacts(NamedTuple):
    """Facts from the header of an image."""

    taken: float | None = None  # when the photo was taken, in seconds since 1970 in local time
    width: int | None = None  # in pixels, upright
    height: int | None = None


def load_image(
    source: ImageSource, draft: tuple[int, int] | None = None, config: ImageConfig = RELEASED
) -> Image.Image:
    """Load an image as a new, upright, 8-bit RGB image without metadata.

    Applies the EXIF orientation, composites transparency over white, scales 16-bit samples to 8 bits, and takes the
    first frame of an animation and the primary image of a HEIF file.

    Args:
        source: a path, the bytes of an image file, a `data:` URI, a PIL image of any mode, a uint8 array
            (height, width, 3) in RGB order, or a page of a PDF (also as a path: paper.pdf#3).
        draft: decode a JPEG at 1/2, 1/4 or 1/8 of its size, but no smaller than this (width, height). Much faster,
            but not exactly equal to downscaling the whole image.
        config: slicing for which a PDF page is rendered.

    Raises:
        ImageError: if the image is unusable, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (89 million).
    """
    source = _one_page(source)
    name, image = _open_bounded(source, config)
    try:
        file = getattr(image, "fp", None)
        if image.info.get("progressive") and isinstance(file, BoundedFile) and has_many_scans(file.getvalue()):
            raise ValueError(f"a JPEG of over {MAX_SCANS} scans")
        if draft is not None and image.format in ("JPEG", "MPO"):  # other formats would use a thumbnail
            image.draft(None, draft)
        image.load()
        rgb = _to_rgb(image)
        orientation = _orientation(image)
        rgb = rgb.copy() if rgb is source else rgb
        rgb.info = {}  # a remaining orientation would rotate the image again on reload
        if orientation not in (None, 1):
            rgb.getexif()[ExifTags.Base.Orientation] = orientation  # converting a TIFF loses it
            rgb = ImageOps.exif_transpose(rgb)
    except Exception as e:  # Pillow's decoders raise almost anything on damaged data
        raise ImageError(f"{name}: the image is damaged or truncated ({_reason(e)})") from e
    return rgb


def read_size(source: ImageSource) -> tuple[int, int]:
    """Read the (width, height) in pixels that `load_image` would return, from the header, without decoding.

    Raises:
        ImageError: if the header is unusable, or the image is over the limit of `load_image`.
    """
    _, image = _open_bounded(source, RELEASED)
    return _upright_size(image)


def expand(source: ImageSource) -> list[ImageSource]:
    """Expand the path of a PDF to the pages it selects; any other source to itself.

    Raises:
        ImageError: if a PDF is unusable, or has no such page.
    """
    if isinstance(source, (str, os.PathLike)) and not _is_data_uri(source):
        try:
            return find_pages(source) or [source]
        except PdfError as e:
            raise ImageError(str(e)) from e
    return [source]


def image_sha256(source: ImageSource, config: ImageConfig) -> bytes | None:
    """Return the SHA-256 that identifies an image: of its file's bytes, or None for pixels without a file.

    For a PDF page, it covers the file's SHA-256, the page number, and the size at which `config` renders the page.

    Raises:
        ImageError: if the image cannot be read.
    """
    source = _one_page(source)
    if isinstance(source, (Image.Image, np.ndarray)):
        return None
    if isinstance(source, PdfPage):
        return source.sha256(config)
    if isinstance(source, (str, os.PathLike)):
        source = decode_data_uri(os.fspath(source)) if _is_data_uri(source) else _read(source)
    return hashlib.sha256(source).digest()


def image_size(source: ImageSource, config: ImageConfig) -> tuple[int, int]:
    """Return the (width, height) in pixels of the upright image, without rendering a PDF page.

    Raises:
        ImageError: see `load_image`.
    """
    source = _one_page(source)
    return source.pixels(config) if isinstance(source, PdfPage) else load_image(source).size


def tile_image(source: ImageSource, config: ImageConfig = RELEASED) -> TiledImage:
    """Cut an image into tiles: the overview, then the slices row by row.

    Args:
        source: anything that `load_image` accepts.
        config: slicing of the checkpoint.

    Raises:
        ImageError: see `load_image`.
    """
    image = load_image(source, config=config)
    tiling = plan_tiles(*image.size, config)
    tiles = [np.asarray(image.resize(tiling.overview, Image.Resampling.BICUBIC))]
    if tiling.grid:
        (columns, rows), (width, height) = tiling.grid, tiling.cell
        # Slices are cut from the original resized to the grid's size, not from the overview.
        refined = np.asarray(image.resize((width * columns, height * rows), Image.Resampling.BICUBIC))
        cells = refined.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
        tiles += [np.ascontiguousarray(cell) for row in cells for cell in row]
    return TiledImage(tuple(tiles), tiling.grid)


def _one_page(source: ImageSource) -> ImageSource:
    """Return the source itself, or the single page that the path of a PDF selects."""
    images = expand(source)
    if len(images) > 1:
        raise ImageError(f"{source}: has {len(images)} pages, but only one image can be used; select one: {images[0]}")
    return images[0]


def _open_bounded(source: ImageSource, config: ImageConfig) -> tuple[str, Image.Image]:
    """Like `_open`, but raise ImageError if the image has no pixels or too many."""
    name, image = _open(source, config)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image has no pixels ({width}x{height})")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ImageError(f"{name}: {width}x{height} pixels are over the limit of {limit:,}; resize it first")
    return name, image


def _open(source: ImageSource, config: ImageConfig) -> tuple[str, Image.Image]:
    """Return a name for error messages, and the image, not yet decoded."""
    if isinstance(source, Image.Image):
        return "image", source
    if isinstance(source, PdfPage):
        try:
            return str(source), source.render(config)
        except PdfError as e:
            raise ImageError(str(e)) from e
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or source.size == 0:
            raise ImageError(f"array: must be uint8 (height, width, 3), not {source.dtype} {source.shape}")
        return "array", Image.fromarray(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "image data", _open_bytes("image data", bytes(source))
    if _is_data_uri(source):
        return "data URI", _open_bytes("data URI", decode_data_uri(os.fspath(source)))
    text = os.fspath(source)
    name, data = _printable(text or "."), _read(source)
    if Path(text).suffix.lower() in RAW:
        raise ImageError(f"{name}: camera RAW files are not supported; {CONVERT}")
    return name, _open_bytes(name, data)


def _is_data_uri(source: str | os.PathLike) -> bool:
    if not isinstance(source, (str, os.PathLike)):
        kinds = "a path, the bytes of a file, a data: URI, a PIL image or a uint8 array"
        raise TypeError(f"an image must be {kinds}, not {type(source).__name__}")
    return os.fspath(source)[:5].lower() == "data:"


def _read(source: str | os.PathLike) -> bytes:
    """Read the bytes of a file."""
    name, scheme = _printable(os.fspath(source) or "."), os.fspath(source)[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise ImageError(f"{name}: images are not fetched from the network; download it and pass the file")
    try:
        return read_file(find_path(source))
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder, not an image; pass the files in it") from None
    except (OSError, ValueError) as e:
        raise ImageError(f"{name}: cannot be read ({_reason(e)})") from e


def _open_bytes(name: str, data: bytes) -> Image.Image:
    if not data:
        raise ImageError(f"{name}: the file is empty")
    if reason := refusal(data):
        raise ImageError(f"{name}: {reason}")
    formats = [*FORMATS]
    if not (is_heif(data) and _register_heif()):
        formats.remove("HEIF")
    file = BoundedFile(data)
    try:
        image = Image.open(file, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter under `python -W error`
        raise ImageError(f"{name}: over the limit of {Image.MAX_IMAGE_PIXELS:,} pixels; resize it first") from None
    except Image.UnidentifiedImageError:
        if is_heif(data) and "HEIF" not in formats:
            raise ImageError(
                f"{name}: HEIC and HEIF need pillow-heif: pip install pillow-heif (the heif extra), or {CONVERT}"
            ) from None
        raise ImageError(f"{name}: not an image, damaged, or not one of {', '.join(FORMATS)}") from None
    except Exception as e:
        raise ImageError(f"{name}: the image is damaged or truncated ({_reason(e)})") from e
    if image.format == "BMP":
        file.reads_left = sys.maxsize  # Pillow reads its run lengths one by one
    if isinstance(image, TiffImagePlugin.TiffImageFile) and _is_raw(image.tag_v2):
        raise ImageError(f"{name}: camera RAW files are not supported; {CONVERT}")
    return image


def _register_heif() -> bool:
    """Register pillow-heif with Pillow; return False if it is not installed."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _is_raw(tags: TiffImagePlugin.ImageFileDirectory_v2) -> bool:
    """Return True for a TIFF that is a camera RAW; Pillow would decode its sensor samples or a thumbnail."""
    return ExifTags.Base.DNGVersion in tags or bool(tags.get(ExifTags.Base.NewSubfileType, 0) & 1)


def decode_data_uri(uri: str) -> bytes:
    """Decode an image given as a `data:` URI in base64.

    Raises:
        ImageError: if it is malformed.
    """
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError("data URI: must have the form data:image/png;base64,…")
    try:
        return base64.b64decode("".join(body.split()), validate=True)  # line breaks are allowed
    except ValueError as e:
        raise ImageError(f"data URI: bad base64 ({e})") from e


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata is common, and no reason to reject good pixels
        return None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return image.size[::-1] if (_orientation(image) or 1) in _SIDEWAYS else image.size


def read_facts(source: bytes | PdfPage, config: ImageConfig) -> ImageFacts:
    """Read the date and size of an image from its header; what is missing or damaged is None.

    Args:
        source: the bytes of an image file, or a page of a PDF.
        config: slicing for which a page is rendered.
    """
    if isinstance(source, PdfPage):
        return ImageFacts(None, *source.pixels(config))
    taken, size = None, ()
    with contextlib.suppress(Exception):  # as for the orientation
        with _open_bytes("", source) as image:
            size = _upright_size(image)
            text = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
        taken = datetime.strptime(str(text), "%Y:%m:%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
    return ImageFacts(taken, *size)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return the image itself if it is plain RGB, else a new one, with at most two copies in memory besides it."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _wide_to_rgb(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image.convert("RGB")


def _wide_to_rgb(image: Image.Image) -> Image.Image:
    """Convert 16- or 32-bit grey to 8 bits: integers in 0…65535, floats in 0…1, or 0…255 if any exceeds 1."""
    if image.mode == "F":
        samples = np.array(image)
        samples[np.isnan(samples)] = 0.0
        top = 255.0 if np.max(samples, where=np.isfinite(samples), initial=0.0) > 1 else 1.0
        np.clip(samples, 0.0, top, out=samples)
        samples *= 255.0 / top
        grey = Image.fromarray(np.rint(samples, out=samples).astype(np.uint8))
    else:
        table = [round(sample / 257) for sample in range(65536)]  # 65535 / 257 = 255
        clear = image.info.get("transparency")  # PNG: the transparent grey level
        if isinstance(clear, int):
            table[clear] = 255
        grey = image.convert("I").point(table, "L")
    return grey.convert("RGB")


def _printable(text: str) -> str:
    """Format a path for a message: on one line, and short even if it is file contents passed by mistake."""
    text = text if len(text) <= 500 else f"{text[:200]}…{text[-200:]}"
    return printable(text)


def _reason(error: Exception) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text or type(error).__name__

"""Images in, tiles out: any source → upright RGB → the overview and slices that Llama3-V looks at.

The slicing is the released one, bit for bit: Pillow's bicubic on uint8, Python's half-to-even rounding, the order of
the candidate grids deciding ties. Only numpy and Pillow are needed.
"""

import base64
import hashlib
import io
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from .files import find_path
from .pdf import PdfError, PdfPage, find_pages

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | PdfPage

# The formats that are read, by Pillow's names, and their files' suffixes. Pillow's others stay closed, to files and to
# the server's clients: some of them start other programs (EPS), and hardly anybody misses them.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),  # before HEIF, with which it shares brands
    "HEIF": (".heic", ".heif", ".hif"),  # by pillow-heif
    "JPEG2000": (".jp2",),
    "TGA": (".tga",),  # last: it has no magic number
}
EXTENSIONS = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# Images that are not read, so that this can be said of them.
RAW = {".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2"}
RAW |= {".srw", ".x3f"}
UNREAD = RAW | {".jxl", ".psd", ".svg", ".eps", ".ico", ".icns"}

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_RAW_MAGIC = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb")
_CONVERT = "convert it first (on a Mac: sips -s format jpeg FILE --out FILE.jpg)"


class ImageError(ValueError):
    """An image that cannot be used; the message says which and why in one line."""


@dataclass(frozen=True)
class ImageConfig:
    """How an image is cut into tiles."""

    scale_resolution: int = 448  # a tile has about this many pixels squared
    patch_size: int = 14  # tile sides are multiples of this
    max_slice_nums: int = 9  # slices beside the overview, at most; 1: never slice
    square: bool = False  # one tile of scale_resolution squared, whatever the aspect, as Google's SigLIP wants it

    def with_max_tiles(self, max_tiles: int | None) -> "ImageConfig":
        """The same, with at most `max_tiles` tiles per image, the overview included (1: the overview alone)."""
        if max_tiles is None:
            return self
        if max_tiles < 1:
            raise ValueError(f"an image takes at least 1 tile, not {max_tiles}")
        slices = min(self.max_slice_nums, max(1, max_tiles - 1))
        return replace(self, max_slice_nums=slices)


@dataclass(frozen=True)
class Tiling:
    """Where the tiles of an image come from; sizes are (width, height) in pixels."""

    overview: tuple[int, int]  # the whole image is resized to this
    grid: tuple[int, int] | None = None  # (columns, rows) of slices; None: the overview is all
    cell: tuple[int, int] | None = None  # one slice

    @property
    def num_tiles(self) -> int:
        return 1 + (self.grid[0] * self.grid[1] if self.grid else 0)


@dataclass(frozen=True)
class TiledImage:
    """An image as the model sees it."""

    tiles: tuple[np.ndarray, ...]  # uint8 (height, width, 3) RGB: the overview, then slices row by row
    grid: tuple[int, int] | None  # (columns, rows) of the slices
    sha256: bytes | None = None  # of the file; `tiles` may then be empty, where a feature store has the image

    @property
    def num_tiles(self) -> int:
        return 1 + (self.grid[0] * self.grid[1] if self.grid else 0)


def load_image(
    source: ImageSource, draft: tuple[int, int] | None = None, config: ImageConfig = ImageConfig()
) -> Image.Image:
    """An upright 8-bit RGB image, new and without metadata.

    EXIF rotation is applied, transparency is laid over white, 16-bit samples are scaled to 8, the first frame of an
    animation and the primary image of a HEIF file are taken.

    Args:
        source: a path, the bytes of an image file, a `data:` URI, a PIL image of any mode, a uint8 array
            (height, width, 3) in RGB order, or a page of a PDF (also as a path: paper.pdf#3).
        draft: have a JPEG decoded at 1/2, 1/4 or 1/8 of its size, but no smaller than this (width, height). It is
            much faster, and not exactly the same as reducing the whole image.
        config: the slicing that a PDF page is rendered for.

    Raises:
        ImageError: if there is no usable image, or one of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (89 million).
    """
    source = _one_page(source)
    name, image = _open_bounded(source, config)
    try:
        if draft is not None and image.format in ("JPEG", "MPO"):  # others would take a thumbnail
            image.draft(None, draft)
        image.load()
        rgb = _to_rgb(image)
        orientation = _orientation(image)
        rgb = rgb.copy() if rgb is source else rgb
        rgb.info = {}  # an orientation left here would turn the image again when it is loaded again
        if orientation not in (None, 1):
            rgb.getexif()[ExifTags.Base.Orientation] = orientation  # a converted TIFF has lost it
            rgb = ImageOps.exif_transpose(rgb)
    except Exception as e:  # Pillow's decoders raise almost anything on damaged data
        raise ImageError(f"{name}: the image is damaged or cut short ({_reason(e)})") from e
    return rgb


def read_size(source: ImageSource) -> tuple[int, int]:
    """The (width, height) in pixels that `load_image` would return, from the header: nothing is decoded.

    Raises:
        ImageError: if there is no usable header, or the image is over the limit of `load_image`.
    """
    _, image = _open_bounded(source, ImageConfig())
    width, height = image.size
    return (height, width) if (_orientation(image) or 1) in (5, 6, 7, 8) else (width, height)


def expand(source: ImageSource) -> list[ImageSource]:
    """The images that a source stands for: the pages that a path names if its file is a PDF, else the source alone.

    Raises:
        ImageError: if a PDF cannot be used, or has no such page.
    """
    if isinstance(source, (str, os.PathLike)) and not _is_data_uri(source):
        try:
            return find_pages(source) or [source]
        except PdfError as e:
            raise ImageError(str(e)) from e
    return [source]


def image_sha256(source: ImageSource, config: ImageConfig) -> bytes | None:
    """The SHA-256 by which an image is known again: of a file, its bytes; None for pixels that are not in a file.

    That of a PDF page is made of the file's, its number, and the size at which `config` has it rendered.

    Raises:
        ImageError: if it cannot be read.
    """
    source = _one_page(source)
    if isinstance(source, (Image.Image, np.ndarray)):
        return None
    if isinstance(source, PdfPage):
        return source.sha256(page_zoom(source, config))
    if isinstance(source, (str, os.PathLike)):
        source = _decode_data_uri(os.fspath(source)) if _is_data_uri(source) else _read(source)
    return hashlib.sha256(source).digest()


def page_zoom(page: PdfPage, config: ImageConfig) -> float:
    """The pixels per point at which a page fills the tiles: as many as they can show, and hardly more."""
    width, height = page.size
    most = config.scale_resolution**2 * (1 if config.square else config.max_slice_nums)
    zoom = math.sqrt(most / (width * height))
    tiling = plan_tiles(*page.pixels(zoom), config)
    shown = tiling.overview
    if tiling.grid:
        shown = tiling.grid[0] * tiling.cell[0], tiling.grid[1] * tiling.cell[1]
    # Neither side is enlarged afterwards; but a strip squeezed into a square is not worth millions of pixels.
    return min(max(shown[0] / width, shown[1] / height), 2 * zoom)


def image_size(source: ImageSource, config: ImageConfig) -> tuple[int, int]:
    """The (width, height) in pixels of an upright image; a PDF page is not rendered for it.

    Raises:
        ImageError: see `load_image`.
    """
    source = _one_page(source)
    return source.pixels(page_zoom(source, config)) if isinstance(source, PdfPage) else load_image(source).size


def plan_tiles(width: int, height: int, config: ImageConfig = ImageConfig()) -> Tiling:
    """The tiling of an image of `width` × `height` pixels, as the released model was trained with."""
    scale, patch = config.scale_resolution, config.patch_size
    if config.square:
        return Tiling((scale, scale))
    wanted = min(math.ceil(width * height / (scale * scale)), config.max_slice_nums)
    overview = _fit(width, height, scale, patch)
    if wanted <= 1:
        return Tiling(overview)

    log_ratio = math.log(width / height)
    grids = [
        (columns, n // columns)
        for n in (wanted - 1, wanted, wanted + 1)
        if 1 < n <= config.max_slice_nums
        for columns in range(1, n + 1)
        if n % columns == 0
    ]
    # `min` keeps the first of equals, which is the released tie order.
    columns, rows = min(grids, key=lambda grid: abs(log_ratio - math.log(grid[0] / grid[1])))
    cell = _fit(_snap(width, columns) / columns, _snap(height, rows) / rows, scale, patch)
    return Tiling(overview, (columns, rows), cell)


def tile_image(source: ImageSource, config: ImageConfig = ImageConfig()) -> TiledImage:
    """The tiles of an image: the overview, then the slices row by row.

    Args:
        source: whatever `load_image` takes.
        config: the slicing of the checkpoint.

    Raises:
        ImageError: see `load_image`.
    """
    image = load_image(source, config=config)
    tiling = plan_tiles(*image.size, config)
    tiles = [np.asarray(image.resize(tiling.overview, Image.Resampling.BICUBIC))]
    if tiling.grid:
        (columns, rows), (width, height) = tiling.grid, tiling.cell
        # The slices are cut from the original enlarged or reduced to the grid's size, not from the overview.
        refined = np.asarray(image.resize((width * columns, height * rows), Image.Resampling.BICUBIC))
        cells = refined.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
        tiles += [np.ascontiguousarray(cell) for row in cells for cell in row]
    return TiledImage(tuple(tiles), tiling.grid)


def _snap(length: float, step: int) -> int:
    return max(round(length / step) * step, step)


def _fit(width: float, height: float, scale: int, patch: int) -> tuple[int, int]:
    """The size of about scale² pixels and this aspect; the height is truncated first, and the width follows it."""
    ratio = width / height
    fitted_height = int(scale / math.sqrt(ratio))
    fitted_width = int(fitted_height * ratio)
    return _snap(fitted_width, patch), _snap(fitted_height, patch)


def _one_page(source: ImageSource) -> ImageSource:
    """The source itself, or the one page of a PDF that its path names."""
    images = expand(source)
    if len(images) > 1:
        raise ImageError(f"{source}: has {len(images)} pages, and one image is wanted; name a page: {images[0]}")
    return images[0]


def _open_bounded(source: ImageSource, config: ImageConfig) -> tuple[str, Image.Image]:
    """As `_open`; ImageError if the image has no pixels, or too many."""
    name, image = _open(source, config)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image has no pixels ({width}x{height})")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ImageError(f"{name}: {width}x{height} pixels are over the limit of {limit:,}; resize it first")
    return name, image


def _open(source: ImageSource, config: ImageConfig) -> tuple[str, Image.Image]:
    """A name for messages, and the image, its pixels not yet decoded."""
    if isinstance(source, Image.Image):
        return "image", source
    if isinstance(source, PdfPage):
        try:
            return str(source), source.render(page_zoom(source, config))
        except PdfError as e:
            raise ImageError(str(e)) from e
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or source.size == 0:
            raise ImageError(f"array: need uint8 (height, width, 3), not {source.dtype} {source.shape}")
        return "array", Image.fromarray(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "image data", _open_bytes("image data", bytes(source))
    text = os.fspath(source)
    if _is_data_uri(text):
        return "data URI", _open_bytes("data URI", _decode_data_uri(text))
    name, data = _printable(text or "."), _read(source)
    if Path(text).suffix.lower() in RAW:
        raise ImageError(f"{name}: camera RAW files are not read; {_CONVERT}")
    return name, _open_bytes(name, data)


def _is_data_uri(source: str | os.PathLike) -> bool:
    return os.fspath(source)[:5].lower() == "data:"


def _read(source: str | os.PathLike) -> bytes:
    """The bytes of a file."""
    name, scheme = _printable(os.fspath(source) or "."), os.fspath(source)[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise ImageError(f"{name}: images are not fetched from the network; download it and give the file")
    try:
        return find_path(source).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder, not an image; give the files in it") from None
    except (OSError, ValueError) as e:
        raise ImageError(f"{name}: cannot be read ({_reason(e)})") from e


def _open_bytes(name: str, data: bytes) -> Image.Image:
    if not data:
        raise ImageError(f"{name}: the file is empty")
    if reason := _unread(data):
        raise ImageError(f"{name}: {reason}")
    formats = [*FORMATS]
    is_heif = data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS
    if not (is_heif and _register_heif()):
        formats.remove("HEIF")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter under `python -W error`
        raise ImageError(f"{name}: over the limit of {Image.MAX_IMAGE_PIXELS:,} pixels; resize it first") from None
    except Image.UnidentifiedImageError:
        if is_heif and "HEIF" not in formats:
            raise ImageError(
                f"{name}: HEIC and HEIF need pillow-heif: pip install pillow-heif (the extra heif), or {_CONVERT}"
            ) from None
        raise ImageError(f"{name}: not an image, or damaged, or none of {', '.join(FORMATS)}") from None
    except Exception as e:
        raise ImageError(f"{name}: the image is damaged or cut short ({_reason(e)})") from e
    if isinstance(image, TiffImagePlugin.TiffImageFile) and _is_raw(image.tag_v2):
        raise ImageError(f"{name}: camera RAW files are not read; {_CONVERT}")
    return image


def _register_heif() -> bool:
    """Have Pillow read HEIF, if pillow-heif is installed. The only place that knows of it."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _unread(data: bytes) -> str | None:
    """Why a file is not read whose first bytes say that it is of a well-known other format."""
    if b"%PDF-" in data[:1024]:
        return "is a PDF, not an image; its pages are read if it is given as the path of a .pdf file"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return f"JPEG XL is not read; {_CONVERT}"
    if data.startswith(_RAW_MAGIC) or data[4:12] == b"ftypcrx " or (data[:2] == b"II" and data[8:10] == b"CR"):
        return f"camera RAW files are not read; {_CONVERT}"
    return None


def _is_raw(tags: TiffImagePlugin.ImageFileDirectory_v2) -> bool:
    """Whether a TIFF is a camera's RAW, of which Pillow would show the sensor's samples or a thumbnail."""
    return ExifTags.Base.DNGVersion in tags or bool(tags.get(ExifTags.Base.NewSubfileType, 0) & 1)


def _decode_data_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError("data URI: need the form data:image/png;base64,…")
    try:
        return base64.b64decode("".join(body.split()), validate=True)  # line breaks are allowed
    except ValueError as e:
        raise ImageError(f"data URI: bad base64 ({e})") from e


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata, which is common, is no reason to refuse good pixels
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image itself if it is plain RGB, else a new one; at most two copies are alive beside it, for big images."""
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
    """Grey of 16 or 32 bits to 8: integers are taken as 0…65535, floats as 0…1, or 0…255 if any is over 1."""
    if image.mode == "F":
        samples = np.array(image)
        samples[np.isnan(samples)] = 0.0
        top = 255.0 if np.max(samples, where=np.isfinite(samples), initial=0.0) > 1 else 1.0
        np.clip(samples, 0.0, top, out=samples)
        samples *= 255.0 / top
        grey = Image.fromarray(np.rint(samples, out=samples).astype(np.uint8))
    else:
        table = [round(sample / 257) for sample in range(65536)]  # 65535 / 257 = 255
        clear = image.info.get("transparency")  # PNG: the grey that is see-through
        if isinstance(clear, int):
            table[clear] = 255
        grey = image.convert("I").point(table, "L")
    return grey.convert("RGB")


def _printable(text: str) -> str:
    """A path for a message: on one line, and short even if it is file contents given as a path by mistake."""
    text = text if len(text) <= 500 else f"{text[:200]}…{text[-200:]}"
    return text if text.isprintable() else repr(text)[1:-1]


def _reason(error: Exception) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text or type(error).__name__

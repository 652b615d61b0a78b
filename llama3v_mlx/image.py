"""Images in, tiles out: any source → upright RGB → the overview and slices that Llama3-V looks at.

The slicing is the released one, bit for bit: Pillow's bicubic on uint8, Python's half-to-even rounding, the order of
the candidate grids deciding ties. Only numpy and Pillow are needed.
"""

import base64
import io
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

# EXIF orientation → what turns the stored pixels upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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


def load_image(source: ImageSource, draft: tuple[int, int] | None = None) -> Image.Image:
    """An upright 8-bit RGB image, new and without metadata.

    EXIF rotation is applied, transparency is laid over white, 16-bit samples are scaled to 8, the first frame of an
    animation is taken.

    Args:
        source: a path, the bytes of an image file, a `data:` URI, a PIL image of any mode, or a uint8 array
            (height, width, 3) in RGB order.
        draft: have a JPEG decoded at 1/2, 1/4 or 1/8 of its size, but no smaller than this (width, height). It is
            much faster, and not exactly the same as reducing the whole image.

    Raises:
        ImageError: if there is no usable image, or one of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (89 million).
    """
    name, image = _open(source)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: the image has no pixels ({width}x{height})")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ImageError(f"{name}: {width}x{height} pixels are over the limit of {limit:,}; resize it first")
    try:
        if draft is not None:
            image.draft(None, draft)
        image.load()
        rgb = _to_rgb(image)
        orientation = _orientation(image)
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[orientation])
        elif rgb is source:
            rgb = rgb.copy()
    except Exception as e:  # Pillow's decoders raise almost anything on damaged data
        raise ImageError(f"{name}: the image is damaged or cut short ({_reason(e)})") from e
    rgb.info = {}  # an orientation left here would turn the image again when it is loaded again
    return rgb


def read_bytes(source: ImageSource) -> bytes | None:
    """The bytes of an image file, by which it is known again; None for pixels that are not in a file.

    Raises:
        ImageError: if it cannot be read.
    """
    if isinstance(source, (Image.Image, np.ndarray)):
        return None
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    text = os.fspath(source)
    return _decode_data_uri(text) if text[:5].lower() == "data:" else _read(source)


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
    image = load_image(source)
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


def _open(source: ImageSource) -> tuple[str, Image.Image]:
    """A name for messages, and the image, its pixels not yet decoded."""
    if isinstance(source, Image.Image):
        return "image", source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or source.size == 0:
            raise ImageError(f"array: need uint8 (height, width, 3), not {source.dtype} {source.shape}")
        return "array", Image.fromarray(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "image data", _open_bytes("image data", bytes(source))
    text = os.fspath(source)
    if text[:5].lower() == "data:":
        return "data URI", _open_bytes("data URI", _decode_data_uri(text))
    return _printable(text or "."), _open_bytes(_printable(text or "."), _read(source))


def _read(source: str | os.PathLike) -> bytes:
    """The bytes of a file."""
    name, scheme = _printable(os.fspath(source) or "."), os.fspath(source)[:8].lower()
    if scheme.startswith(("http://", "https://")):
        raise ImageError(f"{name}: images are not fetched from the network; download it and give the file")
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder, not an image; give the files in it") from None
    except (OSError, ValueError) as e:
        raise ImageError(f"{name}: cannot be read ({_reason(e)})") from e


def _open_bytes(name: str, data: bytes) -> Image.Image:
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter under `python -W error`
        raise ImageError(f"{name}: over the limit of {Image.MAX_IMAGE_PIXELS:,} pixels; resize it first") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image, or of a format that Pillow does not read") from None
    except Exception as e:
        raise ImageError(f"{name}: the image is damaged or cut short ({_reason(e)})") from e


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

"""The tiles of an image: the overview, and a grid of slices, of what sizes.

The plan matches the released code: Python's half-to-even rounding, ties resolved by the order of the candidate grids.
"""

import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class ImageConfig:
    """Slicing of images into tiles."""

    scale_resolution: int = 448  # a tile has about this many pixels, squared
    patch_size: int = 14  # tile sides are multiples of this
    max_slice_nums: int = 9  # maximum number of slices besides the overview; 1: never slice
    square: bool = False  # one square tile of scale_resolution, ignoring the aspect ratio, as for Google's SigLIP

    def with_max_tiles(self, max_tiles: int | None) -> "ImageConfig":
        """Return a copy with at most `max_tiles` tiles per image, including the overview (1: only the overview)."""
        if max_tiles is None:
            return self
        if max_tiles < 1:
            raise ValueError(f"an image needs at least 1 tile, not {max_tiles}")
        slices = min(self.max_slice_nums, max(1, max_tiles - 1))
        return replace(self, max_slice_nums=slices)


RELEASED = ImageConfig()  # slicing of the released weights


@dataclass(frozen=True)
class Tiling:
    """Layout of the tiles of an image; sizes are (width, height) in pixels."""

    overview: tuple[int, int]  # size of the whole image, resized
    grid: tuple[int, int] | None = None  # (columns, rows) of slices; None: only the overview
    cell: tuple[int, int] | None = None  # size of a slice

    @property
    def num_tiles(self) -> int:
        return 1 + (self.grid[0] * self.grid[1] if self.grid else 0)


@dataclass(frozen=True)
class TiledImage:
    """An image as the model sees it."""

    tiles: tuple[np.ndarray, ...]  # uint8 (height, width, 3) RGB: the overview, then slices row by row
    grid: tuple[int, int] | None  # (columns, rows) of the slices
    sha256: bytes | None = None  # of the file; if a feature store has the image, `tiles` may be empty

    @property
    def num_tiles(self) -> int:
        return 1 + (self.grid[0] * self.grid[1] if self.grid else 0)


def plan_tiles(width: int, height: int, config: ImageConfig = RELEASED) -> Tiling:
    """Plan the tiles of an image of `width` × `height` pixels, as in the released model's training."""
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
    # `min` keeps the first of equals, like the released code.
    columns, rows = min(grids, key=lambda grid: abs(log_ratio - math.log(grid[0] / grid[1])))
    cell = _fit(_snap(width, columns) / columns, _snap(height, rows) / rows, scale, patch)
    return Tiling(overview, (columns, rows), cell)


def _snap(length: float, step: int) -> int:
    return max(round(length / step) * step, step)


def _fit(width: float, height: float, scale: int, patch: int) -> tuple[int, int]:
    """Return a size of about scale² pixels with this aspect ratio; the height is truncated first, the width derived."""
    ratio = width / height
    fitted_height = int(scale / math.sqrt(ratio))
    fitted_width = int(fitted_height * ratio)
    return _snap(fitted_width, patch), _snap(fitted_height, patch)

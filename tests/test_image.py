"""Slicing against the published examples and an independent reference; loading of every kind of input."""

import base64
import gc
import io
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import UPRIGHT, unicode_names
from PIL import ExifTags, Image, features

from llama3v_mlx.image import ImageError, load_image, tile_image
from llama3v_mlx.tiling import ImageConfig, plan_tiles

SMALL = ImageConfig(scale_resolution=56, patch_size=8, max_slice_nums=4)

# Tilings of the released model: sizes, overview, grid (columns, rows), cell, tiles, block tokens at 96 per tile.
EXAMPLES = [
    ([(1, 1), (100, 100), (336, 336), (447, 448), (448, 448)], (448, 448), None, None, 1, 98),
    ([(300, 200)], (546, 364), None, None, 1, 98),
    ([(500, 400)], (504, 406), None, None, 1, 98),
    ([(1000, 200)], (994, 196), None, None, 1, 98),
    ([(200, 1000)], (196, 1008), None, None, 1, 98),
    ([(2000, 100)], (2002, 98), None, None, 1, 98),
    ([(449, 448)], (448, 448), (2, 1), (322, 630), 3, 296),
    ([(512, 512)], (448, 448), (1, 2), (630, 322), 3, 297),
    ([(640, 480)], (518, 392), (2, 1), (364, 546), 3, 296),
    ([(480, 640)], (392, 518), (1, 2), (546, 364), 3, 297),
    ([(600, 336)], (602, 336), (2, 1), (420, 476), 3, 296),
    ([(700, 300)], (686, 294), (2, 1), (476, 420), 3, 296),
    ([(896, 448)], (630, 322), (2, 1), (448, 448), 3, 296),
    ([(1200, 630)], (616, 322), (3, 1), (350, 560), 4, 394),
    ([(800, 600), (1024, 768)], (518, 392), (2, 2), (518, 392), 5, 493),
    ([(1000, 1000)], (448, 448), (2, 2), (448, 448), 5, 493),
    ([(1280, 720)], (602, 336), (3, 2), (490, 406), 7, 689),
    ([(1920, 1080), (3840, 2160)], (602, 336), (4, 2), (420, 476), 9, 885),
    ([(1080, 1920)], (336, 602), (2, 4), (476, 420), 9, 887),
    ([(1179, 2556)], (308, 658), (2, 4), (434, 462), 9, 887),
    ([(4000, 500)], (1260, 154), (8, 1), (448, 448), 9, 884),
    ([(500, 4000)], (154, 1260), (1, 8), (448, 448), 9, 891),
    ([(1344, 1344)], (448, 448), (3, 3), (448, 448), 10, 984),
    ([(2048, 1536), (4032, 3024)], (518, 392), (3, 3), (518, 392), 10, 984),
    ([(8000, 200)], (2800, 70), (9, 1), (938, 210), 10, 982),
]


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """Return a 70-byte PNG that claims any size."""
    ihdr = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")


def pixels(source) -> list:
    return np.asarray(load_image(source)).tolist()


# --- slicing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, overview, grid, cell, tiles, tokens", EXAMPLES)
def test_published_examples(sizes, overview, grid, cell, tiles, tokens):
    for size in sizes:
        tiling = plan_tiles(*size)
        assert (tiling.overview, tiling.grid, tiling.cell, tiling.num_tiles) == (overview, grid, cell, tiles), size
        assert 98 * tiling.num_tiles + (1 + tiling.grid[1] if tiling.grid else 0) == tokens, size


def test_prompt_block_is_as_long_as_published():
    """The prompt only knows an image's grid, so its block must match the tiles."""
    from llama3v_mlx.models.llama3v import PromptTokens

    ids = PromptTokens(image=0, image_start=1, image_end=2, slice_start=3, slice_end=4, newline=5)
    for *_, grid, _, tiles, tokens in EXAMPLES:
        block = ids.block(grid, 96)
        assert (len(block), block.count(0)) == (tokens, 96 * tiles), grid


def reference_plan(width, height, scale, patch, most):
    """Transcribe the specification's pseudo-code line by line; return (overview, grid, cell)."""

    def snap(v, p):
        return max(round(v / p) * p, p)

    def fit(w, h, up):
        if up or w * h > scale * scale:
            r = w / h
            h = int(scale / math.sqrt(r))
            w = int(h * r)
        return snap(w, patch), snap(h, patch)

    k = min(math.ceil(width * height / (scale * scale)), most)
    if k <= 1:
        return fit(width, height, True), None, None
    best, grid = math.inf, None
    for n in (k - 1, k, k + 1):
        if n == 1 or n > most:
            continue
        m = 1
        while m <= n:
            if n % m == 0:
                error = abs(math.log(width / height) - math.log(m / (n // m)))
                if error < best:
                    best, grid = error, (m, n // m)
            m += 1
    columns, rows = grid
    cell = fit(snap(width, columns) / columns, snap(height, rows) / rows, True)
    return fit(width, height, False), grid, cell


def random_sizes(count: int, longest: int, rng) -> list[tuple[int, int]]:
    """Draw sizes, every other one small, where the number of slices varies; aspect ratios up to 40:1."""
    sizes = [(1, 1), (longest, longest)]
    while len(sizes) < count:
        width, height = rng.integers(1, longest // (1 + 3 * (len(sizes) % 2)) + 1, 2).tolist()
        if max(width, height) <= 40 * min(width, height):
            sizes.append((width, height))
    return sizes


@pytest.mark.parametrize("config, longest", [(ImageConfig(), 5000), (SMALL, 600)], ids=["released", "small"])
def test_plan_is_the_reference(config, longest):
    scale, patch, most = config.scale_resolution, config.patch_size, config.max_slice_nums
    seen = set()
    for width, height in random_sizes(2000, longest, np.random.default_rng(1)):
        tiling = plan_tiles(width, height, config)
        assert (tiling.overview, tiling.grid, tiling.cell) == reference_plan(width, height, scale, patch, most)
        slices = math.prod(tiling.grid) if tiling.grid else 0
        assert slices <= most
        assert tiling.num_tiles == 1 + slices
        for side in tiling.overview + (tiling.cell or ()):
            assert side >= patch and side % patch == 0
        seen.add(slices)
    assert seen == {0, *range(2, most + 1)}, "some number of slices was never tried"


@pytest.mark.parametrize("config, longest", [(ImageConfig(), 1300), (SMALL, 160)], ids=["released", "small"])
def test_tiles_are_the_reference_to_the_bit(config, longest):
    rng = np.random.default_rng(2)
    for width, height in random_sizes(15, longest, rng):
        array = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(array)
        overview, grid, cell = reference_plan(
            width, height, config.scale_resolution, config.patch_size, config.max_slice_nums
        )
        expected = [image.resize(overview, Image.Resampling.BICUBIC)]
        if grid:
            columns, rows = grid
            w, h = cell
            refined = image.resize((columns * w, rows * h), Image.Resampling.BICUBIC)
            for r in range(rows):
                for c in range(columns):
                    expected.append(refined.crop((c * w, r * h, (c + 1) * w, (r + 1) * h)))
        tiled = tile_image(array, config)
        assert tiled.grid == grid
        assert len(tiled.tiles) == len(expected)
        for tile, crop in zip(tiled.tiles, expected, strict=True):
            assert tile.dtype == np.uint8 and tile.flags.c_contiguous and tile.shape == (*crop.size[::-1], 3)
            assert np.array_equal(tile, np.asarray(crop)), (width, height)


def test_slices_come_row_by_row():
    """Nine flat squares at a size that needs no resampling: slice i has colour i."""
    colours = noise(3, 3)
    tiles = tile_image(colours.repeat(448, axis=0).repeat(448, axis=1)).tiles
    assert [tile[0, 0].tolist() for tile in tiles[1:]] == colours.reshape(9, 3).tolist()
    assert all((tile == tile[0, 0]).all() for tile in tiles[1:])


@pytest.mark.parametrize(
    "size, tiles", [((1, 1), 1), ((1, 5000), 1), ((5000, 1), 1), ((8000, 200), 10), ((200, 8000), 10), ((3, 70000), 4)]
)
def test_extreme_shapes(size, tiles):
    width, height = size
    tiled = tile_image(np.full((height, width, 3), 7, np.uint8))
    assert len(tiled.tiles) == tiles
    for tile in tiled.tiles:
        assert tile.shape[0] % 14 == tile.shape[1] % 14 == 0 and (tile == 7).all()


def test_with_max_tiles():
    slices = {None: 9, 1: 1, 2: 1, 3: 2, 6: 5, 10: 9, 99: 9}
    assert {n: ImageConfig().with_max_tiles(n).max_slice_nums for n in slices} == slices
    assert SMALL.with_max_tiles(10) == SMALL  # never more than the checkpoint's limit
    assert SMALL.with_max_tiles(3) == ImageConfig(56, 8, 2)
    for n in 1, 2, 3, 10:
        config = ImageConfig().with_max_tiles(n)
        counts = {plan_tiles(w, h, config).num_tiles for w in range(100, 3000, 290) for h in range(100, 3000, 290)}
        assert max(counts) == (1 if n == 2 else n), "a grid has at least 2 slices, so 2 tiles are 1"
    for n in 0, -1:
        with pytest.raises(ValueError, match="at least 1 tile"):
            ImageConfig().with_max_tiles(n)


# --- sources ---------------------------------------------------------------------------------------------------------


@unicode_names
def test_every_kind_of_source(tmp_path):
    array = noise(5, 4)
    image = Image.fromarray(array)
    data = encode(image)
    path = tmp_path / "a  b é.png"
    path.write_bytes(data)
    (entry,) = os.scandir(tmp_path)
    text = base64.b64encode(data).decode()
    sources = {
        "str": str(path),
        "Path": path,
        "PathLike": entry,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "data URI": f"data:image/png;base64,{text}",
        "data URI of unknown type, loud": f"DATA:;BASE64,{text}",
        "data URI with line breaks": "data:image/png;base64," + base64.encodebytes(data).decode(),
        "PIL": image,
        "PIL, not decoded yet": Image.open(path),
        "array": array,
        "array, strided": array.repeat(2, axis=0)[::2],
    }
    for kind, source in sources.items():
        loaded = load_image(source)
        assert (loaded.mode, loaded.size) == ("RGB", (5, 4)), kind
        assert np.array_equal(np.asarray(loaded), array), kind
    path.unlink()
    assert refusal(entry) == f"{path}: no such file"


@pytest.mark.parametrize("source", [None, 3, ["a.png"], io.BytesIO()], ids=lambda source: type(source).__name__)
def test_other_types_are_type_errors(source):
    with pytest.raises(TypeError):
        load_image(source)


@pytest.mark.parametrize(
    "mode, value, rgb",
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("P", 1, (255, 0, 0)),
        ("PA", (1, 51), (255, 204, 204)),  # an alpha of 51 is a fifth
        ("LA", (0, 51), (204, 204, 204)),
        ("La", (51, 51), (255, 255, 255)),  # premultiplied
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBX", (1, 2, 3, 0), (1, 2, 3)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
        ("RGBa", (51, 0, 0, 51), (255, 204, 204)),
        ("CMYK", (255, 0, 0, 51), (0, 204, 204)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
        ("LAB", (136, 208, 195), (250, 3, 11)),
        ("HSV", (85, 255, 255), (0, 255, 0)),
        *[(mode, 65535, (255, 255, 255)) for mode in ("I", "I;16", "I;16B", "I;16L")],
        *[(mode, 32896, (128, 128, 128)) for mode in ("I", "I;16", "I;16B", "I;16L")],
        *[(mode, 128, (0, 0, 0)) for mode in ("I", "I;16", "I;16B", "I;16L")],
        *[(mode, 129, (1, 1, 1)) for mode in ("I", "I;16", "I;16B", "I;16L")],
        ("I", 70000, (255, 255, 255)),
        ("I", -5, (0, 0, 0)),
        ("F", 0.5, (128, 128, 128)),
        ("F", 1.0, (255, 255, 255)),
        ("F", 1.25, (1, 1, 1)),
        ("F", 300.0, (255, 255, 255)),
        ("F", -1.0, (0, 0, 0)),
        ("F", math.nan, (0, 0, 0)),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")  # casting a NaN would depend on the processor
def test_modes(mode, value, rgb):
    image = Image.new(mode, (3, 2), value)
    if mode.startswith("P"):
        image.putpalette([9, 9, 9, 255, 0, 0])
    loaded = load_image(image)
    assert (loaded.mode, loaded.size) == ("RGB", (3, 2))
    slack = 1 if mode == "LAB" else 0  # colour management, not arithmetic
    assert np.abs(np.asarray(loaded, dtype=int) - rgb).max() <= slack, np.asarray(loaded)[0, 0]


def test_float_range_is_judged_by_finite_samples():
    samples = np.array([[0, 0.5, 1, np.inf, -np.inf, np.nan]], np.float32)
    assert [p[0] for p in pixels(Image.fromarray(samples))[0]] == [0, 128, 255, 255, 0, 0]


def test_single_colour_transparency():
    """PNG and GIF can mark one colour or palette entry as transparent instead of having an alpha channel."""
    white, red, blue = [255, 255, 255], [255, 0, 0], [0, 0, 255]
    rgb = Image.fromarray(np.array([[red, blue]], np.uint8))
    assert pixels(encode(rgb, transparency=(0, 0, 255))) == [[red, white]]
    palette = Image.frombytes("P", (2, 1), b"\0\1")
    palette.putpalette(red + blue)
    assert pixels(encode(palette, transparency=1)) == [[red, white]]
    assert pixels(encode(palette, "GIF", transparency=1)) == [[red, white]]
    assert pixels(encode(palette, transparency=b"\xff\x33")) == [[red, [204, 204, 255]]]  # an alpha for each entry
    assert pixels(encode(Image.frombytes("L", (2, 1), b"\7\0"), transparency=0)) == [[[7, 7, 7], white]]
    wide = Image.fromarray(np.array([[257, 300, 301]], np.uint16))
    assert pixels(encode(wide, transparency=300)) == [[[1, 1, 1], white, [1, 1, 1]]]


def test_files_with_wide_or_odd_samples(tmp_path):
    grey = np.array([[0, 128, 129, 32896, 65535]], np.uint16)
    expected = [[[v, v, v] for v in (0, 0, 1, 128, 255)]]
    assert pixels(encode(Image.fromarray(grey))) == expected
    assert pixels(encode(Image.fromarray(grey), "TIFF")) == expected
    assert pixels(encode(Image.fromarray(grey.astype(">u2")), "TIFF")) == expected
    assert pixels(encode(Image.fromarray((grey / 65535).astype(np.float32)), "TIFF")) == expected
    assert pixels(encode(Image.new("1", (2, 1), 1))) == [[[255] * 3] * 2]
    cmyk = encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    assert Image.open(io.BytesIO(cmyk)).mode == "CMYK"
    assert np.abs(np.asarray(load_image(cmyk), dtype=int) - (0, 255, 255)).max() <= 3


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation(kind, orientation):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow without WebP")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = Image.fromarray(noise(5, 3))
    stored = np.asarray(load_image(encode(image, kind)))
    data = encode(image, kind, exif=exif)
    upright = load_image(data)
    assert np.array_equal(np.asarray(upright), UPRIGHT[orientation](stored))
    assert np.array_equal(np.asarray(load_image(upright)), np.asarray(upright)), "turned twice"
    assert np.array_equal(np.asarray(load_image(Image.open(io.BytesIO(data)))), np.asarray(upright))
    assert plan_tiles(*upright.size).overview == tile_image(data).tiles[0].shape[1::-1]


def test_orientation_with_transparency():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    rgba = Image.fromarray(np.array([[[0, 0, 255, 255], [1, 2, 3, 0]]], np.uint8))
    assert pixels(encode(rgba, exif=exif)) == [[[0, 0, 255]], [[255] * 3]]


@pytest.mark.parametrize("exif", [b"rubbish", b"M", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12", b"Exif\0\0XX\0*\0\0"])
def test_damaged_metadata_does_not_matter(exif):
    array = noise(4, 2)
    image = Image.fromarray(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pixels(encode(image, exif=exif)) == array.tolist()
        assert load_image(encode(image, "JPEG", exif=exif)).size == (4, 2)
        image.info["exif"] = exif
        assert pixels(image) == array.tolist()


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_first_frame_of_an_animation(kind, options):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow without WebP")
    red, blue = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    data = encode(red, kind, save_all=True, append_images=[blue], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert pixels(data) == [[[255, 0, 0]] * 6] * 4


def test_callers_image_is_left_alone():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    images = [
        Image.fromarray(noise(3, 2)),
        Image.new("RGBA", (3, 2), (255, 0, 0, 51)),
        Image.open(io.BytesIO(encode(Image.fromarray(noise(3, 2)), exif=exif))),
        Image.open(io.BytesIO(encode(Image.new("P", (3, 2)), transparency=0))),
        Image.new("I;16", (3, 2), 300),
        Image.new("F", (3, 2), 0.5),
    ]
    for image in images:
        before = image.mode, image.size, dict(image.info), image.copy().tobytes()
        load_image(image).paste((1, 2, 3), (0, 0, 2, 2))
        assert (image.mode, image.size, dict(image.info), image.tobytes()) == before
    array = noise(3, 2)
    before = array.copy()
    load_image(array).paste((1, 2, 3), (0, 0, 2, 2))
    assert np.array_equal(array, before)


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="needs /dev/fd")
def test_files_are_closed(tmp_path):
    animation = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    whole, cut, text = tmp_path / "a.gif", tmp_path / "b.png", tmp_path / "c.png"
    whole.write_bytes(encode(animation[0], "GIF", save_all=True, append_images=animation[1:]))
    cut.write_bytes(encode(Image.fromarray(noise(40, 40)))[:2000])
    text.write_text("no image")
    gc.disable()  # a file closed only by the garbage collector is a leak
    try:
        before, kept = os.listdir("/dev/fd"), []
        for _ in range(3):
            kept.append(load_image(whole))
            for path in (cut, text, tmp_path):
                try:
                    load_image(path)
                except ImageError as e:
                    kept.append(e)
        assert len(kept) == 12
        assert os.listdir("/dev/fd") == before
    finally:
        gc.enable()


# --- unusable sources ------------------------------------------------------------------------------------------------


def refusal(source) -> str:
    """Return the error message, which must be one printable line."""
    with pytest.raises(ImageError) as caught:
        load_image(source)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 800, message
    return message


JPEG = encode(Image.fromarray(noise(64, 64)), "JPEG")
PNG = encode(Image.fromarray(noise(64, 64)))


BAD_FILES = {
    "empty.png": (b"", "is empty"),
    "text.jpg": (b"Dear diary, today I was not an image.", "not an image"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
    "paper": (b"%PDF-1.7\n", "is a PDF, not an image; pass the path of a .pdf file"),
    "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not one of JPEG, PNG"),
    "photo.jxl": (b"\xff\x0a" + bytes(50), "JPEG XL is not supported; convert it first (on a Mac: sips -s format jpeg"),
    "boxed.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL is not supported"),
    "canon": (b"II*\0\x10\0\0\0CR\2\0" + bytes(50), "camera RAW files are not supported; convert it first"),
    "canon3": (b"\0\0\0\x18ftypcrx \0\0\0\1" + bytes(50), "camera RAW files are not supported"),
    "fuji": (b"FUJIFILMCCD-RAW 0201" + bytes(50), "camera RAW files are not supported"),
    "apple": (encode(Image.new("RGB", (9, 9)), "TIFF", tiffinfo={50706: b"\1\4\0\0"}), "camera RAW files are not"),
    "nikon": (encode(Image.new("RGB", (9, 9)), "TIFF", tiffinfo={254: 1}), "camera RAW files are not supported"),
    "short.jpg": (JPEG[: len(JPEG) // 2], "damaged or truncated"),
    "short.png": (PNG[: len(PNG) // 2], "damaged or truncated"),
    "header.png": (PNG[:20], "damaged or truncated"),
    "zeros.png": (PNG[:60] + bytes(2000), "damaged or truncated"),
    "big.png": (png_header(10_000, 8_948), "over the limit of 89,478,485"),
    "bomb.png": (png_header(60_000, 60_000), "over the limit of 89,478,485"),
    "two\nlines \x1b[31m.png": (b"x", "not an image"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files(tmp_path, name):
    data, complaint = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    shown = repr(str(path))[1:-1]
    for source in (path, str(path)):
        message = refusal(source)
        assert message.startswith(f"{shown}: ") and complaint in message, message
    message = refusal(data)
    assert message.startswith("image data: ") and complaint in message, message
    message = refusal("data:image/png;base64," + base64.b64encode(data).decode())
    assert message.startswith("data URI: ") and complaint in message, message


@pytest.mark.parametrize(
    "source, start, complaint",
    [
        ("nowhere/a  b.png", "nowhere/a  b.png: ", "no such file"),
        (Path("nowhere/a.png"), "nowhere/a.png: ", "no such file"),
        ("", ".: ", "is a folder"),
        (str(Path(__file__).parent), f"{Path(__file__).parent}: ", "is a folder"),
        (f"{__file__}/a.png", f"{__file__}/a.png: ", "cannot be read (Not a directory)"),
        ("a\0b.png", r"a\x00b.png: ", "cannot be read"),
        ("x" * 300, "x" * 300 + ": ", "cannot be read (File name too long)"),
        ("iVBORw0KGgo" * 9999, "iVBORw0KGgo", "cannot be read (File name too long)"),  # base64 without its `data:`
        ("https://example.com/a.png", "https://example.com/a.png: ", "not fetched from the network"),
        ("HTTP://example.com/a.png", "HTTP://example.com/a.png: ", "not fetched from the network"),
        ("data:image/png;base64,@@@@", "data URI: ", "bad base64"),
        ("data:image/png;base64,iVBO\u00e9", "data URI: ", "bad base64"),
        ("data:image/png;base64,iVBOR", "data URI: ", "bad base64"),
        ("data:image/png;base64,", "data URI: ", "is empty"),
        ("data:image/png;base64", "data URI: ", "must have the form"),
        ("data:image/svg+xml,%3Csvg/%3E", "data URI: ", "must have the form"),
        (np.zeros((0, 5, 3), np.uint8), "array: ", "(0, 5, 3)"),
        (np.zeros((5, 5), np.uint8), "array: ", "(5, 5)"),
        (np.zeros((5, 5, 4), np.uint8), "array: ", "(5, 5, 4)"),
        (np.zeros((1, 5, 5, 3), np.uint8), "array: ", "(1, 5, 5, 3)"),
        (np.zeros((5, 5, 3), np.float32), "array: ", "float32"),
        (np.zeros((5, 5, 3), np.int64), "array: ", "int64"),
        (Image.new("RGB", (0, 5)), "image: ", "no pixels (0x5)"),
        (Image.new("RGBA", (5, 0)), "image: ", "no pixels (5x0)"),
        (Image.open(io.BytesIO(PNG[:2000])), "image: ", "damaged or truncated"),
    ],
    ids=lambda value: f"{value!r}"[:40],
)
def test_bad_sources(source, start, complaint):
    message = refusal(source)
    assert message.startswith(start) and complaint in message, message


def test_jpeg_of_many_scans():
    """Each is a pass over all pixels for a few bytes: 120 kB of them took a minute. Only those of the image count."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    jpeg = file.getvalue()
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="over 100 scans"):
        load_image(jpeg[:-2] + last * 100 + jpeg[-2:])
    thumbnails = jpeg[:2] + b"\xff\xe1\xff\xff" + b"\xff\xda" * 32766 + b"\0" + jpeg[2:]
    for harmless in (jpeg[:-2] + last * 80 + jpeg[-2:], thumbnails, jpeg + last * 1000):
        assert load_image(harmless).size == (64, 64)


@pytest.mark.parametrize("kind", ["PNG", "PNG at its end", "PPM", "JPEG", "GIF"])
def test_header_of_many_parts(kind):
    """Pillow takes them one by one: 23 MB of them took 15 s, with Python's lock held."""
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, kind.split()[0])
    data, count = file.getvalue(), 30_000
    start = {"PNG": 33, "PNG at its end": -12, "PPM": 2, "JPEG": 2, "GIF": data.index(b"\x2c") if kind == "GIF" else 0}
    chunk = b"\0\0\0\0prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    part = {"PPM": b"\n", "JPEG": b"\xff\xe5\0\2", "GIF": b"\x21\xfe\1a\0"}.get(kind, chunk)
    for parts, fits in ((count, False), (2000, True)):
        changed = data[: start[kind]] + part * parts + data[start[kind] :]
        if fits:
            assert load_image(changed).size == (64, 64)
        else:
            assert "too many parts" in refusal(changed)


def test_pixel_limit_is_pillows(monkeypatch):
    """Pillow itself only warns up to twice its limit, and does not check arrays or open images."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for size, fits in {(10, 10): True, (101, 1): False, (20, 10): False, (67, 3): False}.items():
        array = noise(*size)
        image = Image.fromarray(array)
        data = encode(image)
        for action in ("ignore", "error"):
            with warnings.catch_warnings():
                warnings.simplefilter(action)
                for source in (array, image, data):
                    if fits:
                        assert load_image(source).size == size
                    else:
                        assert "over the limit of 100" in refusal(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(noise(101, 1)).size == (101, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"])
def test_damage_is_an_image_or_an_image_error(kind, monkeypatch):
    """Decoders fail in different ways; a batch run must survive all of them."""
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow without WebP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    options = {} if kind in ("GIF", "BMP") else {"exif": exif}
    whole = encode(Image.fromarray(noise(24, 16)), kind, **options)
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for at in rng.integers(0, min(len(data), 200), rng.integers(1, 6)):
            data[at] = rng.integers(0, 256)
        if rng.random() < 0.5:
            del data[rng.integers(0, len(data)) :]
        try:
            assert load_image(bytes(data)).mode == "RGB"
        except ImageError as e:
            assert str(e).isprintable()
            refused += 1
    assert refused > 0

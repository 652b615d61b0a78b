"""Files that users have: HEIC photos, PDFs, Photos libraries, and names in either Unicode form."""

import base64
import contextlib
import io
import json
import os
import shutil
import sys
import tarfile
import threading
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import UPRIGHT, unicode_names
from PIL import EpsImagePlugin, ExifTags, Image

from llama3v_mlx import stream_generate
from llama3v_mlx.demo import CHECKPOINT, IMAGES
from llama3v_mlx.features.sources import Skipped, count_sources, find_sources, read_named
from llama3v_mlx.features.store import FeatureStore
from llama3v_mlx.files import find_path, list_folder, new_folder
from llama3v_mlx.image import ImageError, expand, image_sha256, image_size, load_image, tile_image
from llama3v_mlx.pdf import PdfError, find_pages
from llama3v_mlx.tiling import ImageConfig, plan_tiles

CIRCLES = IMAGES / "three-blue-circles.png"


@pytest.fixture
def heif():
    """pillow-heif, from the `heif` extra."""
    return pytest.importorskip("pillow_heif")


@pytest.fixture
def pdf(tmp_path: Path) -> Path:
    """PDF of four pages of 200 × 300 points, each of one grey."""
    pytest.importorskip("pypdfium2")
    pages = [Image.new("L", (200, 300), 50 * i) for i in range(1, 5)]
    pages[0].save(tmp_path / "paper.pdf", save_all=True, append_images=pages[1:])
    return tmp_path / "paper.pdf"


def blocks() -> Image.Image:
    """Draw six flat colours in two rows of three: kept by lossy compression, but changed by any rotation."""
    colours = [[(200, 30, 30), (30, 200, 30), (30, 30, 200)], [(220, 220, 30), (30, 220, 220), (220, 30, 220)]]
    return Image.fromarray(np.kron(np.array(colours, np.uint8), np.ones((32, 32, 1), np.uint8)))


def difference(image: Image.Image, expected: np.ndarray) -> float:
    """Mean absolute difference, in 0…255."""
    assert image.size == expected.shape[1::-1]
    return float(np.abs(np.asarray(image, int) - expected).mean())


def write_pdf(
    pages: int, trailer: str = "", page: str = "/MediaBox [0 0 200 300]", catalog: str = "", more: Sequence[str] = ()
) -> bytes:
    """Write a PDF of empty pages by hand; `more` are its objects from number 3 + pages on."""
    kids = " ".join(f"{3 + i} 0 R" for i in range(pages))
    objects = [f"<< /Type /Catalog /Pages 2 0 R {catalog} >>", f"<< /Type /Pages /Kids [{kids}] /Count {pages} >>"]
    objects += [f"<< /Type /Page /Parent 2 0 R {page} >>"] * pages + [*more]
    data, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{text}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    end += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + end.encode()


# --- HEIC ------------------------------------------------------------------------------------------------------------


def encode_heif(image: Image.Image, **options) -> bytes:
    import pillow_heif

    pillow_heif.register_heif_opener()
    file = io.BytesIO()
    image.save(file, "HEIF", quality=95, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_heic_is_turned_once(heif, orientation: int) -> None:
    """libheif applies the file's rotation itself, but the EXIF data may still have it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    loaded = load_image(encode_heif(blocks(), exif=exif.tobytes()))  # bytes also set the file's own rotation
    assert difference(loaded, UPRIGHT[orientation](np.asarray(blocks()))) < 3
    assert load_image(loaded).size == loaded.size


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_avif_is_turned_once(orientation: int) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    blocks().save(file, "AVIF", exif=exif)
    assert difference(load_image(file.getvalue()), UPRIGHT[orientation](np.asarray(blocks()))) < 3


def test_heic_with_alpha_of_ten_bits_and_of_several_images(heif) -> None:
    clear = blocks().convert("RGBA")
    clear.putalpha(0)
    assert difference(load_image(encode_heif(clear)), np.full((64, 96, 3), 255)) < 1
    grey = load_image(encode_heif(blocks().convert("L")))
    assert difference(grey, np.asarray(blocks().convert("L").convert("RGB"))) < 3

    wide = (np.asarray(blocks(), np.uint16) * 257).tobytes()
    for mode, data in (("RGB;16", wide), ("I;16", np.asarray(blocks().convert("L"), np.uint16) * 257)):
        file = io.BytesIO()
        data = data if isinstance(data, bytes) else data.tobytes()
        heif.from_bytes(mode=mode, size=(96, 64), data=data).save(file, quality=95)
        assert heif.open_heif(io.BytesIO(file.getvalue()), convert_hdr_to_8bit=False).info["bit_depth"] == 10
        expected = blocks() if mode == "RGB;16" else blocks().convert("L").convert("RGB")
        assert difference(load_image(file.getvalue()), np.asarray(expected)) < 3

    small = Image.new("RGB", (40, 30), "red")
    several = encode_heif(blocks(), save_all=True, append_images=[small], primary_index=1)
    assert load_image(several).size == (40, 30)


def test_heic_by_its_other_brand(heif) -> None:
    """`mif1` is also a brand of AVIF, whose decoder is tried first."""
    data = encode_heif(blocks())
    assert data[8:12] == b"heic"
    assert load_image(data[:8] + b"mif1" + data[12:]).size == (96, 64)


def test_heic_everywhere(heif, tmp_path: Path, run_main, siglip: Path) -> None:
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(encode_heif(Image.open(CIRCLES).convert("RGB")))
    done = run_main("llama3v_mlx.generate", "--image", path, "--temp", "0", "--no-verbose")
    assert done.stdout == "Three blue circles on a white background.\n"
    (tmp_path / "twin.heif").write_bytes(path.read_bytes())
    store = tmp_path / "store"
    done = run_main("llama3v_mlx.embed", tmp_path, "--out", store, "--model", siglip, "--batch-size", 2, "--json")
    assert (json.loads(done.stdout)["new"], json.loads(done.stdout)["known"]) == (1, 1), done.stderr
    done = run_main("llama3v_mlx.search", store, "--image", path, "--json", "--sheet", tmp_path / "sheet.png")
    assert json.loads(done.stdout)["hits"][0]["cosine"] > 0.999
    done = run_main("llama3v_mlx.chat", "--temp", "0", "--image", path, input="What is this image?\n")
    assert "Three blue circles" in done.stdout


def test_heic_as_a_client_of_the_server_sends_it(heif) -> None:
    uri = f"data:image/heic;base64,{base64.b64encode(encode_heif(blocks())).decode()}"
    assert difference(load_image(uri), np.asarray(blocks())) < 3


def test_heic_without_its_extra(heif, tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.heic"
    path.write_bytes(encode_heif(blocks()))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    done = run_main("llama3v_mlx.generate", "--image", path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"error: {path}: HEIC and HEIF need pillow-heif: pip install pillow-heif (the heif extra)" in done.stderr
    assert "sips -s format jpeg" in done.stderr


def test_damaged_heic_is_an_image_or_an_image_error(heif) -> None:
    whole, refused = encode_heif(blocks()), 0
    rng = np.random.default_rng(3)
    for _ in range(100):
        data = bytearray(whole)
        for at in rng.integers(12, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(0, 256)
        del data[int(rng.integers(13, 2 * len(data))) :]
        try:
            assert load_image(bytes(data)).mode == "RGB"
        except ImageError as e:
            assert str(e).isprintable()
            refused += 1
    assert refused > 0


def test_raw_files_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "DSC_1.NEF").write_bytes(b"whatever is in it")
    with pytest.raises(ImageError, match="camera RAW files are not supported; convert it first .on a Mac: sips"):
        load_image(tmp_path / "DSC_1.NEF")


def test_formats_that_start_other_programs_stay_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even their headers are parsed."""
    monkeypatch.setattr(EpsImagePlugin.EpsImageFile, "_open", lambda _: pytest.fail("the file was opened"))
    file = io.BytesIO()
    blocks().save(file, "EPS")
    for source in (file.getvalue(), f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"):
        with pytest.raises(ImageError, match="not an image"):
            load_image(source)


# --- PDF -------------------------------------------------------------------------------------------------------------


def numbers(source: str) -> list[int]:
    return [page.number for page in expand(source)]


def test_pages_of_a_pdf(pdf: Path) -> None:
    for selection, expected in {
        "": [1, 2, 3, 4],
        "#3": [3],
        "#2-3": [2, 3],
        "#2-": [2, 3, 4],
        "#1,3-4": [1, 3, 4],
        "#4, 1": [4, 1],
    }.items():
        assert numbers(f"{pdf}{selection}") == expected
    assert expand(pdf)[2].size == (200, 300) and str(expand(pdf)[2]) == f"{pdf}#3"
    for number in (1, 4):
        image = load_image(f"{pdf}#{number}")
        assert np.abs(np.asarray(image, int) - 50 * number).max() <= 2
    assert expand(CIRCLES) == [CIRCLES] and expand(b"x") == [b"x"]


def test_a_file_named_with_a_mark_wins(pdf: Path) -> None:
    shutil.copy(pdf, pdf.with_name("paper.pdf#3.pdf"))
    assert numbers(f"{pdf}#3.pdf") == [1, 2, 3, 4]
    blocks().save(pdf.with_name("paper.pdf#2"), "PNG")
    assert expand(f"{pdf}#2") == [f"{pdf}#2"] and load_image(f"{pdf}#2").size == (96, 64)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("#5", "has 4 pages, but no page 5"),
        ("#0", "pages are counted from 1"),
        ("#3-9", "has 4 pages, but no page 9"),
        ("#3-2", "pages are counted from 1, and ranges must ascend"),
        ("#", "not a page selection like"),
        ("#a", "not a page selection like"),
        ("#1,", "not a page selection like"),
        ("#-2", "not a page selection like"),
        ("#²", "not a page selection like"),
        ("", "has 4 pages, but only one image can be used; select one: "),
        ("#2-3", "has 2 pages, but only one image can be used"),
    ],
)
def test_pages_that_are_not_there(pdf: Path, selection: str, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(f"{pdf}{selection}")
    assert str(caught.value).startswith(f"{pdf}{selection}: ") and message in str(caught.value)


HEX = "00" * 32
BAD_PDFS = {
    "broken": (b"%PDF-1.7\nand no more", "not a PDF, damaged, or without pages"),
    "empty": (b"", "not a PDF, damaged, or without pages"),
    "text": (b"hello", "not a PDF, damaged, or without pages"),
    "cut": (write_pdf(3)[:150], "not a PDF, damaged, or without pages"),
    "no pages": (write_pdf(0), "not a PDF, damaged, or without pages"),
    "password": (
        write_pdf(1, f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{HEX}> /U <{HEX}> /P -4 >> /ID [<00> <00>]"),
        "is password-protected; save a copy without a password",
    ),
    "certificate": (
        write_pdf(1, "/Encrypt << /Filter /Entrust.PPKEF /V 9 >> /ID [<00> <00>]"),
        "uses an unsupported encryption; save a copy without a password",
    ),
}


@pytest.mark.parametrize("name", BAD_PDFS)
def test_bad_pdfs_are_one_line(tmp_path: Path, run_main, name: str) -> None:
    pytest.importorskip("pypdfium2")
    data, message = BAD_PDFS[name]
    path = tmp_path / "bad.pdf"
    path.write_bytes(data)
    for selection in ("", "#1"):
        done = run_main("llama3v_mlx.generate", "--image", f"{path}{selection}")
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {path}: {message}\n")


def test_reason_of_a_bad_pdf_is_its_own(tmp_path: Path) -> None:
    """PDFium keeps the error of an earlier document."""
    pytest.importorskip("pypdfium2")
    for name in ("certificate", "no pages", "password", "no pages"):
        data, message = BAD_PDFS[name]
        (tmp_path / f"{name}.pdf").write_bytes(data)
        with pytest.raises(PdfError, match=message):
            find_pages(tmp_path / f"{name}.pdf")


def test_pdf_without_its_extra(tmp_path: Path, run_main, siglip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.pdf").write_bytes(write_pdf(1))
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    done = run_main("llama3v_mlx.generate", "--image", folder / "a.pdf")
    assert done.stderr == f"error: {folder}/a.pdf: PDF files need pypdfium2: pip install pypdfium2 (the pdf extra)\n"
    blocks().save(folder / "b.png")
    done = run_main("llama3v_mlx.embed", folder, "--out", tmp_path / "store", "--model", siglip, "--batch-size", 2)
    assert done.returncode == 0
    assert "skipped: 1 .pdf; PDF files need pypdfium2: pip install pypdfium2 (the pdf extra)" in done.stdout


@pytest.mark.parametrize(
    "config", [ImageConfig(), ImageConfig(56, 8, 4), ImageConfig(448, 14, 1), ImageConfig(384, 14, 1, True)]
)
@pytest.mark.parametrize("size", [(595, 842), (792, 612), (200, 200), (100, 1000), (30, 2)])
def test_a_page_fills_its_tiles(tmp_path: Path, config: ImageConfig, size: tuple[int, int]) -> None:
    """The tiles show all or nearly all rendered pixels, and nothing is upscaled."""
    pytest.importorskip("pypdfium2")
    path = tmp_path / "a.pdf"
    path.write_bytes(write_pdf(1, page=f"/MediaBox [0 0 {size[0]} {size[1]}]"))
    width, height = image_size(path, config)
    assert load_image(path, config=config).size == (width, height)
    tiling = plan_tiles(width, height, config)
    shown = tiling.overview
    if tiling.grid:
        shown = tiling.grid[0] * tiling.cell[0], tiling.grid[1] * tiling.cell[1]
        assert tiling.num_tiles > config.max_slice_nums * 0.7
    most = config.scale_resolution**2 * (1 if config.square else config.max_slice_nums)
    assert width * height <= 4.2 * most
    if max(size) / min(size) < 2:
        assert shown[0] <= width + 1 and shown[1] <= height + 1
        assert width * height <= (2.2 if config.square else 1.35) * shown[0] * shown[1]
    assert len(tile_image(path, config).tiles) == tiling.num_tiles


def test_a_turned_page_is_upright(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    (tmp_path / "a.pdf").write_bytes(write_pdf(1, page="/MediaBox [0 0 200 300] /Rotate 90"))
    width, height = load_image(tmp_path / "a.pdf").size
    assert width > 1.4 * height


def test_what_is_filled_into_a_form_is_seen(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2")
    drawing = "1 0 0 rg 0 0 100 150 re f"
    field = "<< /Type /Annot /Subtype /Widget /FT /Tx /T (a) /V (x) /Rect [50 50 150 200] /F 4 /AP << /N 5 0 R >> >>"
    look = (
        f"<< /Type /XObject /Subtype /Form /BBox [0 0 100 150] /Length {len(drawing)} >>\nstream\n{drawing}\nendstream"
    )
    page = "/MediaBox [0 0 200 300] /Annots [4 0 R]"
    form = "/AcroForm << /Fields [4 0 R] >>"
    (tmp_path / "form.pdf").write_bytes(write_pdf(1, page=page, catalog=form, more=(field, look)))
    seen = (np.asarray(load_image(tmp_path / "form.pdf")) == (255, 0, 0)).all(axis=2).mean()
    assert 0.2 < seen < 0.3


def test_identity_of_pages(pdf: Path) -> None:
    """The SHA-256 depends on the file's bytes, the page and the size, but not on the name."""
    config, other = ImageConfig(), ImageConfig(56, 8, 4)
    found = {image_sha256(page, c) for page in expand(pdf) for c in (config, other)}
    assert len(found) == 8
    copy = Path(shutil.copy(pdf, pdf.with_name("copy.pdf")))
    assert image_sha256(f"{copy}#2", config) == image_sha256(expand(pdf)[1], config) in found
    with pdf.open("ab") as file:
        file.write(b"\n")
    assert image_sha256(f"{pdf}#2", config) not in found


def test_pages_in_generate_and_chat(demo, tmp_path: Path, run_main) -> None:
    pytest.importorskip("pypdfium2")
    path = tmp_path / "pictures.pdf"
    images = [Image.open(IMAGES / f"{name}.jpg").convert("RGB") for name in ("two-red-stars", "one-purple-cross")]
    images[0].save(path, save_all=True, append_images=images[1:], quality=95)
    for number, expected in ((1, "Two red stars"), (2, "One purple cross")):
        args = ("--image", f"{path}#{number}", "--temp", "0", "--features", tmp_path / "store")
        for count in (0, 1):
            done = run_main("llama3v_mlx.generate", *args, "--json")
            figures = json.loads(done.stdout)
            assert expected in figures["text"] and figures["stored_images"] == count
            assert figures["images"] == [f"{path}#{number}"]
    done = run_main("llama3v_mlx.generate", "--image", path, "--temp", "0", "--json")
    assert json.loads(done.stdout)["images"] == [f"{path}#1", f"{path}#2"]
    asked = [response.prompt_tokens for response in stream_generate(*demo, "What?", path, max_tokens=1)]
    assert asked == [response.prompt_tokens for response in stream_generate(*demo, "What?", images, max_tokens=1)]
    done = run_main("llama3v_mlx.chat", "--temp", "0", input=f"{path}#2 What is this image?\n/images\n")
    assert "One purple cross" in done.stdout and f"1. {path}#2" in done.stdout


def test_too_many_pages_are_refused_before_any_is_rendered(tmp_path: Path, run_main, monkeypatch) -> None:
    pdfium = pytest.importorskip("pypdfium2")
    path = tmp_path / "long.pdf"
    path.write_bytes(write_pdf(60))
    monkeypatch.setattr(pdfium.PdfPage, "render", lambda *_, **__: pytest.fail("a page was rendered"))
    done = run_main("llama3v_mlx.generate", "--image", path)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert "60 pages" in error and "2048" in error and "#1-" in error and "--max-image-tiles" in error, error
    done = run_main("llama3v_mlx.chat", input=f"{path}\n")
    assert done.returncode == 1 and "60 pages" in done.stderr and "#1-" in done.stderr


def test_embed_takes_a_page_each(pdf: Path, tmp_path: Path, run_main, siglip: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.move(pdf, tmp_path / "docs")
    (tmp_path / "docs" / "bad.pdf").write_bytes(b"%PDF-")
    args = (tmp_path / "docs", "--out", tmp_path / "store", "--model", siglip, "--batch-size", 2, "--json")
    done = run_main("llama3v_mlx.embed", *args)
    figures = json.loads(done.stdout)
    assert (done.returncode, figures["new"], figures["failed"]) == (1, 4, 1)
    assert done.stderr.splitlines()[-1].endswith("docs/bad.pdf: not a PDF, damaged, or without pages")
    names = sorted(name for _, name in FeatureStore(tmp_path / "store").names())
    assert names == [f"{tmp_path}/docs/paper.pdf#{i}" for i in range(1, 5)]
    assert json.loads(run_main("llama3v_mlx.embed", *args).stdout)["known"] == 4
    assert count_sources([str(tmp_path / "docs")]) == 5
    done = run_main("llama3v_mlx.search", tmp_path / "store", "--image", names[2], "--json", "--top", 1)
    assert json.loads(done.stdout)["hits"][0]["path"] == names[2]
    assert load_image(read_named(names[2])).size == load_image(names[2]).size


def test_threads_render_one_at_a_time(pdf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PDFium must not be entered by two threads: each page waits in vain for a second thread to enter."""
    import pypdfium2

    pages, config = expand(pdf) * 3, ImageConfig(56, 8, 4)
    together, render, met = threading.Barrier(2), pypdfium2.PdfPage.render, []

    def render_when_two_are_in(page, **options):
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.3)
            met.append(page)
        return render(page, **options)

    monkeypatch.setattr(pypdfium2.PdfPage, "render", render_when_two_are_in)
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda page: load_image(page, config=config), pages))
    assert [round(np.asarray(image).mean() / 50) for image in images] == [1, 2, 3, 4] * 3
    assert met == []


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Folder like one on a Mac."""
    folder = tmp_path / "Pictures"
    library = folder / "Photos Library.photoslibrary"
    for name in ("originals/0", "resources/derivatives"):
        (library / name).mkdir(parents=True)
    for i, path in enumerate(
        (folder / "a.png", library / "originals/0/B.png", library / "resources/derivatives/b.png")
    ):
        Image.new("RGB", (40, 40 + i), "red").save(path)
    for name in (".DS_Store", "._a.png", "film.MOV", "clip.mov", "raw.dng", "README", ".a.HEIC.icloud"):
        (folder / name).write_bytes(b"no image")
    return folder


def names_in(*paths: Path, skipped: Skipped | None = None) -> list[str]:
    return [Path(source.name).name for source in find_sources([*map(str, paths)], skipped)]


def test_what_is_skipped_is_counted(home: Path) -> None:
    skipped = Skipped()
    (home / ".a.png").touch()
    assert names_in(home, skipped=skipped) == ["a.png"]
    assert skipped.suffixes == {".mov": 2, ".dng": 1, "no suffix": 1, "hidden": 1, ".icloud": 1, ".photoslibrary": 1}
    assert "2 .mov" in str(skipped) and "pass a .photoslibrary to use its originals" in str(skipped)


def test_a_library_that_is_named_gives_its_originals(home: Path) -> None:
    library = home / "Photos Library.photoslibrary"
    assert names_in(library) == ["B.png"]
    (library / "originals").rename(library / "Masters")
    assert names_in(library) == ["B.png"]
    assert names_in(library / "resources") == ["b.png"]


def test_embed_says_what_it_skipped(home: Path, tmp_path: Path, run_main, siglip: Path) -> None:
    args = ("--out", tmp_path / "store", "--model", siglip, "--batch-size", 2)
    done = run_main("llama3v_mlx.embed", home, *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("skipped: 2 .mov, ")
    done = run_main("llama3v_mlx.embed", home, *args, "--json")
    assert json.loads(done.stdout)["skipped"][".dng"] == 1
    (home / "a.png").unlink()
    done = run_main("llama3v_mlx.embed", home, *args)
    assert done.returncode == 1 and "no images found; skipped: 2 .mov" in done.stderr


def test_denied_folders_are_named(home: Path, tmp_path: Path, run_main, siglip: Path, monkeypatch) -> None:
    (home / "private").mkdir()
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("private"):
            raise PermissionError(1, "Operation not permitted", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    args = ("--out", tmp_path / "store", "--model", siglip, "--batch-size", 2)
    done = run_main("llama3v_mlx.embed", home, *args)
    assert done.returncode == 1
    assert f"failed: {home}/private: the folder cannot be listed (Operation not permitted; " in done.stderr
    assert len(FeatureStore(tmp_path / "store")) == 1
    done = run_main("llama3v_mlx.embed", home / "private", *args)
    assert done.returncode == 1 and "cannot be listed" in done.stderr


def test_what_a_mac_leaves_in_an_archive_or_a_list(home: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(home, "Pictures")
    skipped = Skipped()
    assert names_in(tmp_path / "a.tar", skipped=skipped) == ["B.png", "b.png", "a.png"] or skipped
    assert sorted(names_in(tmp_path / "a.tar")) == ["B.png", "a.png", "b.png"]
    assert count_sources([str(tmp_path / "a.tar")]) == 3
    (tmp_path / "list.txt").write_text("Pictures/._a.png\nPictures/a.png\n")
    assert names_in(tmp_path / "list.txt") == ["a.png"]


def test_what_a_mac_leaves_is_no_shard_and_nobodys_file(folder: Path, tmp_path: Path, siglip: Path, run_main) -> None:
    """Finder may leave files in checkpoints, stores, runs and unfinished folders."""
    from llama3v_mlx.checkpoint import find_checkpoint, read_config
    from llama3v_mlx.features.repair import verify
    from llama3v_mlx.loading import load_model
    from llama3v_mlx.training.run import RunFolder

    def litter(path: Path, *names: str) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        for name in (".DS_Store", *(f"._{name}" for name in names)):
            (path / name).write_bytes(b"\0\5\x16\7")
        return path

    (folder / "model.safetensors.index.json").unlink()
    litter(folder, "model-00001-of-00001.safetensors", "config.json")
    load_model(find_checkpoint(folder), read_config(folder))
    done = run_main(
        "llama3v_mlx.embed", CIRCLES, "--out", litter(tmp_path / "store", "a"), "--model", siglip, "--batch-size", 2
    )
    assert done.returncode == 0, done.stderr
    litter(tmp_path / "store", "store.db", "writer-000.lock", "x-9z", "shard-000-00000.safetensors")
    assert verify(tmp_path / "store").good == 1 and len(FeatureStore(tmp_path / "store")) == 1
    RunFolder(litter(tmp_path / "run", "b"), {}, resume=False, writes=True)
    litter(tmp_path / "new.partial", "c")
    with new_folder(tmp_path / "new", 1) as partial:
        (partial / "made").touch()
    assert [path.name for path in list_folder(tmp_path / "new")] == ["made"]


# --- names -----------------------------------------------------------------------------------------------------------

NFC = "Caf\u00e9 \uac00"
NFD = unicodedata.normalize("NFD", NFC)


@unicode_names
@pytest.mark.parametrize(("stored", "asked"), [(NFC, NFD), (NFD, NFC)])
def test_names_in_either_form_find_the_file(tmp_path: Path, run_main, siglip: Path, stored: str, asked: str) -> None:
    (tmp_path / stored).mkdir()
    file, path = tmp_path / stored / f"{stored}.png", tmp_path / asked / f"{asked}.png"
    shutil.copy(CIRCLES, file)
    if path.exists():
        pytest.skip("the file system treats both forms as equal")
    assert find_path(path) == find_path(tmp_path / stored / f"{asked}.png") == find_path(file) == file
    done = run_main("llama3v_mlx.generate", "--image", path, "--temp", "0", "--no-verbose")
    assert "Three blue circles" in done.stdout, done.stderr

    (tmp_path / "list.txt").write_text(f"{path}\n", encoding="utf-8")
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": str(path)}), encoding="utf-8")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(file, f"{stored}.png")
    for source in (path, tmp_path / "list.txt", tmp_path / "list.jsonl"):
        (found,) = find_sources([str(source)])
        assert found.read() == file.read_bytes()
    assert read_named(f"{tmp_path}/a.tar/{asked}.png") == file.read_bytes()

    args = ("--out", tmp_path / "store", "--model", siglip, "--batch-size", 2)
    assert run_main("llama3v_mlx.embed", path, *args).returncode == 0
    done = run_main("llama3v_mlx.search", tmp_path / "store", "--image", path, "--json")
    assert json.loads(done.stdout)["hits"][0]["cosine"] > 0.999


@unicode_names
@pytest.mark.parametrize(("stored", "asked"), [(NFC, NFD), (NFD, NFC)])
def test_rows_of_either_form_are_trained_on(tmp_path: Path, run_main, stored: str, asked: str) -> None:
    shutil.copy(CIRCLES, tmp_path / f"{stored}.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Circles."}]
    rows = [{"image": f"{asked}.png", "conversations": turns}] * 2
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    args = ("--stage", "pretrain", "--model", CHECKPOINT, "--data", tmp_path / "rows.json", "--image-folder", tmp_path)
    args += ("--features", tmp_path / "store", "--batch-size", 2, "--iters", 1, "--strict")
    done = run_main("llama3v_mlx.train", *args, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    (tmp_path / f"{stored}.png").unlink()  # now the store is enough, in either form of the name
    rows[0] = rows[0] | {"image": f"{stored}.png"}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    done = run_main("llama3v_mlx.train", *args, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr


@unicode_names
def test_a_narrow_space_that_was_folded(tmp_path: Path) -> None:
    file = tmp_path / "Screenshot 2026-11-21 at 10.00.00\u202fAM.png"
    blocks().save(file)
    assert find_path(str(file).replace("\u202f", " ")) == file
    assert find_path(tmp_path / "none AM.png") == tmp_path / "none AM.png"
    assert load_image(str(file).replace("\u202f", " ")).size == (96, 64)

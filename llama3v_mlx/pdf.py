"""Pages of PDF files as images, rendered by PDFium (pypdfium2, the `pdf` extra)."""

import functools
import hashlib
import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .files import find_path
from .tiling import ImageConfig, plan_tiles

PDF = ".pdf"
# PDFium is not thread-safe, not even across different documents.
_PDFIUM = threading.Lock()


class PdfError(ValueError):
    """Raised for an unusable PDF; the message says which one and why, in one line."""


@dataclass(frozen=True)
class PdfFile:
    """PDF file and its page sizes in points (1/72 inch), after rotation."""

    path: Path
    name: str  # path as passed by the user
    sizes: tuple[tuple[float, float], ...]

    @functools.cached_property
    def sha256(self) -> bytes:
        """SHA-256 of the file's bytes."""
        return hashlib.sha256(self.path.read_bytes()).digest()


@dataclass(frozen=True)
class PdfPage:
    """Page of a PDF file; `str(page)` is its name, like paper.pdf#3."""

    file: PdfFile
    number: int  # counted from 1

    def __str__(self) -> str:
        return f"{self.file.name}#{self.number}"

    @property
    def size(self) -> tuple[float, float]:
        """Size (width, height) in points."""
        return self.file.sizes[self.number - 1]

    def zoom(self, config: ImageConfig) -> float:
        """Return the pixels per point at which the page fills its tiles, with hardly any pixels to spare."""
        width, height = self.size
        most = config.scale_resolution**2 * (1 if config.square else config.max_slice_nums)
        zoom = math.sqrt(most / (width * height))
        tiling = plan_tiles(*self._pixels(zoom), config)
        shown = tiling.overview
        if tiling.grid:
            shown = tiling.grid[0] * tiling.cell[0], tiling.grid[1] * tiling.cell[1]
        # Avoid upscaling either side; but do not render millions of pixels for a strip squeezed into a square.
        return min(max(shown[0] / width, shown[1] / height), 2 * zoom)

    def pixels(self, config: ImageConfig) -> tuple[int, int]:
        """Return the (width, height) in pixels of the page as rendered for these tiles."""
        return self._pixels(self.zoom(config))

    def _pixels(self, zoom: float) -> tuple[int, int]:
        return math.ceil(self.size[0] * zoom), math.ceil(self.size[1] * zoom)

    def sha256(self, config: ImageConfig) -> bytes:
        """Hash the file's SHA-256, the page number and the rendered size with SHA-256."""
        width, height = self.pixels(config)
        return hashlib.sha256(self.file.sha256 + f"page {self.number} {width}x{height}".encode()).digest()

    def render(self, config: ImageConfig) -> Image.Image:
        """Render the page on white, in RGB, in the size that fills its tiles.

        Raises:
            PdfError: if the file is missing or damaged.
        """
        with _opened(self.file.path, str(self)) as document:
            document.init_forms()  # else the contents of form fields are not drawn
            page = document[self.number - 1]
            bitmap = page.render(scale=self.zoom(config))
            image = bitmap.to_pil()
            bitmap.close()  # while PDFium is locked, instead of in the garbage collector
            page.close()
        return image


def find_pages(source: str | os.PathLike) -> list[PdfPage] | None:
    """Return the pages a path selects: all for paper.pdf, some for paper.pdf#3-5; None if it is not a PDF file.

    A file whose own name contains the # takes precedence.

    Raises:
        PdfError: if there is no such page, or the file is unusable.
    """
    name, selection = os.fspath(source), None
    if PDF not in name.lower():
        return None
    if not os.path.isfile(find_path(name)):
        name, _, selection = name.rpartition("#")
    path = find_path(name)
    if path.suffix.lower() != PDF or not os.path.isfile(path):
        return None
    with _opened(path, name) as document:
        sizes = tuple(document.get_page_size(i) for i in range(len(document)))
    file = PdfFile(path, name, sizes)
    return [PdfPage(file, number) for number in _select(selection, name, len(sizes))]


def can_read_pdf() -> bool:
    """Return True if pypdfium2 is installed."""
    try:
        import pypdfium2  # noqa: F401
    except ImportError:
        return False
    return True


def _select(selection: str | None, name: str, count: int) -> list[int]:
    """Return the page numbers of a selection such as 3, 3-5, 2- or 1,4-6; all for None."""
    if selection is None:
        return list(range(1, count + 1))
    numbers = []
    for part in selection.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:(-)\s*([0-9]*)\s*)?", part)
        if match is None:
            raise PdfError(f"{name}#{selection}: not a page selection like {name}#3, #3-5, #2- or #1,4-6")
        first = int(match[1])
        last = (int(match[3]) if match[3] else count) if match[2] else first
        if wrong := next((number for number in (first, last) if not 1 <= number <= count), None):
            raise PdfError(f"{name}#{selection}: has {count} pages, but no page {wrong}")
        if first < 1 or last < first:
            raise PdfError(f"{name}#{selection}: pages are counted from 1, and ranges must ascend")
        numbers += range(first, last + 1)
    return numbers


@contextmanager
def _opened(path: Path, name: str) -> Iterator:
    """Open a pypdfium2 document with PDFium locked; raise its errors as PdfError."""
    try:
        import pypdfium2
    except ImportError:
        raise PdfError(f"{name}: PDF files need pypdfium2: pip install pypdfium2 (the pdf extra)") from None
    with _PDFIUM:
        # A document without pages is refused with PDFium's last error, which nothing resets: make it a format error.
        pypdfium2.raw.FPDF_LoadMemDocument64(b"", 0, None)
        try:
            with pypdfium2.PdfDocument(path) as document:
                yield document
        except pypdfium2.PdfiumError as e:
            codes = pypdfium2.raw
            reasons = {
                codes.FPDF_ERR_PASSWORD: "is password-protected; save a copy without a password",
                codes.FPDF_ERR_SECURITY: "uses an unsupported encryption; save a copy without a password",
            }
            raise PdfError(f"{name}: {reasons.get(e.err_code, 'not a PDF, damaged, or without pages')}") from e
        except OSError as e:
            raise PdfError(f"{name}: cannot be read ({e.strerror})") from e

"""The pages of PDF files as images, rendered by PDFium (pypdfium2, the `pdf` extra)."""

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

PDF = ".pdf"
# PDFium is not thread-safe: no two threads may be in it at once, not even with different documents.
_PDFIUM = threading.Lock()


class PdfError(ValueError):
    """A PDF that cannot be used; the message says which and why in one line."""


@dataclass(frozen=True)
class PdfFile:
    """A PDF file and the sizes of its pages, in points (1/72 inch), rotation applied."""

    path: Path
    name: str  # as it was given
    sizes: tuple[tuple[float, float], ...]

    @functools.cached_property
    def sha256(self) -> bytes:
        return hashlib.sha256(self.path.read_bytes()).digest()


@dataclass(frozen=True)
class PdfPage:
    """A page of a PDF file; `str(page)` names it, as in paper.pdf#3."""

    file: PdfFile
    number: int  # from 1

    def __str__(self) -> str:
        return f"{self.file.name}#{self.number}"

    @property
    def size(self) -> tuple[float, float]:
        """(width, height) in points."""
        return self.file.sizes[self.number - 1]

    def pixels(self, zoom: float) -> tuple[int, int]:
        """The (width, height) of the page rendered at `zoom` pixels per point."""
        return math.ceil(self.size[0] * zoom), math.ceil(self.size[1] * zoom)

    def sha256(self, zoom: float) -> bytes:
        """SHA-256 of the file's SHA-256, the page's number, and the size at which it is rendered."""
        width, height = self.pixels(zoom)
        return hashlib.sha256(self.file.sha256 + f"page {self.number} {width}x{height}".encode()).digest()

    def render(self, zoom: float) -> Image.Image:
        """The page on white, RGB, at `zoom` pixels per point.

        Raises:
            PdfError: if the file is gone, or damaged.
        """
        with _opened(self.file.path, str(self)) as document:
            document.init_forms()  # else what is filled into forms is not drawn
            page = document[self.number - 1]
            bitmap = page.render(scale=zoom)
            image = bitmap.to_pil()
            bitmap.close()  # here, where PDFium is locked, and not by the garbage collector
            page.close()
        return image


def find_pages(source: str | os.PathLike) -> list[PdfPage] | None:
    """The pages that a path names: paper.pdf all of them, paper.pdf#3-5 some; None if it names no PDF file.

    A file whose name contains the # itself takes precedence.

    Raises:
        PdfError: if there is no such page, or the file cannot be used.
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
    """Whether PDF files can be read here."""
    try:
        import pypdfium2  # noqa: F401
    except ImportError:
        return False
    return True


def _select(selection: str | None, name: str, count: int) -> list[int]:
    """The page numbers of a selection such as 3, 3-5, 2- or 1,4-6; of None, all."""
    if selection is None:
        return list(range(1, count + 1))
    numbers = []
    for part in selection.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:(-)\s*([0-9]*)\s*)?", part)
        if match is None:
            raise PdfError(f"{name}#{selection}: pages are named like {name}#3, #3-5, #2- or #1,4-6")
        first = int(match[1])
        last = (int(match[3]) if match[3] else count) if match[2] else first
        if wrong := next((number for number in (first, last) if not 1 <= number <= count), None):
            raise PdfError(f"{name}#{selection}: has {count} pages, and no page {wrong}")
        if first < 1 or last < first:
            raise PdfError(f"{name}#{selection}: pages are counted from 1, and upwards")
        numbers += range(first, last + 1)
    return numbers


@contextmanager
def _opened(path: Path, name: str) -> Iterator:
    """A pypdfium2 document, with PDFium locked; its errors in one line."""
    try:
        import pypdfium2
    except ImportError:
        raise PdfError(f"{name}: PDF files need pypdfium2: pip install pypdfium2 (the extra pdf)") from None
    with _PDFIUM:
        try:
            with pypdfium2.PdfDocument(path) as document:
                yield document
        except pypdfium2.PdfiumError as e:
            codes = pypdfium2.raw
            reasons = {
                codes.FPDF_ERR_PASSWORD: "is protected by a password; save a copy without one",
                codes.FPDF_ERR_SECURITY: "is encrypted in a way that is not read; save a copy without a password",
            }
            raise PdfError(f"{name}: {reasons.get(e.err_code, 'not a PDF, damaged, or without pages')}") from e
        except OSError as e:
            raise PdfError(f"{name}: cannot be read ({e.strerror})") from e

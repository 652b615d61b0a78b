"""Formats of image files: which are read, which are refused, and what a header may cost."""

import io
import re

# Supported formats, by Pillow's names, and their file suffixes. Pillow's others stay disabled, for files and for the
# server's clients: they are rarely used, and some start other programs (EPS).
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),  # before HEIF, because they share brands
    "HEIF": (".heic", ".heif", ".hif"),  # needs pillow-heif
    "JPEG2000": (".jp2",),
    "TGA": (".tga",),  # last: it has no magic number
}
EXTENSIONS = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# Unsupported image formats, for clear error messages.
RAW = {".arw", ".cr2", ".cr3", ".crw", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2"}
RAW |= {".srw", ".x3f"}
UNREAD = RAW | {".jxl", ".psd", ".svg", ".eps", ".ico", ".icns"}
_RAW_MAGIC = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb")
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
CONVERT = "convert it first (on a Mac: sips -s format jpeg FILE --out FILE.jpg)"

MAX_SCANS = 100  # of a progressive JPEG; encoders write about ten
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")


def is_heif(data: bytes) -> bool:
    """Return True for the contents of a HEIF file, such as a HEIC photo."""
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS


def refusal(data: bytes) -> str | None:
    """Return the error message for a file in a well-known but unsupported format, by its first bytes."""
    if b"%PDF-" in data[:1024]:
        return "is a PDF, not an image; pass the path of a .pdf file to use its pages"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return f"JPEG XL is not supported; {CONVERT}"
    if data.startswith(_RAW_MAGIC) or data[4:12] == b"ftypcrx " or (data[:2] == b"II" and data[8:10] == b"CR"):
        return f"camera RAW files are not supported; {CONVERT}"
    return None


class BoundedFile(io.BytesIO):
    """Bytes of an image file, which are read in few pieces; a header of millions of parts would take minutes."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self.reads_left = 20_000 + len(data) // 64

    def read(self, size: int | None = -1) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError("its header has too many parts")
        return super().read(size)


def has_many_scans(jpeg: bytes) -> bool:
    """Whether the first image of a file has over `MAX_SCANS` scans, each of which costs a pass over all pixels."""
    scans, end = 0, 2
    while scans <= MAX_SCANS and (marker := _MARKER.search(jpeg, end)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        end = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2])
    return scans > MAX_SCANS

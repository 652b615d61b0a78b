"""Formats of image files, by their suffixes."""

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
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def is_heif(data: bytes) -> bool:
    """Return True for the contents of a HEIF file, such as a HEIC photo."""
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS

"""Sources of images: files, folders, lists and tar archives, streamed to allow for millions."""

import contextlib
import functools
import glob
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..files import explain_denial, find_path, is_junk, read_file, spellings
from ..formats import EXTENSIONS
from ..image import ImageError, ImageSource, expand
from ..pdf import PDF, PdfPage, can_read_pdf

FileStat = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode; changes when the file is touched


def file_stat(found: os.stat_result) -> FileStat:
    """Stat of a file, as it is stored."""
    return found.st_size, signed(found.st_mtime_ns), signed(found.st_ctime_ns), signed(found.st_ino)


def signed(value: int) -> int:
    """Wrap an integer to SQLite's signed 64 bits: network disks have larger inodes."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def encode_path(path: str) -> bytes:
    """Encode a file name as it is stored; bytes that are not UTF-8 are lone surrogates in it."""
    return path.encode("utf-8", "surrogatepass")


def decode_path(stored: bytes) -> str:
    """Inverse of `encode_path`."""
    return stored.decode("utf-8", "surrogatepass")


LIBRARY = ".photoslibrary"
LIBRARIES = {LIBRARY, ".photolibrary", ".migratedphotolibrary", ".aplibrary"}  # and those of iPhoto and Aperture
PLACEHOLDER = ".icloud"  # .NAME.icloud stands for a file that is in iCloud only, on older systems
_DATALESS = 0x40000000  # flag of such a file, on newer ones
ORIGINALS = ("originals", "Masters")  # subfolders of a Photos library, current and older versions


@dataclass(frozen=True)
class Source:
    """Image to be read."""

    name: str
    read: Callable[[], ImageSource]  # returns the bytes of its file, or a page of a PDF
    stat: FileStat | None = None  # of the file at `name`, a resolved path, before reading it


@dataclass
class Skipped:
    """Files and folders skipped by `find_sources`."""

    suffixes: Counter[str] = field(default_factory=Counter)  # of other files, and of Photos libraries
    denied: list[tuple[str, str]] = field(default_factory=list)  # folders that cannot be listed, and why
    remote: list[str] = field(default_factory=list)  # images that are in iCloud only

    def file(self, name: str) -> None:
        """Count a skipped file, or a bundle, a folder shown as a file."""
        if not is_junk(name):
            kind = Path(name).suffix.lower()
            is_hidden = name.startswith(".") and kind != PLACEHOLDER
            self.suffixes["hidden" if is_hidden else kind or "no suffix"] += 1

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in self.suffixes.most_common())
        return "; ".join(filter(None, [counts, *self.hints()]))

    def hints(self) -> list[str]:
        """Return what to do about pictures that were skipped, except for folders that cannot be listed."""
        hints = []
        for suffix in LIBRARIES & self.suffixes.keys():
            hints.append(f"pass a {suffix} to use its originals")
        if self.remote:
            hints.append(f"{len(self.remote)} in iCloud only: choose Download Now in Finder, or brctl download FILE")
        if self.suffixes[PDF] and not can_read_pdf():
            hints.append("PDF files need pypdfium2: pip install pypdfium2 (the pdf extra)")
        return hints

    def details(self) -> str:
        """Format everything that was skipped, to follow a message."""
        found = f"; skipped: {self}" if self.suffixes else ""
        return found + "".join(f"; {line}" for line in self.unlisted())

    def unlisted(self) -> list[str]:
        """Return a line for each folder that cannot be listed."""
        return [f"{name} cannot be listed ({reason})" for name, reason in self.denied]

    def folder(self, error: OSError) -> None:
        """Record a folder that cannot be listed."""
        self.denied.append((error.filename, explain_denial(error.strerror)))


def find_sources(paths: list[str], skipped: Skipped | None = None) -> Iterator[Source]:
    """Yield the images of files, folders, .txt and .jsonl lists and .tar archives, in a fixed order.

    A PDF yields one image per page, named like paper.pdf#3. Photos libraries are skipped inside other folders; one
    that is passed itself yields its originals. A path that does not exist may be a pattern, as in a shell.

    Args:
        paths: files, folders, lists and archives.
        skipped: records what is skipped.

    Raises:
        ValueError: if a path does not exist, or a list or an archive is damaged.
    """
    skipped = Skipped() if skipped is None else skipped
    for text in _matches(paths):
        path = find_path(text)
        if path.is_dir():
            yield from _in_folder(path, skipped)
        elif path.suffix.lower() == ".tar" and path.exists():
            yield from _in_tar(path, skipped)
        elif path.suffix.lower() in (".txt", ".jsonl") and path.exists():
            yield from _in_list(path)
        elif not path.exists() and expand(text) == [text]:
            raise ValueError(f"{path}: no such file or folder")
        else:
            yield from _images_of(str(path))


def _matches(paths: list[str]) -> Iterator[str]:
    """Yield paths, and instead of a pattern its matches: a shell cannot pass on any number of them."""
    for text in paths:
        found = [] if find_path(text).exists() else sorted(glob.iglob(text, recursive=True))
        yield from found or [text]


def count_sources(paths: list[str]) -> int:
    """Count the images that `find_sources` will yield, without reading any; what it will reject counts as 0."""
    total = 0
    for text in _matches(paths):
        try:
            path = find_path(text)
            if path.is_file() and path.suffix.lower() == ".tar":
                with tarfile.open(path, "r:") as archive:
                    total += sum(_is_image(member) for member in archive)
            else:
                total += sum(1 for _ in find_sources([text]))
        except (OSError, ValueError, tarfile.TarError):
            continue
    return total


def reason(error: OSError | ValueError, name: str) -> str:
    """Format why an image called `name` cannot be used, without its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).removeprefix("image data: ").removeprefix(f"{name}: ")


def read_named(name: str) -> ImageSource:
    """Return the image with a name from `find_sources`: its path, or its bytes if it is in an archive.

    Raises:
        OSError: if the archive no longer contains it.
    """
    archive, in_tar, member = name.partition(".tar/")
    if not in_tar or find_path(name).exists():
        return name
    try:
        with tarfile.open(find_path(f"{archive}.tar"), "r:") as file:
            return file.extractfile(_find_member(file, member)).read()
    except (tarfile.TarError, KeyError) as e:
        raise FileNotFoundError(name) from e


def file_of(name: str) -> str:
    """Return the file of a name from `find_sources` that is not in an archive: of paper.pdf#3, paper.pdf."""
    file, separator, page = name.rpartition("#")
    is_page = separator and file.lower().endswith(PDF) and page.isdigit() and not os.path.lexists(name)
    return file if is_page else name


def _images_of(name: str) -> Iterator[Source]:
    """Yield the image of a file, or one per page of a PDF; an unusable PDF fails when it is read."""
    try:
        images = expand(name)
    except ImageError as e:
        yield Source(name, functools.partial(_fail, e))
        return
    for image in images:
        if isinstance(image, PdfPage):
            yield Source(str(image), lambda page=image: page)
        else:
            yield Source(name, lambda: read_file(find_path(name)))


def _fail(error: Exception) -> ImageSource:
    raise error


def scan_folder(folder: Path, skipped: Skipped) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the path and stat of the image files and PDFs that `find_sources` finds in a folder, in no certain order.

    No file is opened.
    """
    wanted = EXTENSIONS | {PDF} if can_read_pdf() else EXTENSIONS
    waiting = list(map(str, _roots(folder)))
    while waiting:
        top = waiting.pop()
        try:
            with os.scandir(top) as entries:
                for entry in entries:
                    suffix = os.path.splitext(entry.name)[1].lower()
                    if entry.is_dir(follow_symlinks=False):
                        if suffix in LIBRARIES:
                            skipped.file(entry.name)
                        else:
                            waiting.append(entry.path)
                    elif suffix == PLACEHOLDER and os.path.splitext(entry.name[1 : -len(suffix)])[1].lower() in wanted:
                        skipped.remote.append(os.path.join(top, entry.name[1 : -len(suffix)]))
                    elif suffix not in wanted or entry.name.startswith("."):
                        skipped.file(entry.name)
                    elif entry.is_file():  # and no link to nothing
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            stat = entry.stat()
                            if getattr(stat, "st_flags", 0) & _DATALESS:
                                skipped.remote.append(entry.path)
                            yield entry.path, stat
        except OSError as e:
            e.filename = e.filename or top
            skipped.folder(e)


def _roots(folder: Path) -> list[Path]:
    """Return the folders of originals in a Photos library, or the folder itself."""
    if folder.suffix.lower() not in LIBRARIES:
        return [folder]
    roots = [folder / name for name in ORIGINALS]
    return [root for root in roots if os.path.isdir(root)] or roots[:1]


def _in_folder(folder: Path, skipped: Skipped) -> Iterator[Source]:
    wanted = EXTENSIONS | {PDF} if can_read_pdf() else EXTENSIONS
    for top in _roots(folder):
        for root, folders, names in os.walk(top, onerror=skipped.folder):
            for library in [name for name in folders if Path(name).suffix.lower() in LIBRARIES]:
                folders.remove(library)
                skipped.file(library)
            folders.sort()
            for name in sorted(names):
                if Path(name).suffix.lower() in wanted and not name.startswith("."):
                    yield from _images_of(os.path.join(root, name))
                else:
                    skipped.file(name)


def _in_list(path: Path) -> Iterator[Source]:
    """Read a path or a JSON object with "path" or "image" per line; relative paths are relative to the list."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:  # file names may be any bytes
        for number, line in enumerate(lines, 1):
            name = line.strip()
            if not name:
                continue
            if path.suffix.lower() == ".jsonl":
                try:
                    entry = json.loads(name)
                    name = entry.get("path") or entry["image"]
                    files = [path.parent / one for one in (name if isinstance(name, list) else [name])]
                except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                    raise ValueError(f'{path}:{number}: must be a JSON object with "path" or "image"') from None
            else:
                files = [path.parent / name]
            for file in files:
                if not is_junk(file.name):
                    yield from _images_of(str(file))


def _in_tar(path: Path, skipped: Skipped) -> Iterator[Source]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if _is_image(member):
                    data = archive.extractfile(member).read()
                    if len(data) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield Source(f"{path}/{member.name}", lambda data=data: data)
                elif member.isfile():
                    skipped.file(Path(member.name).name)
    except tarfile.TarError as e:
        raise ValueError(f"{path}: not a tar archive, or truncated ({e})") from e


def _is_image(member: tarfile.TarInfo) -> bool:
    name = Path(member.name)
    return member.isfile() and name.suffix.lower() in EXTENSIONS and not is_junk(name.name)


def _find_member(archive: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    """Find a member by any spelling of its name.

    Raises:
        KeyError: if there is none.
    """
    names = set(archive.getnames())
    return archive.getmember(next((other for other in spellings(name) if other in names), name))

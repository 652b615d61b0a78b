"""Where images come from: files, folders, lists and tar archives, streamed, so that there may be millions."""

import functools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..files import find_path, is_junk, spellings
from ..image import EXTENSIONS, ImageError, ImageSource, expand
from ..pdf import PDF, PdfPage, can_read_pdf

FileStat = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode: another one for a file that was touched

LIBRARY = ".photoslibrary"
ORIGINALS = ("originals", "Masters")  # of a library of Photos, and of older versions


@dataclass(frozen=True)
class Source:
    """An image to be read."""

    name: str
    read: Callable[[], ImageSource]  # the bytes of its file, or a page of a PDF
    stat: FileStat | None = None  # of the file at `name`, a resolved path, before it is read


@dataclass
class Skipped:
    """What `find_sources` has passed by."""

    suffixes: Counter[str] = field(default_factory=Counter)  # files that are no images, and libraries of Photos
    denied: list[tuple[str, str]] = field(default_factory=list)  # folders that cannot be listed, and why

    def file(self, name: str) -> None:
        """Count a file, or a folder that is one to its user."""
        if not is_junk(name):
            self.suffixes[Path(name).suffix.lower() or "no suffix"] += 1

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in self.suffixes.most_common())
        hints = []
        if self.suffixes[LIBRARY]:
            hints.append(f"name a {LIBRARY} to take its originals")
        if self.suffixes[PDF] and not can_read_pdf():
            hints.append("PDF files need pypdfium2: pip install pypdfium2 (the extra pdf)")
        return "; ".join([counts, *hints])

    def folder(self, error: OSError) -> None:
        """Note a folder that cannot be listed."""
        self.denied.append((error.filename, error.strerror))


def find_sources(paths: list[str], skipped: Skipped | None = None) -> Iterator[Source]:
    """The images of files, folders, .txt and .jsonl lists and .tar archives, one after another, in a fixed order.

    A PDF counts as many as it has pages, each named like paper.pdf#3. Libraries of Photos are passed by unless named,
    and then their originals are taken.

    Args:
        paths: what to go through.
        skipped: is told of what is not taken.

    Raises:
        ValueError: if a path is not there, or a list or an archive is damaged.
    """
    skipped = Skipped() if skipped is None else skipped
    for text in paths:
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


def count_sources(paths: list[str]) -> int:
    """How many images `find_sources` will find, without reading any; what it will refuse counts as 0."""
    total = 0
    for text in paths:
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


def read_named(name: str) -> ImageSource:
    """The image that `find_sources` gave this name: its path, or its bytes if it is in an archive.

    Raises:
        OSError: if it is not in its archive any more.
    """
    archive, in_tar, member = name.partition(".tar/")
    if not in_tar or find_path(name).exists():
        return name
    try:
        with tarfile.open(find_path(f"{archive}.tar"), "r:") as file:
            return file.extractfile(_find_member(file, member)).read()
    except (tarfile.TarError, KeyError) as e:
        raise FileNotFoundError(name) from e


def _images_of(name: str) -> Iterator[Source]:
    """The image of a file, or one for each page of a PDF; a PDF that cannot be used fails when it is read."""
    try:
        images = expand(name)
    except ImageError as e:
        yield Source(name, functools.partial(_fail, e))
        return
    for image in images:
        if isinstance(image, PdfPage):
            yield Source(str(image), lambda page=image: page)
        else:
            yield Source(name, lambda: find_path(name).read_bytes())


def _fail(error: Exception) -> ImageSource:
    raise error


def _in_folder(folder: Path, skipped: Skipped) -> Iterator[Source]:
    roots = [folder]
    if folder.suffix.lower() == LIBRARY:
        roots = [folder / name for name in ORIGINALS]
        roots = [root for root in roots if os.path.isdir(root)] or roots[:1]
    wanted = EXTENSIONS | {PDF} if can_read_pdf() else EXTENSIONS
    for top in roots:
        for root, folders, names in os.walk(top, onerror=skipped.folder):
            for library in [name for name in folders if Path(name).suffix.lower() == LIBRARY]:
                folders.remove(library)
                skipped.file(library)
            folders.sort()
            for name in sorted(names):
                if Path(name).suffix.lower() in wanted and not name.startswith("."):
                    yield from _images_of(os.path.join(root, name))
                else:
                    skipped.file(name)


def _in_list(path: Path) -> Iterator[Source]:
    """A path per line, or a JSON object with "path" or "image"; relative ones are relative to the list."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            name = line.strip()
            if not name:
                continue
            if path.suffix.lower() == ".jsonl":
                try:
                    entry = json.loads(name)
                    name = entry.get("path") or entry["image"]
                except (ValueError, KeyError, AttributeError):
                    raise ValueError(f'{path}:{number}: need a JSON object with "path" or "image"') from None
            for one in name if isinstance(name, list) else [name]:
                file = path.parent / one
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
        raise ValueError(f"{path}: not a tar archive, or cut short ({e})") from e


def _is_image(member: tarfile.TarInfo) -> bool:
    name = Path(member.name)
    return member.isfile() and name.suffix.lower() in EXTENSIONS and not is_junk(name.name)


def _find_member(archive: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    """A member by its name in any of its spellings.

    Raises:
        KeyError: if there is none.
    """
    names = set(archive.getnames())
    return archive.getmember(next((other for other in spellings(name) if other in names), name))

"""Where images come from: files, folders, lists and tar archives, streamed, so that there may be millions."""

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# What is taken from folders and archives; a file that is named is always tried.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".tga"}
FileStat = tuple[int, int, int, int]  # size, mtime_ns, ctime_ns, inode: another one for a file that was touched


@dataclass(frozen=True)
class Source:
    """An image file to be read."""

    name: str
    read: Callable[[], bytes]
    stat: FileStat | None = None  # of the file at `name`, a resolved path, before it is read


def find_sources(paths: list[str]) -> Iterator[Source]:
    """The images of files, folders, .txt and .jsonl lists and .tar archives, one after another, in a fixed order.

    Raises:
        ValueError: if a path is not there, or a list or an archive is damaged.
    """
    for text in paths:
        path = Path(text)
        if path.is_dir():
            yield from _in_folder(path)
        elif not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        elif path.suffix.lower() == ".tar":
            yield from _in_tar(path)
        elif path.suffix.lower() in (".txt", ".jsonl"):
            yield from _in_list(path)
        else:
            yield Source(str(path), path.read_bytes)


def count_sources(paths: list[str]) -> int:
    """How many images `find_sources` will find, without reading any; 0 for what it will not like."""
    total = 0
    for text in paths:
        try:
            if Path(text).is_file() and Path(text).suffix.lower() == ".tar":
                with tarfile.open(text, "r:") as archive:
                    total += sum(_is_image(member) for member in archive)
            else:
                total += sum(1 for _ in find_sources([text]))
        except (OSError, ValueError, tarfile.TarError):
            continue
    return total


def read_named(name: str) -> bytes:
    """The bytes of an image by the name that `find_sources` gave it.

    Raises:
        OSError: if it is not there any more.
    """
    archive, in_tar, member = name.partition(".tar/")
    if not in_tar or Path(name).exists():
        return Path(name).read_bytes()
    try:
        with tarfile.open(f"{archive}.tar", "r:") as file:
            return file.extractfile(member).read()
    except (tarfile.TarError, KeyError) as e:
        raise FileNotFoundError(name) from e


def _in_folder(folder: Path) -> Iterator[Source]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            if path.suffix.lower() in EXTENSIONS and not name.startswith("."):
                yield Source(str(path), path.read_bytes)


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
                yield Source(str(file), file.read_bytes)


def _in_tar(path: Path) -> Iterator[Source]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if _is_image(member):
                    data = archive.extractfile(member).read()
                    if len(data) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield Source(f"{path}/{member.name}", lambda data=data: data)
    except tarfile.TarError as e:
        raise ValueError(f"{path}: not a tar archive, or cut short ({e})") from e


def _is_image(member: tarfile.TarInfo) -> bool:
    return member.isfile() and Path(member.name).suffix.lower() in EXTENSIONS

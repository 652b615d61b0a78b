"""Image files whose features a store has: recognized by path, size and times, without reading them again.

A path as it was typed means another file in another folder, so only resolved paths are compared, and a file counts as
the one that was read before if nothing has touched it since: size, both times and inode are equal, as in Git's index.
"""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from ..files import find_path
from .sources import FileStat
from .store import FeatureStore


@dataclass(frozen=True)
class ImageFile:
    """A path as it is now on this machine."""

    path: str  # its folder's links and dots resolved; a link to the file itself is told by what it leads to
    stat: FileStat | None  # None: cannot be read, for this reason
    problem: str = ""

    @property
    def is_gone(self) -> bool:
        return self.problem == _GONE


_GONE = "no such file"


def look_up(paths: Iterable[str]) -> dict[str, ImageFile]:
    """The files that paths lead to from the working directory, none of them read: 5 µs each."""
    folders: dict[str, str] = {}
    files = {}
    for path in paths:
        folder, name = os.path.split(path)
        try:
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            files[path] = _look_at(os.path.join(folders[folder], name))
        except (OSError, ValueError) as e:  # ValueError: a NUL or a lone surrogate
            files[path] = ImageFile(path, None, getattr(e, "strerror", None) or "is not a path")
    return files


def _look_at(path: str) -> ImageFile:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        composed = str(find_path(path))  # a name may be composed otherwise on disk than in the data
        return ImageFile(path, None, _GONE) if composed == path else _look_at(composed)
    if not stat.S_ISREG(found.st_mode):
        return ImageFile(path, None, "is not a file")
    return ImageFile(path, (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino))


def known_images(store: FeatureStore, files: dict[str, ImageFile]) -> dict[str, bytes]:
    """The SHA-256 of those files that the store has features of and that have not changed since they were read.

    A file that is gone counts as the one that was last there if the store has seen a single image under its path: the
    features stay usable when the images are deleted.

    Args:
        store: whose names and entries are up to date.
        files: from `look_up`.

    Returns:
        SHA-256 by the keys of `files`.
    """
    wanted = {file.path: file.stat for file in files.values() if file.stat or file.is_gone}
    found: dict[str, bytes] = {}
    former: dict[str, set[bytes]] = {}
    for sha256, path, seen in store.files():
        if seen is None or path not in wanted or sha256 not in store:
            continue  # without its stat, nobody knows which file had that name
        if wanted[path] == seen:
            found[path] = sha256
        elif wanted[path] is None:
            former.setdefault(path, set()).add(sha256)
    found |= {path: next(iter(images)) for path, images in former.items() if len(images) == 1}
    return {name: found[file.path] for name, file in files.items() if file.path in found}

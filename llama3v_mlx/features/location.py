"""Location of the index of a folder of pictures; it follows a folder that is renamed, without reading it again."""

import contextlib
import hashlib
import itertools
import os
from pathlib import Path

from ..checkpoint import name_of
from ..cli import CACHE
from ..files import list_folder
from .growing import claim_idle, number_of
from .sources import file_of, file_stat
from .store import FeatureStore, StoreInfo

_SAMPLE = 20  # files compared, to tell whether a folder was renamed


def default_index(folder: str, model: str) -> Path:
    """Return the folder of the index in the cache: one per resolved folder of pictures and model."""
    digest = hashlib.sha256(f"{folder}\0{name_of(model)}".encode("utf-8", "surrogatepass")).hexdigest()
    name = "".join(c if c.isalnum() else "-" for c in os.path.basename(folder))[:40]
    return CACHE / "libraries" / f"{name.encode('ascii', 'ignore').decode()}-{digest[:16]}"


def open_default(index: Path, folder: str, info: StoreInfo) -> FeatureStore:
    """Open the index in the cache, or create it, or adopt that of a folder that was renamed.

    Raises:
        OSError: if it cannot be written; the message says how to keep it elsewhere.
        FeatureError: if it is another model's, or damaged.
    """
    try:
        if not os.path.exists(index):
            adopt(index, folder, info)
        return FeatureStore.create(index, info)
    except OSError as e:
        raise OSError(f"{e}; keep the index elsewhere: --index DIR, or --library-index DIR of the server") from e


def adopt(index: Path, folder: str, info: StoreInfo) -> None:
    """Rename an index beside `index` to it, if its pictures are now in `folder`.

    Args:
        index: a folder that does not exist.
        folder: of pictures, resolved.
        info: metadata of the index.
    """
    for other in list_folder(index.parent):
        with contextlib.suppress(OSError, ValueError):  # not an index, damaged, or taken by another process
            store = FeatureStore(other)
            if store.info == info and _has_moved(store, folder) and _is_idle(other):
                os.rename(other, index)
                return


def _has_moved(store: FeatureStore, folder: str) -> bool:
    """Return True if no picture is at its old path, but one is in `folder`, with the same inode and times."""
    rows = itertools.islice(store.files_where("size IS NOT NULL"), _SAMPLE)
    files = {file_of(path): stat for _, path, stat, _ in rows}
    if any(map(os.path.lexists, files)):
        return False
    for file, stat in files.items():
        parts = Path(file).parts
        for i in range(1, len(parts)):  # how much of the path was the folder's is not known
            with contextlib.suppress(OSError):
                if file_stat(os.stat(os.path.join(folder, *parts[i:]))) == stat:
                    return True
    return False


def _is_idle(index: Path) -> bool:
    """Return True if no process is adding to a store."""
    writers = {number_of(path) for path in list_folder(index, "writer-*.lock")}
    with contextlib.ExitStack() as claims:
        return claim_idle(index, writers, claims) == writers

"""A folder that is there whole or not at all, however its writing ends."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

# In a folder that is being written, and locked while it is: what tells a leftover from somebody's folder.
MARKER = ".writing"


@contextlib.contextmanager
def new_folder(path: Path, num_bytes: int) -> Iterator[Path]:
    """A folder `path`.partial to write to, which becomes `path` in the end, or vanishes if anything goes wrong.

    What an earlier process that was killed has left there is replaced.

    Args:
        path: the folder to be; it must not exist.
        num_bytes: how much will be written; that much must be free on the disk.

    Raises:
        OSError: if there is no room, or another process, or something else, is at work there.
    """
    partial = path.absolute().with_name(f"{path.name}.partial")
    if os.path.lexists(partial):
        _remove_leftover(partial)
    free = shutil.disk_usage(next(parent for parent in partial.parents if parent.exists())).free
    if free < num_bytes:
        raise OSError(f"{path}: needs {num_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on its disk")
    partial.mkdir(parents=True)
    try:
        with (partial / MARKER).open("w") as marker:
            _lock(marker, partial)
            yield partial
            flush(partial)
            os.rename(partial, path)
            flush(partial.parent)
            (path / MARKER).unlink()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _remove_leftover(partial: Path) -> None:
    """Remove what a killed process left; a folder of anybody else, or one still being written, is an error."""
    if not partial.is_dir() or (any(partial.iterdir()) and not (partial / MARKER).is_file()):
        raise FileExistsError(f"{partial} is in the way, and is not left by an earlier run; move it away")
    with contextlib.suppress(FileNotFoundError), (partial / MARKER).open() as marker:
        _lock(marker, partial)
        for path in partial.iterdir():
            if path.name != MARKER:  # it goes last: a leftover stays one, should this be killed too
                path.unlink()
    shutil.rmtree(partial)


def _lock(marker: TextIO, partial: Path) -> None:
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise FileExistsError(f"{partial} is being written by another process") from e
    except OSError:
        return  # a file system without locks


def flush(path: Path) -> None:
    """Have a file or folder on the disk, whatever happens to the machine next."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

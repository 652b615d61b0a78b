"""Files and folders: atomic creation, listing without macOS's junk files, lookup in either Unicode form."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import IO

# Locked file in a folder being written; distinguishes a leftover from a user's folder.
MARKER = ".writing"
# Errors of exFAT, SMB and NFS for an unsupported flush, above all a folder's.
_NOT_OFFERED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF}


@contextlib.contextmanager
def new_folder(path: Path, num_bytes: int) -> Iterator[Path]:
    """Create a directory atomically: yield `path`.partial, renamed to `path` on success and removed on failure.

    Leftovers of an earlier, killed process are replaced.

    Args:
        path: the final folder, which must not exist.
        num_bytes: bytes to be written, which must be free on the disk.

    Raises:
        OSError: if the disk is too full, or `path`.partial is in use by another process or not a leftover.
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
            _take(marker, partial)
            yield partial
            for file in partial.rglob("*"):
                flush(file)
            flush(partial)
            os.rename(partial, path)
            flush(partial.parent)
            (path / MARKER).unlink()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _remove_leftover(partial: Path) -> None:
    """Remove the leftovers of a killed process; raise FileExistsError for anything else or if still being written."""
    if not partial.is_dir() or (list_folder(partial) and not (partial / MARKER).is_file()):
        raise FileExistsError(f"{partial} is in the way and was not left by an earlier run; move it away")
    with contextlib.suppress(FileNotFoundError), (partial / MARKER).open() as marker:
        _take(marker, partial)
        for path in partial.iterdir():
            if path.name != MARKER:  # removed last, so that the leftover is still recognized if this is killed
                path.unlink(missing_ok=True)  # macOS removes an AppleDouble file together with its file
    shutil.rmtree(partial)


def _take(marker: IO, partial: Path) -> None:
    if not lock(marker, wait=False):
        raise FileExistsError(f"{partial} is being written by another process")


def lock(file: IO, wait: bool = True) -> bool:
    """Lock an open file until it is closed; return False if another process holds it and `wait` is not set.

    On a file system without locks it always succeeds.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def flush(path: Path) -> None:
    """Flush a file or folder to the disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Flush an open file or folder to the disk, where the file system supports it.

    Raises:
        OSError: if the data could not be written.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone leaves the data in the drive's cache
    if full is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, full)
            return
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in _NOT_OFFERED:
            raise


def write_beside(path: Path, data: bytes) -> None:
    """Write a file beside `path` and rename it into place."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        os.rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def write_at(file: FileIO, data: bytes, offset: int) -> None:
    """Write all of `data` at a byte offset."""
    view = memoryview(data)
    try:
        while view:
            # A nearly full disk writes less at a time, and macOS refuses 2 GiB.
            count = os.pwrite(file.fileno(), view[: 1 << 30], offset)
            view, offset = view[count:], offset + count
    except OSError as e:
        e.filename = file.name  # pwrite's errors do not name the file
        raise


def is_junk(name: str) -> bool:
    """Return True for the name of a file that macOS leaves next to others: .DS_Store or AppleDouble's ._NAME."""
    return name == ".DS_Store" or name.startswith("._")


def safe(name: str) -> str:
    """Return a file name as one line, with control characters and invisible ones as escapes."""
    return "".join(c if c.isprintable() or c in " \u202f\u00a0" else repr(c)[1:-1] for c in name)


def list_folder(folder: Path, pattern: str = "*") -> list[Path]:
    """List the paths in a folder that match a pattern, sorted, without macOS's junk files."""
    return sorted(path for path in folder.glob(pattern) if not is_junk(path.name))


def spellings(name: str) -> Iterator[str]:
    """Yield a file name as is, in NFC and NFD, and with the narrow space that macOS writes before AM and PM."""
    yield name
    narrow = re.sub(r" (?=[AP]M\b)", "\u202f", name)
    for text in dict.fromkeys((name, narrow)):
        for form in ("NFC", "NFD"):
            if (other := unicodedata.normalize(form, text)) != name:
                yield other


def find_path(path: str | os.PathLike) -> Path:
    """Find a path as spelled on disk: each part is tried as is, then in its other `spellings`.

    Some file systems store names decomposed (NFD), while keyboards produce composed ones (NFC). A path that does not
    exist in any spelling is returned unchanged.
    """
    path = Path(path)
    with contextlib.suppress(OSError, ValueError):  # name too long, or with a null character
        if os.path.lexists(path):
            return path
        found = Path(path.anchor)
        for part in path.relative_to(path.anchor).parts:
            found = next((found / name for name in spellings(part) if os.path.lexists(found / name)), None)
            if found is None:
                return path
        return found
    return path

"""Files and folders: atomic creation, listing without macOS's junk files, lookup in either Unicode form."""

import contextlib
import errno
import fcntl
import glob
import os
import re
import shutil
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

from .locks import lock, open_locked

PRIVACY = (
    "on a Mac, allow access in System Settings > Privacy & Security > Files and Folders (or Full Disk Access) for the "
    "app that runs this, such as Terminal, and restart it"
)
# Locked file in a folder being written; distinguishes a leftover from a user's folder.
MARKER = ".writing"
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
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
        OSError: if `path` exists, the disk is too full, or `path`.partial is in use by another process or no leftover.
    """
    check_name(path)
    partial = path.absolute().with_name(f"{path.name}.partial")
    if not os.path.lexists(partial):  # else after what is left in it has been removed
        _check_room(path, existing(partial.parent), num_bytes)
    with _take(partial):
        try:
            _empty(partial)
            if os.path.lexists(path):  # nobody else can make it any more
                raise FileExistsError(f"{path} exists already; remove it, or choose another name")
            _check_room(path, partial, num_bytes)
            with naming(path):  # a full disk's error names no file
                yield partial
            with writing(path):
                for file in partial.rglob("*"):
                    flush(file)
                flush(partial)
                os.rename(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                _empty(partial)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        with writing(path):
            try:
                (path / MARKER).unlink()
                flush(partial.parent)
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                raise


def check_name(path: Path) -> None:
    """Raise OSError if a path is not UTF-8: MLX writes no such file."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise OSError(f"{path}: is not valid UTF-8, as MLX needs it; choose another name") from None


def _check_room(path: Path, folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(f"{path}: needs {num_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on its disk")


def _take(partial: Path) -> FileIO:
    """Create a folder with a locked marker, or lock that of a leftover; return the open marker."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process has just renamed or removed it
            is_folder = stat.S_ISDIR(os.lstat(partial).st_mode)
            names = [path.name for path in list_folder(partial)] if is_folder else []
            if not is_folder or (names and MARKER not in names):
                raise FileExistsError(f"{partial} is in the way and was not left by an earlier run; move it away")
            try:
                return open_locked(partial / MARKER)
            except OSError:
                with contextlib.suppress(OSError):
                    partial.rmdir()  # unless there is something in it
                raise


def _empty(partial: Path) -> None:
    """Remove all files but the marker, without which a folder is taken for a user's."""
    for path in partial.iterdir():
        if path.name != MARKER:
            path.unlink(missing_ok=True)  # macOS removes an AppleDouble file together with its file


def flush(path: Path) -> None:
    """Flush a file or folder to the disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
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


def _remove_if_left(partial: Path, pid: str) -> None:
    """Remove a partial file unless a process, here or on another machine, is still writing it."""
    with contextlib.suppress(OSError, ValueError, OverflowError), partial.open("rb") as file:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            if lock(file, wait=False):
                partial.unlink()


def existing(path: Path) -> Path:
    """Return the nearest existing parent of a path, or itself: its disk is where the path would be made."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))  # False where one may not look


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in the errors of its writing: MLX's RuntimeError, and an OSError that names none."""
    try:
        with naming(path):
            yield
    except RuntimeError as e:
        raise OSError(f"{path}: cannot be written ({e}); is the disk full?") from e


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file or folder in an OSError that names none."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno is not None:
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise


def write_beside(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, whole or in parts, beside `path` and rename it into place."""
    with beside(path) as partial, partial.open("wb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Replace a file atomically: yield a path beside `path`, flushed and renamed to `path` on success.

    The suffix stays, because MLX appends its own to other names. What killed processes left beside `path` is removed.
    """
    for old in path.parent.glob(f"{glob.escape(path.name)}.*.partial{path.suffix}"):
        _remove_if_left(old, old.name.removeprefix(f"{path.name}.").partition(".")[0])
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial{path.suffix}")
    with writing(path):
        try:
            try:
                held = partial.open("wb")
            except OSError as e:
                e.filename = str(path)
                raise
            with held:
                lock(held, wait=False)
                yield partial
                flush(partial)
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


def append(file: FileIO, data: bytes) -> None:
    """Append all of `data` or nothing: what was written is truncated on any exception.

    An exception during the truncation leaves a part of it at the end of the file.
    """
    end = os.fstat(file.fileno()).st_size
    try:
        write_at(file, data, end)
    except BaseException:
        if os.fstat(file.fileno()).st_size < end + len(data):
            with naming(Path(file.name)):
                os.ftruncate(file.fileno(), end)
        raise


def cut_half_line(file: FileIO) -> None:
    """Truncate a partial last line, left by a full disk or a kill."""
    size = end = os.fstat(file.fileno()).st_size
    while end:
        start = max(0, end - 4096)
        newline = os.pread(file.fileno(), end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        with naming(Path(file.name)):
            os.ftruncate(file.fileno(), end)


def check_file(path: Path) -> None:
    """Check that a file is a regular one and lies in its folder, before it is read.

    A link may lead to another file of the folder, or to the blobs of its repository in Hugging Face's cache.

    Raises:
        OSError: if it is anything else, such as a pipe or a link to a file elsewhere.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("is not a regular file")
    folder, real = os.path.realpath(path.parent), os.path.realpath(path)
    allowed = [folder]
    if os.path.basename(os.path.dirname(folder)) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(folder)), "blobs"))
    if os.path.dirname(real) not in allowed:
        raise OSError(f"is a link to {real}, outside its folder; copy the file there")


def read_file(path: Path) -> bytes:
    """Read a regular file; a pipe would wait for a writer, and a device never end.

    Raises:
        OSError: if it is anything else, or cannot be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        data = file.read()
        if data is None:  # a file of /proc that would wait
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return data


def explain_denial(text: str) -> str:
    """Append a hint to a message with EPERM's text, macOS's error for what its privacy settings protect."""
    return f"{text}; {PRIVACY}" if os.strerror(errno.EPERM) in text else text


def printable(text: str, keep: str = "") -> str:
    """Escape the characters of a text that a terminal would obey: control and bidi characters, lone surrogates.

    Names of files, answers of models and messages of servers are printed through it, except in JSON.

    Args:
        text: from outside.
        keep: characters that are not escaped, such as newlines.
    """
    return _HARMFUL.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), text)


def true_path(path: str | os.PathLike) -> str:
    """Return the resolved path of an existing folder as spelled on disk: a Mac's disks ignore case and Unicode form."""
    path = os.path.realpath(find_path(path))
    if hasattr(fcntl, "F_GETPATH"):
        with contextlib.suppress(OSError):  # may not be opened: what is done with it will say so
            descriptor = os.open(path, os.O_RDONLY)
            try:
                path = os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).partition(b"\0")[0])
            finally:
                os.close(descriptor)
    return path


def is_junk(name: str) -> bool:
    """Return True for the name of a file that macOS leaves next to others: .DS_Store or AppleDouble's ._NAME."""
    return name == ".DS_Store" or name.startswith("._")


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

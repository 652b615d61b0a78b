"""Locks on files and folders, which end with the process that holds them."""

import contextlib
import fcntl
import os
import stat
from io import FileIO
from pathlib import Path
from typing import IO


def lock(file: IO | int, wait: bool = True) -> bool:
    """Lock an open file or folder until it is closed; return False if another process holds it and `wait` is not set.

    On a file system without locks it always succeeds.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def hold(folder: Path) -> int:
    """Open a folder, and lock it until the returned descriptor is closed.

    Raises:
        OSError: if another process holds it.
    """
    held = os.open(folder, os.O_RDONLY)
    if not lock(held, wait=False):
        os.close(held)
        raise OSError(f"{folder}: is being written by another process")
    return held


def open_locked(path: Path) -> FileIO:
    """Open a file to append to, created if it does not exist, and lock it until it is closed.

    Raises:
        OSError: if another process holds it, or it is not a regular file.
    """
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("a+b", buffering=0))
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(f"{path}: is not a regular file")
            if not lock(file, wait=False):
                raise OSError(f"{path}: is being written by another process")
            with contextlib.suppress(FileNotFoundError):  # another process may just have replaced or removed it
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    stack.pop_all()
                    return file

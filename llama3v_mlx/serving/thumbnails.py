"""Cache of small files on disk, bounded in bytes: the least recently used are deleted."""

import contextlib
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

LEFTOVER_SECONDS = 3600.0  # after which a file that is still being written was left by a kill
_NAME = re.compile(r"[0-9a-f]{64}\.jpg")


class Thumbnails:
    """JPEG files by hexadecimal ids. May be shared by processes, each of which bounds what it knows of.

    Args:
        folder: created when the first file is written.
        max_bytes: of all files.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] | None = None  # by name, least recently used first; None: not listed yet
        self.nbytes = 0

    def get(self, id: str, make: Callable[[], bytes]) -> bytes:
        """Return the file of an id, made once; a folder that cannot be written only costs time."""
        path = self._folder / f"{id}.jpg"
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9"):  # after a loss of power it may be cut off
                os.utime(path)
                self._note(path.name, len(data))
                return data
        data = make()
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, path)
            self._note(path.name, len(data))
        except OSError as e:
            log.warning("a thumbnail is not kept: %s", e)
            with contextlib.suppress(OSError):
                partial.unlink()
        return data

    def _note(self, name: str, size: int) -> None:
        """Record a file as the most recently used, and make room."""
        with self._lock:
            if self._sizes is None:
                self._list()
            self.nbytes += size - self._sizes.pop(name, 0)
            self._sizes[name] = size
            while self.nbytes > self._max_bytes and len(self._sizes) > 1:
                oldest, size = self._sizes.popitem(last=False)
                self.nbytes -= size
                (self._folder / oldest).unlink(missing_ok=True)

    def _list(self) -> None:
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # deleted by another process
                    if _NAME.fullmatch(entry.name):
                        found.append((entry.stat().st_mtime_ns, entry.name, entry.stat().st_size))
                    elif entry.name.endswith(".partial") and time.time() - entry.stat().st_mtime > LEFTOVER_SECONDS:
                        os.unlink(entry.path)
        self._sizes = OrderedDict((name, size) for _, name, size in sorted(found))
        self.nbytes = sum(self._sizes.values())

"""Updates of a library's index in a process of their own, which shares the store with the server.

The server runs this module with FOLDER MODEL INDEX, and reads its progress. A crash there is no crash of the server,
and the models of both are used by one thread each. An update ends with the server, and the next one continues it.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ..cli import FOLLOWING, run

log = logging.getLogger(__name__)

NICE = 5  # priority of the process, below the server's
INTERVAL = 0.2  # seconds between two reports of progress
GRACE_SECONDS = 5.0  # for an update to end when it is stopped
COMMAND = (sys.executable, "-P", "-c", FOLLOWING, "llama3v_mlx.serving.indexer")


class Indexer:
    """Updates of an index, one at a time, in the background.

    Args:
        arguments: folder, model and index.
    """

    def __init__(self, *arguments: str | os.PathLike):
        self._command = [*COMMAND, *map(os.fspath, arguments)]
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._stopped = False
        self.ended: float | None = None  # when the last update ended, by time.monotonic
        self.progress: tuple[int, int] | None = None  # files read, and to be read, of the running update
        self.changes: str | None = None  # found by the last update
        self.notes: list[str] = []  # of the last update, on pictures that it skipped
        self.error: str | None = None  # of the last update

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start an update, unless one is running."""
        with self._lock:
            if self._process is not None or self._stopped:
                return
            self.progress = self.changes = self.error = None
            # -P and the path: this package is found, but no module that lies in the current folder.
            path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            # A session of its own: Ctrl-C is for the server, which then stops the update.
            try:
                self._process = subprocess.Popen(
                    self._command, env=os.environ | {"PYTHONPATH": path}, start_new_session=True, **pipes
                )
            except OSError as e:
                self.error = str(e)
                return
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._process.pid, NICE)
            threading.Thread(target=self._follow, args=(self._process,), name="indexer", daemon=True).start()

    def stop(self) -> None:
        """Stop a running update, and allow no other; nothing that was embedded is lost."""
        with self._lock:
            self._stopped, process = True, self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _follow(self, process: subprocess.Popen) -> None:
        last = ""
        for line in process.stdout:
            last = line.decode("utf-8", "replace").strip() or last
            try:
                self.progress, self.changes, self.notes = _report(**json.loads(last))
            except (ValueError, TypeError):
                log.info("%s", last)
        status = process.wait()
        process.stdin.close()
        with self._lock:
            if status and not self._stopped:
                self.error = last.removeprefix("error: ") if last.startswith("error: ") else f"ended with {status}"
                log.warning("the library could not be updated: %s", self.error)
            self.progress, self.ended, self._process = None, time.monotonic(), None


def _report(progress: tuple[int, int] | None = None, changes: str | None = None, notes: Sequence[str] = ()):
    return progress and tuple(progress), changes, list(notes)


def update(folder: str, model: str, index: str) -> None:
    """Update an index, and report on stdout: lines of JSON with the arguments of `_report`."""
    from ..features.library import Library

    reported = 0.0

    def report(read, total: int) -> None:
        nonlocal reported
        if time.monotonic() - reported > INTERVAL:
            reported = time.monotonic()
            print(json.dumps({"progress": [read.seen, total]}), flush=True)

    changes = Library(folder, model, index).update(report)
    notes = [*changes.skipped.hints(), *changes.skipped.unlisted()]
    print(json.dumps({"changes": str(changes), "notes": notes}), flush=True)


if __name__ == "__main__":
    run(lambda: update(*sys.argv[1:]), awake=True)

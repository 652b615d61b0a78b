"""Machines unlike this one: few open files, no home, a temporary folder of another user's, an odd cache."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import llama3v_mlx
from llama3v_mlx import device
from llama3v_mlx.demo import IMAGES
from llama3v_mlx.files import existing


@pytest.mark.parametrize(("hard", "allowed"), [(256, (256, 256)), (4096, (2048, 4096))])
def test_few_open_files(hard: int, allowed: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What mlx-lm does when it is imported is no error for a user who may not raise the hard limit."""
    limits = []

    def setrlimit(kind: int, wanted: tuple[int, int]) -> None:
        if wanted[1] > hard:
            raise ValueError("not allowed to raise maximum limit")
        limits.append(wanted)

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, hard))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    llama3v_mlx._allow_few_open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 4096))
    assert limits == [allowed]


@pytest.mark.parametrize(
    ("given", "cache"),
    [
        ({"XDG_CACHE_HOME": "/a b"}, "/a b"),
        ({"XDG_CACHE_HOME": ""}, "/home/x/.cache"),
        ({"XDG_CACHE_HOME": "here"}, "/home/x/.cache"),
        ({"HOME": None}, "/.cache"),
        ({"HOME": None, "XDG_CACHE_HOME": "/c"}, "/c"),
    ],
)
def test_the_cache(given: dict, cache: str) -> None:
    """It is never in the working folder, and a user without a home, as in a container, may do without one."""
    env = {**os.environ, "HOME": "/home/x", "XDG_CACHE_HOME": ""} | given
    code = "import pwd; pwd.getpwuid = {}.__getitem__; from llama3v_mlx.cli import CACHE; print(CACHE)"
    env = {name: value for name, value in env.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{cache}/llama3v_mlx\n", "")


def test_a_cache_that_cannot_be_written(tmp_path: Path, run_main, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("llama3v_mlx.features.location.CACHE", tmp_path / "file")
    done = run_main("llama3v_mlx.search", IMAGES, "words")
    assert done.returncode == 1 and "--index DIR" in done.stderr.splitlines()[-1]
    assert run_main("llama3v_mlx.search", IMAGES, "words", "--index", tmp_path / "index").returncode == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    """A file that is opened later has another descriptor than theirs, and nothing fails for want of them."""
    code = """
import sys
from llama3v_mlx.cli import run

def command():
    print("to stdout")
    print("to stderr", file=sys.stderr)
    with open(sys.argv[1], "w") as file:
        file.write(f"{file.fileno() > 2} {sys.stdin.read()}")

run(command)
"""
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" "$2" {closed}', sys.executable, code, tmp_path / "written"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and (tmp_path / "written").read_text() == "True "
    assert done.stdout == ("" if " >&-" in f" {closed}" else "to stdout\n")
    assert done.stderr == ("" if "2>&-" in closed else "to stderr\n")


def test_the_disk_of_a_path() -> None:
    """A parent that cannot be looked at is not an error: here its name is too long, elsewhere it is forbidden."""
    assert existing(Path("/", "n" * 300, "m")) == Path("/")
    assert existing(Path("nowhere", "m")) == Path.cwd()


@pytest.mark.parametrize("broken", [None, "of another user", "noexec", "read-only", "absent"])
def test_the_folder_of_kernels(broken: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX compiles none where it could not keep them, or would load another user's."""
    calls = []
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append(broken))
    monkeypatch.setattr(device, "name", lambda: "cpu")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent" if broken == "absent" else tmp_path))
    if broken == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    elif broken == "read-only":
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    elif broken == "noexec":
        monkeypatch.setattr(os, "ST_NOEXEC", 8, raising=False)
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((4096,) * 8 + (8, 255)))
    device.check_kernels.__wrapped__()
    assert calls == ([] if broken is None else [broken])

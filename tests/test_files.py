"""Files on file systems without fsync, locks or links (exFAT, SMB, NFS), fsync on macOS, and keeping a Mac awake."""

import errno
import fcntl
import functools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx import nn

from llama3v_mlx import files, locks
from llama3v_mlx.cli import error_line, keep_awake
from llama3v_mlx.features.repair import verify
from llama3v_mlx.features.store import Features, FeatureStore, StoreInfo
from llama3v_mlx.features.writer import FeatureWriter
from llama3v_mlx.training.run import RunFolder


def refuse(code: int):
    def refused(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return refused


@pytest.fixture(params=[errno.EINVAL, errno.ENOTSUP], ids=errno.errorcode.get)
def poor_disk(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without fsync, locks and links."""
    for module, name in ((os, "fsync"), (os, "symlink"), (fcntl, "flock"), (fcntl, "lockf")):
        monkeypatch.setattr(module, name, refuse(request.param))
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse(request.param))


def test_a_folder_is_written_on_a_poor_disk(poor_disk, tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "new", 0) as partial:
        (partial / "file").write_text("data")
    assert os.listdir(tmp_path / "new") == ["file"]


def test_a_store_is_written_on_a_poor_disk(poor_disk, tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", StoreInfo("model", "patch", "0", 4, "float16"))
    with FeatureWriter(store) as writer:
        assert writer.add([(bytes(32), Features(mx.ones((3, 4)), (3, 1)))]) == 1
    assert verify(tmp_path / "store").good == 1


def test_two_writers_without_locks_do_not_share_files(poor_disk, tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", StoreInfo("model", "patch", "0", 4, "float16"))
    with FeatureWriter(store) as one, FeatureWriter(FeatureStore(tmp_path / "store")) as other:
        for i, writer in enumerate((one, other) * 3):
            writer.add([(bytes([i] * 32), Features(mx.full((3, 4), i), (3, 1)))])
    assert verify(tmp_path / "store").good == 6 and not verify(tmp_path / "store").lost


def test_processes_without_locks_take_turns(poor_disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction is waited for; the lock that a killed process left is removed once it was held too long."""
    store = FeatureStore.create(tmp_path / "store", StoreInfo("model", "patch", "0", 4, "float16"))
    order = []
    with FeatureWriter(store) as writer:
        with writer._database.transaction():
            assert (tmp_path / "store" / "store.db.lock").is_dir()
            other = threading.Thread(target=lambda: order.append(len(FeatureStore(tmp_path / "store"))))
            other.start()
            other.join(0.05)
            order.append("committed")
        other.join()
        assert order == ["committed", 0]
        (tmp_path / "store" / "store.db.lock").mkdir()
        monkeypatch.setattr("llama3v_mlx.features.database.WAIT", 0.05)
        assert writer.add([(bytes(32), Features(mx.ones((3, 4)), (3, 1)))]) == 1
    assert len(FeatureStore(tmp_path / "store")) == 1


def test_a_run_keeps_its_best_on_a_poor_disk(poor_disk, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", {}, resume=False, writes=True)
    model, optimizer = nn.Linear(2, 2), optim.Adam(1e-3)
    optimizer.init(model.trainable_parameters())
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        model.weight = mx.full((2, 2), step)
        folder.save(step, model, optimizer, {"best_step": best}, {"kind": "test"})
    kept = tmp_path / "run" / "best"
    assert mx.load(str(kept / "adapters.safetensors"))["weight"][0, 0].item() == 2
    assert sorted(os.listdir(kept)) == ["adapter_config.json", "adapters.safetensors", "state.json"]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [f"step-{i:07}" for i in (2, 4, 5)]


def test_a_flush_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse(errno.ENOTSUP))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.flush(tmp_path)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_a_store_on_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store = FeatureStore.create(tmp_path / "store", StoreInfo("model", "pooled", "0" * 64, 4, "int8"))
    monkeypatch.setattr(os, call, refuse(errno.EIO))
    with pytest.raises(OSError, match=str(tmp_path / "store")), FeatureWriter(store) as writer:
        writer.add([(bytes(32), Features(mx.ones((3, 4)), (3, 1)))])


def test_a_file_that_can_be_neither_written_nor_cut_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "ftruncate", refuse(errno.EIO))
    (tmp_path / "lines").write_bytes(b"half a line")
    with (tmp_path / "lines").open("a+b", buffering=0) as file:
        with pytest.raises(OSError, match=str(tmp_path / "lines")):
            files.cut_half_line(file)
        monkeypatch.setattr(os, "pwrite", refuse(errno.EIO))
        with pytest.raises(OSError, match=str(tmp_path / "lines")):
            files.append(file, b"another")


def test_one_process_makes_a_folder(tmp_path: Path) -> None:
    """The others end with an error and disturb nothing, whenever they come: before, while and after it is written."""
    make = functools.partial(files.new_folder, tmp_path / "new", 0)
    with make() as partial:
        (partial / "file").write_text("data")
        with pytest.raises(OSError, match="is being written by another process"), make():
            pass
    with pytest.raises(FileExistsError, match="new exists already"), make():
        pass
    assert os.listdir(tmp_path) == ["new"] and (tmp_path / "new" / "file").read_text() == "data"


def test_a_folder_renamed_while_another_process_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker that the other has opened is that of the finished folder: it must neither use nor remove that."""
    lock, other = locks.lock, []

    def renaming(file, wait: bool) -> bool:
        if not other:
            other.append(os.rename(tmp_path / "new.partial", tmp_path / "new"))
        return lock(file, wait)

    (tmp_path / "new.partial").mkdir()
    for name in (files.MARKER, "file"):
        (tmp_path / "new.partial" / name).touch()
    monkeypatch.setattr(locks, "lock", renaming)
    with pytest.raises(FileExistsError, match="new exists already"), files.new_folder(tmp_path / "new", 0):
        pass
    assert os.listdir(tmp_path) == ["new"] and (tmp_path / "new" / "file").exists()


def test_a_cleanup_that_is_interrupted_leaves_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The marker goes last, or the next run would take the folder for the user's."""
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)  # as a kill before the last step
    with pytest.raises(KeyboardInterrupt), files.new_folder(tmp_path / "new", 0) as partial:
        for name in "abc":
            (partial / name).touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "new.partial") == [files.MARKER]


def test_a_marker_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "open_locked", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)), files.new_folder(tmp_path / "new", 0):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", ["nowhere", "folder"])
def test_a_link_in_the_way_of_a_folder(tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "new.partial").symlink_to(target)
    with pytest.raises(FileExistsError, match="new.partial is in the way"), files.new_folder(tmp_path / "new", 0):
        pass
    assert sorted(os.listdir(tmp_path)) == ["folder", "new.partial"]


def test_macos_flushes_the_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a new folder, and the folder itself, is flushed with F_FULLFSYNC."""
    flushed = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, what: flushed.append((os.fstat(fd).st_ino, what)))
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with files.new_folder(tmp_path / "new", 0) as partial:
        (partial / "file").write_text("data")
    for path in (tmp_path / "new" / "file", tmp_path / "new", tmp_path):
        assert (path.stat().st_ino, 51) in flushed


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        assert locks.lock(first)
        assert not locks.lock(second, wait=False)
        first.close()
        assert locks.lock(second, wait=False)


@pytest.fixture
def caffeinate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder where a stand-in for macOS's `caffeinate` records its arguments and how it ended."""
    program = tmp_path / "bin" / "caffeinate"
    program.parent.mkdir()
    # Like the real one, it exits when the process given by -w does.
    program.write_text(
        f"#!{shutil.which('sh')}\n"
        f"cd {shlex.quote(str(tmp_path))}\n"
        'note() { echo "$2" > "$1.partial"; mv "$1.partial" "$1"; }\n'
        "trap 'note end stopped; exit' TERM\n"
        'note notes "$*"\n'
        "while kill -0 $3 2>/dev/null; do sleep 0.02; done\n"
        "note end alone\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.01)
    return path.read_text(encoding="utf-8").strip()


def test_a_mac_is_kept_awake_as_long_as_a_command_runs(caffeinate: Path) -> None:
    with pytest.raises(ValueError), keep_awake():
        assert wait_for(caffeinate / "notes") == f"-i -w {os.getpid()}"
        raise ValueError
    assert wait_for(caffeinate / "end") == "stopped"


def test_a_killed_command_lets_a_mac_sleep(caffeinate: Path) -> None:
    code = "import sys; from llama3v_mlx.cli import run; run(sys.stdin.read, awake=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        assert wait_for(caffeinate / "notes") == f"-i -w {process.pid}"
        process.send_signal(signal.SIGKILL)
    assert wait_for(caffeinate / "end") == "alone"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("embed", ["nowhere.jpg", "--out", "store"]),
        ("train", ["--stage", "pretrain", "--model", "nowhere", "--data", "d", "--features", "f", "--out", "o"]),
        ("convert", ["--hf-path", "nowhere"]),
        ("synthesize", ["--teacher", "nowhere", "--captions", "nowhere", "--out", "o"]),
        ("evaluate", ["--lmms-eval", "nowhere"]),
    ],
)
def test_long_commands_keep_a_mac_awake(module: str, arguments: list[str], monkeypatch, run_main, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("llama3v_mlx.cli.shutil.which", lambda name: asked.append(name))
    assert run_main(f"llama3v_mlx.{module}", *arguments).returncode == 1
    assert asked[0] == "caffeinate"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """But not what a process that lives is writing, nor another file's."""
    dead, alive = tmp_path / "a.999999999.partial", tmp_path / f"a.{os.getppid()}.partial"
    other = tmp_path / "ab.999999999.partial"
    for path in (dead, alive, other):
        path.touch()
    files.write_beside(tmp_path / "a", b"data")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", alive.name, other.name])


@pytest.mark.parametrize("error", [RuntimeError("[write] Unable to write"), OSError(errno.ENOSPC, "full")])
def test_an_error_of_writing_names_the_file(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OSError, match=str(tmp_path / "a")), files.writing(tmp_path / "a"):
        raise error


def test_a_folder_whose_last_flush_fails_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "flush", flush)
    with pytest.raises(OSError, match="new"), files.new_folder(tmp_path / "new", 0) as partial:
        (partial / "file").write_text("data")
    assert os.listdir(tmp_path) == []


NOT_UTF8 = "\udcff"


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_what_mlx_cannot_write_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not valid UTF-8"), files.new_folder(tmp_path / NOT_UTF8 / "new", 0):
        pass
    with pytest.raises(OSError, match="not valid UTF-8"):
        RunFolder(tmp_path / NOT_UTF8, {}, resume=False, writes=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_store_in_a_folder_that_is_not_utf8(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / NOT_UTF8, StoreInfo("model", "patch", "0", 4, "float16"))
    with FeatureWriter(store) as writer:
        writer.add([(bytes(32), Features(mx.ones((3, 4)), (3, 1)))])
    assert verify(tmp_path / NOT_UTF8).good == 1


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"data")
    assert files.read_file(tmp_path / "file") == b"data"
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            files.read_file(path)


def test_printable() -> None:
    harmless = "Ein Bild: 日本 👨‍👩‍👧 \u202f\xa0é\\n"
    assert files.printable(harmless) == harmless
    assert files.printable("\x1b[2J\r\n\x9b\u202e\ud800", keep="\n") == "\\x1b[2J\\r\n\\x9b\\u202e\\ud800"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[malloc] Unable to allocate 99 bytes."), RuntimeError("can't start new thread")],
)
def test_out_of_memory_is_said_so(error: Exception) -> None:
    assert error_line(error).startswith("out of memory (")


def test_an_error_is_one_harmless_line() -> None:
    assert error_line(ValueError("a\x1b[2J\nb")) == "a\\x1b[2J b"


def test_a_full_disk_is_named_by_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path / "out")), files.new_folder(tmp_path / "out", 0):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not any(tmp_path.iterdir())

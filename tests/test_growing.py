"""Interrupted additions to a feature store: Ctrl-C on any line, any failing write, a full disk."""

import contextlib
import errno
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import at_every
from safetensors.numpy import load_file
from test_store import WIDTH, entries, info

import llama3v_mlx
from llama3v_mlx.features.pipeline import Pipeline
from llama3v_mlx.features.repair import verify
from llama3v_mlx.features.sources import Source
from llama3v_mlx.features.store import Features, FeatureStore
from llama3v_mlx.features.writer import FeatureWriter
from llama3v_mlx.tiling import ImageConfig, TiledImage

PACKAGE = Path(llama3v_mlx.__file__).parent
STORE = ("features/store.py", "features/writer.py", "features/database.py", "features/growing.py", "features/shards.py")
FILES = {str(PACKAGE / name) for name in (*STORE, "files.py", "locks.py")}
PIPELINE = {str(PACKAGE / "features" / "pipeline.py")}
ENTRIES = entries(0, 9)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable fsync: no test here simulates a power failure."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def embed(
    folder: Path,
    name_length: int = 4,
    shard_bytes: int = 4096 + 10 * WIDTH,
    on_exception: Callable[[], None] = lambda: None,
) -> None:
    """Add nine entries, three at a time, like `Pipeline`: after an exception, the started batch is finished."""
    with FeatureWriter(FeatureStore.create(folder, info("int8")), shard_bytes) as writer:
        for start in (0, 3, 6):
            batch = ENTRIES[start : start + 3]
            try:
                add(writer, batch, name_length)
            except BaseException:
                on_exception()
                add(writer, batch, name_length)
                raise


def add(writer: FeatureWriter, batch: list, name_length: int) -> None:
    for sha256, _ in batch:
        writer.name(sha256, sha256.hex() * (name_length // 64) + sha256.hex()[: name_length % 64])
    writer.add(batch)


def contents(folder: Path) -> dict:
    """Exact contents of a store: features by SHA-256, and names."""
    store = FeatureStore(folder)
    rows = np.concatenate([np.zeros((0, WIDTH), np.float32), *store.matrix()])
    sizes = store.sizes()
    ends = np.cumsum([count for _, count in sizes])
    found = {sha256: rows[end - count : end].tobytes() for (sha256, count), end in zip(sizes, ends, strict=True)}
    return {"features": found, "names": sorted(store.names())}


def check(folder: Path, expected: dict) -> None:
    """Check a store that was completed after an interruption."""
    assert contents(folder) == expected
    verdict = verify(folder)
    assert (verdict.good, verdict.lost, verdict.restored) == (9, [], 0)
    assert {path.suffix for path in folder.iterdir()} == {".lock", ".json", ".db", ".safetensors"}


def executed_lines(action: Callable[[], None], files: set[str] = FILES) -> Iterator[tuple[str, int, int]]:
    """Yield (file, line, n) for the first and the last execution of each line in `files`."""
    counts: dict[tuple[str, int], int] = {}

    def trace(frame, event, _):
        line = frame.f_code.co_filename, frame.f_lineno
        if line[0] not in files:
            return None
        if event == "line":
            counts[line] = counts.get(line, 0) + 1
        return trace

    with tracing(trace):
        action()
    return ((*line, time) for line, count in counts.items() for time in sorted({1, count}))


def interrupt(action: Callable[[], None], file: str, line: int, time: int) -> None:
    """Run an action with a KeyboardInterrupt before the n-th execution of a line."""
    left = time

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename != file:
            return None
        if event == "line" and frame.f_lineno == line:
            left -= 1
            if not left:
                raise KeyboardInterrupt
        return trace

    with tracing(trace), contextlib.suppress(KeyboardInterrupt):
        action()


@contextlib.contextmanager
def tracing(trace: Callable) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@at_every
def test_ctrl_c_at_any_line_stores_nothing_wrong(tmp_path: Path, every: int) -> None:
    lines = list(executed_lines(lambda: embed(tmp_path / "whole")))
    expected = contents(tmp_path / "whole")
    check(tmp_path / "whole", expected)
    assert len(lines) > 200
    for i, (file, line, time) in enumerate(lines[::every]):
        folder = tmp_path / str(i)
        interrupt(lambda folder=folder: embed(folder), file, line, time)
        if (folder / "store.json").exists():
            found = contents(folder)["features"]
            assert found.items() <= expected["features"].items(), (file, line, time)
        embed(folder)
        check(folder, expected)


class Encoder:
    """Stand-in for the tower with fixed features, to test the pipeline around it."""

    config = SimpleNamespace(patch_size=14)
    tiling = ImageConfig()

    def prepare(self, data: bytes) -> TiledImage:
        return TiledImage((np.frombuffer(data, np.uint8).reshape(1, 1, 3),), None)

    def encode(self, images: list[TiledImage]) -> list[Features]:
        return [Features(mx.full((2, WIDTH), float(image.tiles[0].sum())), (2, 1)) for image in images]

    def flops(self, _: tuple[int, int]) -> float:
        return 1.0


@at_every
def test_ctrl_c_at_any_line_of_the_pipeline(tmp_path: Path, every: int) -> None:
    """Started batches are finished, and the next run does the rest; two of the eleven files are identical."""
    files = {f"{i}.png": bytes([min(i, 9), 1, 1]) for i in range(11)}

    def run(folder: Path) -> None:
        sources = (Source(name, lambda data=data: data) for name, data in files.items())
        with FeatureWriter(FeatureStore.create(folder, info())) as writer:
            Pipeline(Encoder(), writer, 2, 1, lambda _: None).run(sources)

    lines = list(executed_lines(lambda: run(tmp_path / "whole"), PIPELINE))
    expected = contents(tmp_path / "whole")
    assert len(expected["features"]) == 10 and len(expected["names"]) == 11 and len(lines) > 60
    for i, line in enumerate(lines[::every]):
        folder = tmp_path / str(i)
        interrupt(lambda folder=folder: run(folder), *line)
        assert contents(folder)["features"].items() <= expected["features"].items(), line
        run(folder)
        assert contents(folder) == expected, line


@at_every
def test_ctrl_c_while_a_reader_looks_for_more(tmp_path: Path, every: int) -> None:
    """The same reader continues, as in a chat; entries of two writers must not be mixed up."""

    def fill(folder: Path) -> FeatureStore:
        reader = FeatureStore.create(folder, info())
        with FeatureWriter(FeatureStore(folder)) as one, FeatureWriter(FeatureStore(folder)) as other:
            for writer, i in ((one, 0), (other, 3)):
                writer.add(ENTRIES[i : i + 3])
        return reader

    def look(reader: FeatureStore) -> None:
        reader.refresh()
        list(reader.matrix())

    whole = fill(tmp_path / "whole")
    lines = list(executed_lines(lambda: look(whole)))
    assert len(lines) > 40
    for i, line in enumerate(lines[::every]):
        reader = fill(tmp_path / str(i))
        interrupt(lambda reader=reader: look(reader), *line)
        with FeatureWriter(FeatureStore(tmp_path / str(i))) as writer:
            writer.add(ENTRIES[6:])
        reader.refresh()
        assert len(reader) == len(reader.sizes()) == 9
        for sha256, features in ENTRIES:
            np.testing.assert_array_equal(
                np.array(reader.get(sha256).rows), np.array(features.rows).astype(np.float16), str(line)
            )


class Failing:
    """The `os` functions that a store writes with, of which some calls fail.

    "refused": the n-th raises; "short": if it writes, it writes half, and the next two calls raise; "full": it writes
    half, and from then on no write is possible; "done": it does what it should, and then comes Ctrl-C.
    """

    NAMES = ("pwrite", "ftruncate", "rename", "unlink", "fsync")

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = self.at = 0
        self.how = ""
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable) -> Callable:
        def call(*args, **kwargs):
            self.calls += 1
            since = self.calls - self.at if self.at else -1
            writes = name == "pwrite"
            if since == 0 and self.how == "done":
                real(*args, **kwargs)
                raise KeyboardInterrupt
            if since == 0 and self.how in ("short", "full") and writes:
                file, data, offset = args
                return real(file, data[: len(data) // 2], offset)
            last = {"short": 2, "full": 1 << 30 if writes else -1}.get(self.how, 0)
            if 0 <= since <= last:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("how", ["refused", "short", "full", "done"])
def test_any_write_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    disk = Failing(monkeypatch)
    embed(tmp_path / "whole")
    calls, expected = disk.calls, contents(tmp_path / "whole")
    assert calls > 30
    for at in range(1, calls + 1):
        folder = tmp_path / str(at)
        disk.calls, disk.at, disk.how = 0, at, how
        with contextlib.suppress(OSError, KeyboardInterrupt):
            embed(folder)
        disk.at = 0
        if (folder / "store.json").exists():
            found = contents(folder)["features"]
            assert found.items() <= expected["features"].items(), at
            assert how == "short" or len(found) % 3 == 0, at
        embed(folder)
        check(folder, expected)


@pytest.mark.parametrize("before", [0, 2])
def test_what_does_not_count_is_no_part_of_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before) -> None:
    """More rows without records than the end of a sealed shard takes; or no rows that count at all."""
    with FeatureWriter(FeatureStore.create(tmp_path, info("int8"))) as writer:
        writer.add(ENTRIES[:before])
        monkeypatch.setattr(writer, "_insert_names", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.add([(b"\1" * 32, Features(mx.ones((100, WIDTH)), (10, 10)))])
    shards = [path.name for path in tmp_path.glob("shard-*")]
    assert shards == (["shard-000-00000.safetensors"] if before else [])
    for name in shards:
        assert len(load_file(tmp_path / name)["records"]) == before
    assert verify(tmp_path).good == before


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_disk_that_is_really_full(tmp_path: Path, goes_on: bool) -> None:
    """A file size limit truncates names and rows; it is lifted during the same run, or before the next one."""
    one_shard = {"name_length": 700, "shard_bytes": 1 << 20}
    embed(tmp_path / "whole", **one_shard)
    expected = contents(tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    largest = max(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    for limit in range(4000, largest, largest // 50):
        folder = tmp_path / str(limit)
        FeatureStore.create(folder, info("int8"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match=f"(too large|full|I/O error).*: .*{folder}/(store.db|shard-000)"):
                embed(folder, **one_shard, on_exception=make_room if goes_on else lambda: None)
        finally:
            make_room()
        assert contents(folder)["features"].items() <= expected["features"].items()
        embed(folder, **one_shard)
        check(folder, expected)

"""Compaction of an index: nothing is lost by a kill or a full disk, and what others read or write goes on."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from test_library import draw, paths_of
from test_store import WIDTH, entries, info, same

from llama3v_mlx.demo import SIGLIP
from llama3v_mlx.features import compaction
from llama3v_mlx.features.compaction import compact
from llama3v_mlx.features.growing import OpenShard, claim
from llama3v_mlx.features.library import Library
from llama3v_mlx.features.ranking import Ranking
from llama3v_mlx.features.repair import verify
from llama3v_mlx.features.shards import FeatureError
from llama3v_mlx.features.store import Features, FeatureStore
from llama3v_mlx.features.writer import FeatureWriter
from llama3v_mlx.search import main

DAY = 86400


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets the clock forward by days, or backward."""
    now = [compaction.time.time()]
    monkeypatch.setattr(compaction.time, "time", lambda: now[0])
    return lambda days: now.__setitem__(0, now[0] + days * DAY)


def fill(folder: Path, count: int, dtype: str = "float16", writers: int = 1, shard_bytes: int = 6000) -> FeatureStore:
    """A store of `count` entries by several writers, of which every third has a name."""
    store = FeatureStore.create(folder, info(dtype))
    for number in range(writers):
        held = [claim(folder, i) for i in range(number)]
        with FeatureWriter(store, shard_bytes) as writer:
            assert writer.number == number
            for entry in entries(0, count)[number::writers]:
                writer.add([entry])
        for file in held:
            file.close()
    with FeatureWriter(store) as writer:
        for i, (sha256, _) in enumerate(entries(0, count)):
            if i % 3 == 0:
                writer.name(sha256, f"{i}.png")
    return FeatureStore(folder)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("shard-*"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_what_has_a_name_is_kept_exactly(tmp_path: Path, dtype: str) -> None:
    store = fill(tmp_path / "store", 60, dtype, writers=2)
    before, wanted = size(store.folder), entries(0, 60)[::3]
    stored = {sha256: np.array(store.get(sha256).rows.astype(mx.float32)) for sha256, _ in wanted}
    assert compact(store, all_dead=True) == before - size(store.folder) > 0.2 * before
    again = FeatureStore(store.folder)
    assert {sha256 for sha256, _ in again} == set(stored) and verify(store.folder).lost == []
    for reader in (store, again):
        assert all(np.array_equal(np.array(reader.get(key).rows.astype(mx.float32)), stored[key]) for key in stored)
        assert (reader.get(wanted[1][0]).grid, reader.get(wanted[1][0]).cell) == ((2, 1), (1, 3))
    assert compact(store, all_dead=True) == 0
    with FeatureWriter(store) as writer:
        assert writer.add(entries(60, 5)) == 5
    same(store, entries(60, 5), 2e-2)


def test_killed_at_any_moment(tmp_path: Path, run_python) -> None:
    """In a child that ends itself at the n-th change of a file, until one is not ended; then it is done again."""
    wanted = entries(0, 9)[::3]
    kept = {sha256 for sha256, _ in wanted}
    fill(tmp_path / "store", 9, "int8", writers=2, shard_bytes=4300)
    done = run_python("-c", KILLED, tmp_path, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    count = int(done.stdout)
    assert count > 10
    for at in range(count):
        folder = tmp_path / f"{at}"
        store = FeatureStore(folder)
        assert kept <= set(store.keys().tolist()) and verify(folder).lost == []
        compact(store, all_dead=True)
        store.refresh()
        assert set(store.keys().tolist()) == kept and verify(folder).lost == []
        rows = size(folder) - 4096 * len(list(folder.glob("shard-*")))
        assert rows == sum(np.prod(f.rows.shape) + 4 * len(f.rows) + 64 for _, f in wanted)


# Forks a process of its own: one with threads must not, above all on a Mac.
KILLED = """
import os, shutil, sys
from llama3v_mlx.features.compaction import compact
from llama3v_mlx.features.store import FeatureStore

def end_at(at):
    "End this process at a change of a file, as SIGKILL would."
    left = [at]

    def before(change):
        def changed(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return change(*args, **options)

        return changed

    for name in ("pwrite", "rename", "unlink", "ftruncate"):
        setattr(os, name, before(getattr(os, name)))

for at in range(1000):
    folder = shutil.copytree(f"{sys.argv[1]}/store", f"{sys.argv[1]}/{at}")
    child = os.fork()
    if not child:
        end_at(at)
        compact(FeatureStore(folder), all_dead=True)
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        break
print(at + 1)
"""


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path / "store", 30)
    monkeypatch.setattr(OpenShard, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        compact(store, all_dead=True)
    monkeypatch.undo()
    assert len(store) == 30 and verify(store.folder).lost == []
    assert compact(store, all_dead=True) > 0 and len(store) == 10


def test_scattered_entries_are_moved_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each addition waits for the disk."""
    store = fill(tmp_path / "store", 30, shard_bytes=1 << 20)
    written, write = [], OpenShard.write
    monkeypatch.setattr(OpenShard, "write", lambda *arguments: written.append(1) or write(*arguments))
    assert compact(store, all_dead=True) > 0 and len(written) == 1
    same(store, entries(0, 30)[::3])


def test_shards_of_a_process_that_writes_are_left_alone(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 30, writers=2)
    with FeatureWriter(store) as writer:
        assert writer.number == 0 and writer.add(entries(30, 1)) == 1
        assert compact(store, all_dead=True) > 0
        assert {sha256 for sha256, _ in entries(0, 31)[0::2]} <= {sha256 for sha256, _ in store}
        assert writer.add(entries(31, 1)) == 1
        writer.name(entries(31, 1)[0][0], "31.png")
    assert verify(store.folder).lost == [] and compact(store, all_dead=True) > 0 and len(store) == 11


def test_a_reader_of_removed_shards_goes_on(tmp_path: Path) -> None:
    """One that has them open, and one that has only listed them; numbers of shards are not used again."""
    made = info("float32", kind="pooled")
    store = FeatureStore.create(tmp_path / "store", made)
    rows = np.random.default_rng(0).normal(size=(9, 1, WIDTH)).astype(np.float32)
    added = [(bytes([i]) * 32, Features(mx.array(row), (1, 1))) for i, row in enumerate(rows)]
    with FeatureWriter(store, 4096 + 2 * 4 * WIDTH) as writer:
        for entry in added[:8]:
            writer.add([entry])
        for i in (1, 6):
            writer.name(bytes([i]) * 32, f"{i}.png")
    opened, listed = (Ranking(FeatureStore(store.folder)) for _ in range(2))
    found = {ranking: list(ranking.best(rows[6, 0])) for ranking in (opened, listed)}
    listed.store._shards.clear()
    blocks = list(opened.store.matrix())
    assert compact(store, all_dead=True) > 0
    np.testing.assert_array_equal(np.concatenate(blocks), rows[:8, 0])
    for ranking in (opened, listed):
        assert [key for key, _ in ranking.best(rows[6, 0], {bytes([i]) * 32 for i in range(9)})][:1] == [b"\6" * 32]
        assert ranking.refresh() or ranking is listed
        assert sorted(ranking.best(rows[6, 0])) == sorted(pair for pair in found[ranking] if pair[0][0] in (1, 6))
        assert ranking.near_duplicates(-1) == [[b"\1" * 32, b"\6" * 32]]
    with store.database.transaction() as db:
        db.execute("DELETE FROM files")
    assert compact(store, all_dead=True) > 0 and len(store) == size(store.folder) == 0
    with FeatureWriter(store) as writer:
        writer.add(added[8:])
    for ranking in (opened, listed):
        np.testing.assert_array_equal(np.array(ranking.store.get(b"\x08" * 32).rows), rows[8])
        assert ranking.refresh() and [key for key, _ in ranking.best(rows[8, 0])] == [b"\x08" * 32]


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 30)
    path = sorted(store.folder.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[4100] ^= 1
    path.write_bytes(data)
    with pytest.raises(FeatureError, match=f"{path.name}.*--verify"):
        compact(FeatureStore(store.folder), all_dead=True)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    for i in range(10):
        draw(tmp_path / "pictures" / f"{i}.png", i)
    library = Library(tmp_path / "pictures", str(SIGLIP), tmp_path / "index")
    assert library.update().embedded == 10
    return library


def delete(library: Library, *numbers: int) -> int:
    """Delete pictures, update the index, and return the number of its entries."""
    for i in numbers:
        Path(library.folder, f"{i}.png").unlink()
    assert library.update().deleted == len(numbers)
    return len(library.store)


def test_pictures_deleted_long_ago(library: Library, later) -> None:
    assert delete(library, 0, 1, 2, 3, 4, 5) == 10
    later(compaction.KEPT_DAYS - 1)
    assert delete(library, 6) == 10
    later(2)
    assert library.update().deleted == 0 and len(library.store) == 10  # nothing to do, so nothing is looked at
    assert delete(library, 7) == 4  # 8 and 9, and the two of the last days
    assert paths_of(library) == ["8.png", "9.png"] and verify(library.index).good == 4
    assert library.update().embedded == 0


def test_pictures_that_come_back(library: Library, later) -> None:
    delete(library, *range(6))
    later(20)
    for i in range(6):
        draw(Path(library.folder, f"{i}.png"), i)
    changes = library.update()
    assert (changes.added, changes.embedded) == (6, 0)
    assert delete(library, *range(6)) == 10
    later(20)
    assert delete(library, 6) == 10  # 20 days only since they went again


def test_the_command(library: Library, later, capsys) -> None:
    for i in range(5):
        Path(library.folder, f"{i}.png").unlink()
    main([library.folder, "--compact", "--index", str(library.index)])
    said = capsys.readouterr()
    assert "5 deleted" in said.err and len(library.store) == 5
    assert said.out.startswith("compacted: ") and said.out.endswith(" MB freed\n")
    with pytest.raises(SystemExit) as stop:
        main([str(library.index), "--compact"])
    assert stop.value.code == 2 and "these options are for folders" in capsys.readouterr().err

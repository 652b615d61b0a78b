"""The feature store: entries survive kills, full disks and damaged files."""

import contextlib
import hashlib
import locale
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from llama3v_mlx.features.repair import verify
from llama3v_mlx.features.shards import RECORD, FeatureError
from llama3v_mlx.features.sources import file_stat
from llama3v_mlx.features.store import Features as F
from llama3v_mlx.features.store import FeatureStore, StoreInfo
from llama3v_mlx.features.writer import FeatureWriter

WIDTH = 32


def info(dtype: str = "float16", **changes) -> StoreInfo:
    return StoreInfo(**{"model": "m", "kind": "patch", "fingerprint": "f0", "width": WIDTH, "dtype": dtype, **changes})


def entries(start: int, count: int) -> list[tuple[bytes, F]]:
    """Entries of random rows; entry i has 1 + i % 5 of them."""
    made = []
    for i in range(start, start + count):
        rows = np.random.default_rng(i).normal(size=(1 + i % 5, WIDTH)).astype(np.float32)
        made.append((hashlib.sha256(str(i).encode()).digest(), F(mx.array(rows), (3, 2), (2, 1), (1, i % 5))))
    return made


def fill(folder: Path, count: int, dtype: str = "float16", shard_bytes: int = 1 << 20) -> FeatureStore:
    store = FeatureStore.create(folder, info(dtype))
    with FeatureWriter(store, shard_bytes) as writer:
        for start in range(0, count, 4):
            writer.add(entries(start, min(4, count - start)))
    return FeatureStore(folder)


def same(store: FeatureStore, expected: list[tuple[bytes, F]], tolerance: float = 2**-9) -> None:
    for sha256, features in expected:
        rows = np.array(store.get(sha256).rows.astype(mx.float32))
        np.testing.assert_allclose(rows, np.array(features.rows), rtol=tolerance, atol=tolerance)


# Half a unit in the last place of each dtype for values up to 8; for int8, half of max|row| / 127.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 0), ("int8", 2e-2)]
)
def test_rows_come_back(tmp_path: Path, dtype: str, tolerance: float) -> None:
    store = fill(tmp_path / "store", 30, dtype, shard_bytes=6000)
    assert len(store) == 30 and len(list((tmp_path / "store").glob("*.safetensors"))) > 1
    same(store, entries(0, 30), tolerance)
    features = store.get(entries(7, 1)[0][0])
    assert (features.overview, features.grid, features.cell) == ((3, 2), (2, 1), (1, 2))
    assert store.get(b"\0" * 32) is None

    assert [sha256 for sha256, _ in store] == [sha256 for sha256, _ in entries(0, 30)]
    matrix = np.concatenate(list(store.matrix()))
    one_by_one = np.concatenate([np.array(features.rows.astype(mx.float32)) for _, features in store])
    # `get` returns int8 rows as float16: 11 bits.
    np.testing.assert_allclose(matrix, one_by_one, rtol=2**-11 if dtype == "int8" else 0)
    assert verify(tmp_path / "store").good == 30


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 5, "float32")
    (path,) = (tmp_path / "store").glob("*.safetensors")
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["features"], np.concatenate([np.array(f.rows) for _, f in entries(0, 5)]))
    assert tensors["records"].view(RECORD)["sha256"].tolist() == [[sha256] for sha256, _ in store]


def test_each_image_is_stored_once(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", info())
    with FeatureWriter(store) as one, FeatureWriter(FeatureStore(tmp_path / "store")) as other:
        assert one.number != other.number
        assert one.add([*entries(0, 4), *entries(0, 2)]) == 4
        assert other.add(entries(2, 4)) == 2
        one.name(entries(0, 1)[0][0], "a.jpg")
        other.name(entries(0, 1)[0][0], "b.jpg")
        one.name(entries(0, 1)[0][0], "a.jpg")
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 6
    assert sorted(name for _, name in store.names()) == ["a.jpg", "b.jpg"]
    same(store, entries(0, 6))


def test_rows_can_be_read_while_others_are_written(tmp_path: Path) -> None:
    reader = FeatureStore.create(tmp_path / "store", info("int8"))
    with FeatureWriter(FeatureStore(tmp_path / "store")) as writer:
        for start in (0, 4, 8):
            writer.add(entries(start, 4))
            reader.refresh()
            same(reader, entries(0, start + 4), 2e-2)
    same(reader, entries(0, 12), 2e-2)


WRITE_FOREVER = """
import itertools, os, sys
sys.path.insert(0, {tests!r})
from test_store import *
from llama3v_mlx.features import database
database.SYNCHRONOUS = "OFF"  # power does not fail
os.fsync = lambda _: None
store = FeatureStore.create({store!r}, info({dtype!r}))
writer = FeatureWriter(store, shard_bytes=20000)
for i in itertools.count():
    writer.add(entries(i * 3, 3))
    print(i * 3 + 3, flush=True)
    if {reopened}:
        writer.close()
        writer = FeatureWriter(store, shard_bytes=20000)
"""


@pytest.mark.parametrize(("dtype", "reopened"), [("float16", False), ("int8", False), ("int8", True)])
def test_a_kill_loses_nothing_that_was_added(tmp_path: Path, dtype: str, reopened: bool) -> None:
    tests, store = str(Path(__file__).parent), str(tmp_path / "store")
    script = WRITE_FOREVER.format(tests=tests, store=store, dtype=dtype, reopened=reopened)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    added = 0
    while added < 150:
        added = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    added = int((process.stdout.read().split() or [added])[-1])
    process.wait()

    assert reopened or list((tmp_path / "store").glob("*.open"))
    store = FeatureStore(tmp_path / "store")
    found = len(store)
    assert found >= added
    same(store, entries(0, added), 2e-2)
    with FeatureWriter(store) as writer:
        assert writer.number == 0
        assert writer.add(entries(0, found + 5)) == 5
    assert not list((tmp_path / "store").glob("*.open")) + list((tmp_path / "store").glob("*.scales"))
    same(FeatureStore(tmp_path / "store"), entries(0, found + 5), 2e-2)
    assert verify(tmp_path / "store").good == found + 5


def test_a_transaction_flushes_the_removal_of_its_journal(tmp_path: Path, run_python) -> None:
    """Otherwise a loss of power could bring the journal back, which would undo the transaction (SQLite's FULL)."""
    fill(tmp_path / "store", 1)
    ask = "import sys, pathlib; from llama3v_mlx.features.database import Database; "
    ask += "print(Database(pathlib.Path(sys.argv[1])).rows('PRAGMA synchronous'))"
    assert run_python("-c", ask, tmp_path / "store").stdout == "[(3,)]\n"  # EXTRA; tests use OFF themselves


def killed(folder: Path) -> Path:
    """Add ten entries without sealing their shard, as a writer that is killed; return the shard."""
    writer = FeatureWriter(FeatureStore.create(folder, info()))
    writer.add(entries(0, 10))
    del writer
    (path,) = folder.glob("*.open")
    return path


def test_half_written_rows_are_never_taken_for_whole(tmp_path: Path) -> None:
    """As after a power failure on a disk that does not flush: the database lists more rows than the shard has."""
    folder = tmp_path / "store"
    path = killed(folder)
    with path.open("r+b") as shard:
        shard.truncate(path.stat().st_size - 1)
    with FeatureWriter(FeatureStore(folder)):
        pass
    store = FeatureStore(folder)
    assert len(store) == 9
    same(store, entries(0, 9))


def test_rows_without_a_transaction_are_cut(tmp_path: Path) -> None:
    """Killed before the commit, with rows in the shard and SQLite's journal beside the database."""
    folder = tmp_path / "store"
    fill(folder, 4)
    script = """
import os, sys
sys.path.insert(0, {tests!r})
from test_store import *
writer = FeatureWriter(FeatureStore({folder!r}))
writer._insert_names = lambda db: (db.execute("PRAGMA cache_spill = 1"), db.execute("PRAGMA cache_size = 1"),
    db.execute("UPDATE entries SET crc32 = 0"), db.executemany("INSERT INTO files (sha256, path) VALUES (?, ?)",
    [(bytes(1000), bytes(1000))] * 100), os._exit(9))
writer.add(entries(4, 3))
"""
    script = script.format(tests=str(Path(__file__).parent), folder=str(folder))
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    (path,) = folder.glob("*.open")
    assert path.stat().st_size > 4096 + 2 * WIDTH * (1 + 2 + 3 + 4) and (folder / "store.db-journal").stat().st_size
    same(FeatureStore(folder), entries(0, 4))
    assert len(FeatureStore(folder)) == 4 and not list(FeatureStore(folder).names())
    fill(folder, 8)
    same(FeatureStore(folder), entries(0, 8))
    assert verify(folder).good == 8


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", info())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FeatureWriter(store) as writer:
        writer.add(entries(0, 10))
        (path,) = (tmp_path / "store").glob("*.open")
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                writer.add(entries(10, 10))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        same(store, entries(0, 10))
        assert writer.add(entries(8, 4)) == 2
    store = FeatureStore(tmp_path / "store")
    assert len(store) == 12 and verify(tmp_path / "store").good == 12
    same(store, entries(0, 12))


def test_a_truncated_shard_is_named_and_verify_keeps_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    fill(folder, 40, shard_bytes=6500)
    paths = sorted(folder.glob("*.safetensors"))
    assert len(paths) > 2
    with paths[0].open("r+b") as shard:
        shard.truncate(5000)
    store = FeatureStore(folder)
    with pytest.raises(FeatureError, match=f"{paths[0].name}: damaged or cut short; .*--verify"):
        store.get(entries(0, 1)[0][0])
    same(store, entries(39, 1))

    verdict = verify(folder)
    assert verdict.good < 40 and len(verdict.lost) == 1
    assert len(FeatureStore(folder)) == verdict.good
    assert verify(folder).lost == [] and paths[0].with_suffix(".damaged").exists()
    fill(folder, 40)
    same(FeatureStore(folder), entries(0, 40))


def change_a_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0] ^ 1
        file.seek(offset)
        file.write(bytes([byte]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_changed_byte_is_an_error_until_it_is_repaired(tmp_path: Path, dtype: str) -> None:
    folder = tmp_path / "store"
    fill(folder, 10, dtype)
    (path,) = folder.glob("*.safetensors")
    row_bytes = WIDTH * {"float32": 4, "int8": 1}.get(dtype, 2)
    change_a_byte(path, 4096 + row_bytes + 5)  # in the second entry, rows 1 and 2
    if dtype == "int8":
        change_a_byte(path, 4096 + 30 * row_bytes + 4 * 3)  # the scale of the third entry's first row
    store = FeatureStore(folder)
    message = f"{path.name}: rows 1 to 2 do not match their checksum; .*embed --verify .*store"
    with pytest.raises(FeatureError, match=message):
        store.get(entries(1, 1)[0][0])
    with pytest.raises(FeatureError, match=message):
        list(store.matrix())
    same(store, [*entries(0, 1), *entries(3, 7)], 2e-2)

    bad = 2 if dtype == "int8" else 1
    verdict = verify(folder)
    assert (verdict.good, verdict.lost) == (10 - bad, [f"{bad} entries of {path}: checksum mismatch or not finite"])
    verdict = verify(folder)
    assert (verdict.good, verdict.lost, verdict.restored) == (10 - bad, [], 0)
    assert sum(map(len, FeatureStore(folder).matrix())) == {"int8": 25}.get(dtype, 28)
    fill(folder, 10, dtype)
    same(FeatureStore(folder), entries(0, 10), 2e-2)
    assert verify(folder).good == 10


def test_a_shard_without_a_good_entry_is_set_aside(tmp_path: Path) -> None:
    """All rows are shifted by one, as if stored after an uncommitted row."""
    folder = tmp_path / "store"
    fill(folder, 10)
    (path,) = folder.glob("*.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:4096] + bytes(2 * WIDTH) + data[4096 : -2 * WIDTH])
    with pytest.raises(FeatureError, match="damaged or cut short|do not match their checksum"):
        FeatureStore(folder).get(entries(0, 1)[0][0])
    assert len(verify(folder).lost) == 1 and verify(folder).lost == []
    assert path.with_suffix(".damaged").exists()


def test_an_entry_is_compared_with_its_checksum_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(tmp_path / "store", 10)
    same(store, entries(0, 10))
    monkeypatch.setattr("llama3v_mlx.features.shards.checksums", lambda *_: pytest.fail("computed again"))
    same(store, entries(0, 10))
    list(store.matrix())


def test_a_writer_goes_on_where_verify_has_dropped_an_entry(tmp_path: Path) -> None:
    """In an unsealed shard with a gap, rows after the gap are kept and not overwritten."""
    folder = tmp_path / "store"
    path = killed(folder)
    change_a_byte(path, 4096 + 5)
    assert verify(folder).good == 9
    fill(folder, 12)
    same(FeatureStore(folder), entries(0, 12))
    assert verify(folder).good == 12


@pytest.mark.parametrize("damage", ["header", "page", "cut", "empty", "gone"])
def test_a_damaged_database_is_named_and_rebuilt(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "store"
    with FeatureWriter(FeatureStore.create(folder, info("int8")), shard_bytes=5000) as writer:
        for i, (sha256, features) in enumerate(entries(0, 60)):
            writer.name(sha256, f"{i}.png" + "x" * 200)
            writer.add([(sha256, features)])
    database = folder / "store.db"
    data = database.read_bytes()
    schema, pages = data[:4096], len(data) // 4096
    database.write_bytes(
        {
            "header": b"\0" * 100 + data[100:],
            "page": schema + b"\xff" * 4096 * (pages // 2) + data[4096 * (1 + pages // 2) :],
            "cut": data[: len(data) // 2],
            "empty": b"",
            "gone": b"",
        }[damage]
    )
    if damage == "gone":
        database.unlink()
    with pytest.raises(FeatureError, match=f"{database}: (damaged|is missing).*; llama3v embed --verify {folder}"):
        store = FeatureStore(folder)
        same(store, entries(0, 60), 2e-2)
        list(store.names())
    verdict = verify(folder)
    assert (verdict.good, verdict.restored, len(verdict.lost)) == (60, 60, 1) and str(database) in verdict.lost[0]
    same(FeatureStore(folder), entries(0, 60), 2e-2)
    verdict = verify(folder)
    assert (verdict.good, verdict.restored, verdict.lost) == (60, 0, [])
    assert set(FeatureStore(folder).names()) <= {(k, f"{i}.png" + "x" * 200) for i, (k, _) in enumerate(entries(0, 60))}
    fill(folder, 62, "int8")
    same(FeatureStore(folder), entries(0, 62), 2e-2)


def test_names_of_any_bytes_and_inodes_of_any_size(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", 1)
    ((sha256, _),) = entries(0, 1)
    names = ["a\nb", "\udcff", "\ud800", "caf\u00e9", "nul\0", ""]
    stat = file_stat(os.stat_result([0, 2**64 - 1, 0, 0, 0, 0, 5, 0, 0, 0], {"st_mtime_ns": 2**63, "st_ctime_ns": -1}))
    with FeatureWriter(store) as writer:
        for name in names * 2:
            writer.name(sha256, name, stat)
    assert [found[:3] for found in store.files_where("TRUE")] == [(sha256, name, stat) for name in names]
    assert sorted(store.files_at(names[:3])) == sorted((sha256, name, stat) for name in names[:3])


def test_a_store_is_read_where_nothing_can_be_written() -> None:
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own can be entered by its user only
        folder = Path(temporary) / "store"
        fill(folder, 5)
        for path, mode in ((Path(temporary), 0o755), (folder, 0o555), *((path, 0o444) for path in folder.iterdir())):
            path.chmod(mode)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root could write
        try:
            with pytest.raises(PermissionError):
                (folder / "new").touch()
            store = FeatureStore(folder)
            same(store, entries(0, 5))
            assert sum(map(len, store.matrix())) == 15 and not list(store.names())
            with pytest.raises(OSError, match="Permission denied: .*writer-000.lock"):
                FeatureWriter(store)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_shard_grows_from_writer_to_writer(tmp_path: Path, dtype: str) -> None:
    """Each image is added by its own writer; a store opened before reads all of them."""
    folder = tmp_path / "store"
    store = FeatureStore.create(folder, info(dtype))
    for i in range(30):
        with FeatureWriter(FeatureStore(folder)) as writer:
            assert writer.add(entries(i, 1)) == 1
        store.refresh()
        same(store, entries(i // 2, i - i // 2 + 1), 2e-2)
    (path,) = folder.glob("shard-*")
    tensors = load_file(path)
    assert len(tensors["records"]) == 30 and len(tensors["features"]) == store.num_rows == 90
    assert verify(folder).good == 30
    same(FeatureStore(folder), entries(0, 30), 2e-2)


def test_a_full_shard_does_not_grow(tmp_path: Path) -> None:
    fill(tmp_path / "store", 10, shard_bytes=4500)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").glob("*.safetensors")}
    with FeatureWriter(FeatureStore(tmp_path / "store"), shard_bytes=4500) as writer:
        writer.add(entries(10, 1))
    after = {path.name: path.read_bytes() for path in (tmp_path / "store").glob("*.safetensors")}
    assert len(after) == len(before) + 1 and before.items() < after.items()


@pytest.mark.parametrize("damage", ["database", "shard"])
def test_a_shard_does_not_grow_over_what_can_be_repaired(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "store"
    fill(folder, 10)
    (path,) = folder.glob("*.safetensors")
    if damage == "database":
        forget(folder, "start > 9")
    else:
        path.write_bytes(path.read_bytes()[:5000])
    before = path.read_bytes()
    with FeatureWriter(FeatureStore(folder)) as writer:
        writer.add(entries(10, 2))
    assert path.read_bytes() == before
    same(FeatureStore(folder), entries(10, 2))
    assert verify(folder).good == (12 if damage == "database" else 2)


def forget(folder: Path, which: str) -> None:
    """Remove entries from a database."""
    with contextlib.closing(sqlite3.connect(folder / "store.db")) as db, db:
        assert db.execute(f"DELETE FROM entries WHERE {which}").rowcount > 0


@pytest.mark.parametrize("language", ["C", "tr_TR.UTF-8"])
def test_verify_puts_back_what_the_database_has_lost(tmp_path: Path, language: str) -> None:
    """And counts it, also where "INSERT" in small letters is not "insert"."""
    fill(tmp_path / "store", 10)
    forget(tmp_path / "store", "1")
    assert len(FeatureStore(tmp_path / "store")) == 0
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, language)
        assert verify(tmp_path / "store").restored == 10
    except locale.Error:
        pytest.skip("a Mac has this locale, but not this machine")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    same(FeatureStore(tmp_path / "store"), entries(0, 10))


def test_verify_waits_for_writers(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "store", info())
    with FeatureWriter(store), pytest.raises(FeatureError, match="a process is writing to it"):
        verify(tmp_path / "store")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "f1", "model": "n"}, "made with other weights, compute dtype or preprocessing"),
        ({"dtype": "int8"}, "holds dtype float16, not int8"),
        ({"kind": "pooled"}, "holds kind patch, not pooled"),
    ],
)
def test_one_store_is_of_one_model(tmp_path: Path, change: dict, message: str) -> None:
    fill(tmp_path / "store", 1)
    with pytest.raises(FeatureError, match=message):
        FeatureStore.create(tmp_path / "store", info(**change))


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FeatureError, match="not a feature store and not empty"):
        FeatureStore.create(tmp_path, info())
    with pytest.raises(FeatureError, match="not a feature store"):
        FeatureStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_rows_must_be_finite(tmp_path: Path, value: float) -> None:
    store = FeatureStore.create(tmp_path / "store", info())
    with FeatureWriter(store) as writer, pytest.raises(FeatureError, match="not finite numbers in float16"):
        writer.add([(b"\1" * 32, F(mx.full((1, WIDTH), value), (1, 1)))])
    assert len(FeatureStore(tmp_path / "store")) == 0

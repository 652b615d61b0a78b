"""The feature store: what is put in comes out, whatever happens to the process or the files in between."""

import hashlib
import resource
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from llama3v_mlx.features.shards import RECORD, FeatureError
from llama3v_mlx.features.store import Features as F
from llama3v_mlx.features.store import FeatureStore, FeatureWriter, StoreInfo, verify

WIDTH = 32


def info(dtype: str = "float16", **changes) -> StoreInfo:
    return StoreInfo(**{"model": "m", "kind": "patch", "fingerprint": "f0", "width": WIDTH, "dtype": dtype, **changes})


def entries(start: int, count: int) -> list[tuple[bytes, F]]:
    """Entry i has 1 + i % 5 rows of random numbers."""
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


# Half a unit in the last place of each dtype at numbers up to 8; for int8, half of (largest of a row) / 127.
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
    # Entry by entry, int8 rows come as float16: 11 bits.
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
import itertools, sys
sys.path.insert(0, {tests!r})
from test_store import *
with FeatureWriter(FeatureStore.create({store!r}, info({dtype!r})), shard_bytes=20000) as writer:
    for i in itertools.count():
        writer.add(entries(i * 3, 3))
        print(i * 3 + 3, flush=True)
"""


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_kill_loses_nothing_that_was_added(tmp_path: Path, dtype: str) -> None:
    script = WRITE_FOREVER.format(tests=str(Path(__file__).parent), store=str(tmp_path / "store"), dtype=dtype)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    added = 0
    while added < 150:
        added = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    added = int((process.stdout.read().split() or [added])[-1])
    process.wait()

    assert list((tmp_path / "store").glob("*.open"))
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


def test_half_written_rows_are_never_taken_for_whole(tmp_path: Path) -> None:
    """As after a loss of power: the manifest says more than the shard has, and ends in half a record."""
    folder = tmp_path / "store"
    writer = FeatureWriter(FeatureStore.create(folder, info()))
    writer.add(entries(0, 10))
    writer._manifest.close()  # no sealing: the process is gone
    (path,) = folder.glob("*.open")
    with path.open("r+b") as shard:
        shard.truncate(path.stat().st_size - 1)
    with (folder / "manifest-000.bin").open("ab") as manifest:
        manifest.write(b"\1" * 20)
    with FeatureWriter(FeatureStore(folder)):
        pass
    store = FeatureStore(folder)
    assert len(store) == 9
    same(store, entries(0, 9))


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


def test_verify_sees_a_changed_byte(tmp_path: Path) -> None:
    fill(tmp_path / "store", 10)
    (path,) = (tmp_path / "store").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[4096 + 5] ^= 1
    path.write_bytes(data)
    verdict = verify(tmp_path / "store")
    assert (verdict.good, len(verdict.lost)) == (9, 1)


def test_verify_puts_back_what_a_manifest_has_lost(tmp_path: Path) -> None:
    fill(tmp_path / "store", 10)
    (tmp_path / "store" / "manifest-000.bin").unlink()
    assert len(FeatureStore(tmp_path / "store")) == 0
    assert verify(tmp_path / "store").restored == 10
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

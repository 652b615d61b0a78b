"""Feature stores with odd values in store.json and store.db, or links out of the folder: named, never wrong rows."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from test_store import entries, info, same

from llama3v_mlx.demo import IMAGES, SIGLIP
from llama3v_mlx.features.encoder import load_encoder_of
from llama3v_mlx.features.repair import verify
from llama3v_mlx.features.shards import HEADER_BYTES, FeatureError
from llama3v_mlx.features.store import FeatureStore
from llama3v_mlx.features.writer import FeatureWriter
from llama3v_mlx.fields import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of six entries with a name each, in one sealed shard."""
    with FeatureWriter(FeatureStore.create(tmp_path / "store", info())) as writer:
        for i, (sha256, _) in enumerate(entries(0, 6)):
            writer.name(sha256, f"{i}.png")
        writer.add(entries(0, 6))
    return tmp_path / "store"


@pytest.mark.parametrize(
    ("key", "value"),
    [("kind", 3), ("width", "16"), ("width", 0), ("dtype", {}), ("dtype", "float64"), ("compute_dtype", 7)]
    + [("fingerprint", None), ("model", []), ("draft", "no"), ("format", [2])],
)
def test_odd_values_of_store_json_are_named(folder: Path, key: str, value: object) -> None:
    path = folder / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=str(path)):
        FeatureStore(folder)


def test_a_store_whose_model_is_gone_is_named(folder: Path) -> None:
    path = folder / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "a\nb"}))
    with pytest.raises(CheckpointError, match=f"(?s){folder}.*no such folder"):
        load_encoder_of(FeatureStore(folder))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE entries SET sha256 = 7 WHERE start = 0",
        "UPDATE entries SET crc32 = 'x' WHERE start = 0",
        "UPDATE entries SET rows = -1 WHERE start = 0",
        "UPDATE entries SET grid_rows = 1 << 40 WHERE start = 0",
        "UPDATE files SET path = 'a text' WHERE id = 1",
    ],
)
def test_odd_values_of_the_database_are_named_and_repaired(folder: Path, change: str) -> None:
    with sqlite3.connect(folder / "store.db") as db:
        db.execute(change)
    store = FeatureStore(folder)
    with pytest.raises(FeatureError, match="--verify"):
        list(store.names())
        [store.get(sha256) for sha256 in store.keys().tolist()]
    verdict = verify(folder)
    assert len(verdict.lost) == 1 and verdict.good == 6 and "1 damaged rows" in verdict.lost[0]
    assert verify(folder).lost == []
    same(FeatureStore(folder), entries(0, 6))


def test_an_entry_without_rows_is_damaged(folder: Path) -> None:
    with sqlite3.connect(folder / "store.db") as db:
        db.execute("UPDATE entries SET rows = 0 WHERE start = 0")
    with pytest.raises(FeatureError, match="--verify"):
        list(FeatureStore(folder).matrix())


@pytest.mark.parametrize("value", ["X'2E2E'", "'x'", "1 << 40", "-1"])
def test_an_odd_grid_is_damaged(folder: Path, value: str) -> None:
    """It is read without the entry's features, before an image is asked about."""
    with sqlite3.connect(folder / "store.db") as db:
        db.execute(f"UPDATE entries SET grid_rows = {value}")
    store = FeatureStore(folder)
    with pytest.raises(FeatureError, match="--verify"):
        store.grid(store.keys()[0].tobytes())


@pytest.mark.parametrize("change", ["sha256 = zeroblob(32)", "grid_columns = 1"])
def test_an_entry_that_is_not_its_shards_is_an_error(folder: Path, change: str) -> None:
    """Rows that match their checksum, but under the name of another image, or of another arrangement."""
    with sqlite3.connect(folder / "store.db") as db:
        db.execute(f"UPDATE entries SET {change} WHERE start = 0")
    store = FeatureStore(folder)
    with pytest.raises(FeatureError, match="its records differ"):
        store.get(store.keys()[0].tobytes())
    verify(folder)
    assert verify(folder).good == 6
    same(FeatureStore(folder), entries(0, 6))


@pytest.mark.parametrize("name", ["store.db", "shard-000-00000.safetensors"])
def test_a_link_out_of_the_store_is_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(FeatureError, match=str(folder / name)):
        list(FeatureStore(folder))


def test_verify_copies_no_device(folder: Path) -> None:
    (folder / "store.db").unlink()
    (folder / "store.db").symlink_to("/dev/null")
    with pytest.raises(FeatureError, match="not a regular file"):
        verify(folder)


def test_verify_locks_no_file_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    (folder / "writer-000.lock").unlink()
    (folder / "writer-000.lock").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="writer-000.lock"):
        verify(folder)


def test_no_writer_follows_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"mine")
    (folder / "shard-000-00001.open").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="shard-000-00001.open"), FeatureWriter(FeatureStore(folder)) as writer:
        writer.add(entries(6, 1))
    assert (tmp_path / "other").read_bytes() == b"mine"


def test_an_export_that_fails_leaves_no_folder(run_main, folder: Path, tmp_path: Path) -> None:
    (folder / "shard-000-00000.safetensors").write_bytes(b"")
    done = run_main("llama3v_mlx.embed", "--out", folder, "--export", tmp_path / "export")
    assert done.returncode == 1 and "shard-000-00000" in done.stderr
    assert not (tmp_path / "export").exists()


def test_a_damaged_database_is_no_images_fault(run_main, tmp_path: Path) -> None:
    command = ("llama3v_mlx.embed", "--model", SIGLIP, "--out", tmp_path / "store")
    assert run_main(*command, IMAGES / "42.png").returncode == 0
    path = tmp_path / "store" / "store.db"
    with sqlite3.connect(path) as db:
        [(size,)] = db.execute("PRAGMA page_size")
        [(page,)] = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_entries_1'")
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    done = run_main(*command, IMAGES / "one-purple-cross.jpg", IMAGES / "two-red-stars.jpg")
    assert done.returncode == 1 and "failed" not in done.stderr
    assert done.stderr.count("error: ") == done.stderr.count(f"{path}: damaged (database disk image is malformed)") == 1


def test_a_header_nested_too_deeply_is_damaged(folder: Path) -> None:
    with (folder / "shard-000-00000.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"[" * (HEADER_BYTES - 8))
    with pytest.raises(FeatureError, match="shard-000-00000.*damaged"):
        list(FeatureStore(folder))

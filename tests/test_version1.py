"""Feature stores of version 1, with manifests and lists of names, are migrated when they are opened."""

import contextlib
import errno
import fcntl
import json
import os
import sqlite3
from pathlib import Path

import pytest
from conftest import at_every
from test_growing import executed_lines, interrupt, no_waiting_for_the_disk  # noqa: F401  (a fixture)
from test_store import entries, fill, info, same

import llama3v_mlx
from llama3v_mlx.features.repair import verify
from llama3v_mlx.features.shards import COLUMNS, to_records
from llama3v_mlx.features.sources import file_stat
from llama3v_mlx.features.store import FeatureStore
from llama3v_mlx.features.writer import FeatureWriter

PACKAGE = Path(llama3v_mlx.__file__).parent
FILES = {str(PACKAGE / "features" / name) for name in ("version1.py", "database.py")} | {str(PACKAGE / "files.py")}
STAT = [5, 1_700_000_000_000_000_000, 1_700_000_000_000_000_001, 2**64 - 2]
KNOWN = (5, 1_700_000_000_000_000_000, 1_700_000_000_000_000_001, -2)


def make_version_1(folder: Path, count: int = 10, growing: bool = False) -> Path:
    """Make a store and take it back to version 1, with two names; with `growing`, as after a kill."""
    if growing:
        writer = FeatureWriter(FeatureStore.create(folder, info()))
        writer.add(entries(0, count))
        del writer
    else:
        fill(folder, count)
    with contextlib.closing(sqlite3.connect(folder / "store.db")) as db:
        rows = db.execute(f"SELECT {', '.join(COLUMNS)} FROM entries ORDER BY start").fetchall()
    (folder / "manifest-000.bin").write_bytes(to_records(rows).tobytes() + b"half a record")
    lines = [{"sha256": rows[0][0].hex(), "path": "a"}, {"sha256": rows[1][0].hex(), "path": "b", "stat": STAT}]
    (folder / "names-000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"sha256": "ab')
    values = json.loads((folder / "store.json").read_text())
    del values["format"]
    (folder / "store.json").write_text(json.dumps(values | {"version": 1}))
    for path in (folder / "store.db", *folder.glob("writer-*")):
        path.unlink()
    return folder


def check(store: FeatureStore, count: int = 10) -> None:
    assert len(store) == count
    same(store, entries(0, count))
    (first, _), (second, _) = entries(0, 2)
    found = [(sha256, path, stat) for sha256, path, stat, _ in store.files_where("TRUE")]
    assert found == [(first, "a", (None,) * 4), (second, "b", KNOWN)]


@pytest.mark.parametrize("growing", [False, True])
def test_a_store_of_version_1_is_migrated(tmp_path: Path, growing: bool) -> None:
    folder = make_version_1(tmp_path / "store", growing=growing)
    (shard,) = folder.glob("shard-*")
    before = file_stat(shard.stat())
    check(FeatureStore(folder))
    assert file_stat(shard.stat()) == before
    assert sorted(path.name for path in folder.iterdir()) == [shard.name, "store.db", "store.json", "store.lock"]
    with FeatureWriter(FeatureStore(folder)) as writer:
        assert writer.add(entries(8, 4)) == 2
    check(FeatureStore(folder), 12)
    assert verify(folder).good == 12 and len(list(folder.glob("shard-*.safetensors"))) == 1


def test_versions_that_know_no_database_refuse_it(tmp_path: Path) -> None:
    """They construct their metadata from store.json, whose keys they do not all know, and then report its version."""
    fill(tmp_path / "store", 1)
    known = {"model", "kind", "fingerprint", "width", "dtype", "compute_dtype", "draft", "version"}
    values = json.loads((tmp_path / "store" / "store.json").read_text())
    assert values.keys() - known == {"format"} and values["format"] == 2
    (tmp_path / "store" / "store.json").write_text(json.dumps(values | {"format": 3}))
    with pytest.raises(ValueError, match=r"store\.json: written by another version"):
        FeatureStore(tmp_path / "store")


@at_every
def test_an_interrupted_migration_is_done_again(tmp_path: Path, every: int) -> None:
    lines = list(executed_lines(lambda: FeatureStore(make_version_1(tmp_path / "whole")), FILES))
    assert len(lines) > 60
    for i, line in enumerate(lines[::every]):
        folder = make_version_1(tmp_path / str(i), 2)
        (folder / "store.db.1.partial").write_bytes(b"left by a kill")
        interrupt(lambda folder=folder: FeatureStore(folder), *line)
        check(FeatureStore(folder), 2)
        with FeatureWriter(FeatureStore(folder)):
            pass
        assert not [*folder.glob("manifest-*"), *folder.glob("names-*"), *folder.glob("*partial*")], line


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_store_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    folder = make_version_1(tmp_path / "store")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "touch", refused)
    store = FeatureStore(folder)
    check(store)
    with pytest.raises(OSError, match=os.strerror(code)):
        FeatureWriter(store)
    with pytest.raises(OSError, match=os.strerror(code)):
        verify(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    check(FeatureStore(folder))


def test_a_store_that_an_older_version_writes_to_is_read(tmp_path: Path) -> None:
    folder = make_version_1(tmp_path / "store")
    with (folder / "manifest-000.bin").open("r+b") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        check(store := FeatureStore(folder))
        with pytest.raises(OSError, match="an older version of llama3v is writing to it"):
            FeatureWriter(store)
        assert (folder / "manifest-000.bin").exists() and not (folder / "store.db").exists()
    check(FeatureStore(folder))
    assert (folder / "store.db").exists()


HALF = '{"sha256": "' + "ab" * 20


@pytest.mark.parametrize(
    "line",
    [
        HALF,
        HALF + '{"sha256": "' + "ab" * 32 + '", "path": "a.jpg"}',
        "",
        "[]",
        "7",
        '{"path": "a.jpg"}',
        '{"sha256": "abc", "path": "a.jpg"}',
        '{"sha256": "' + "ab" * 31 + '", "path": "a.jpg"}',
        '{"sha256": "' + "ab" * 32 + '", "path": ["a.jpg"]}',
        '{"sha256": "' + "ab" * 32 + '", "path": "a.jpg", "stat": [1]}',
        '{"sha256": "' + "ab" * 32 + '", "path": "a.jpg", "stat": [1, 2, 3, Infinity]}',
        '{"sha256": 7, "path": "a.jpg"}',
        "\0" * 100,
        "\udcff",
        "[" * 100_000,
    ],
)
def test_a_damaged_name_is_skipped_and_named(tmp_path: Path, capsys, line: str) -> None:
    folder = make_version_1(tmp_path / "store")
    names = folder / "names-000.jsonl"
    first, second, half = names.read_text().split("\n")
    names.write_text(f"{first}\n{line}\n{second}\n{half}", errors="surrogateescape")
    for _ in range(2):
        check(FeatureStore(folder))
    said = capsys.readouterr().err
    assert said == f"note: {names}:2: damaged, skipped; embed the images again to record it\n"

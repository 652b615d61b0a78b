"""Training finds features by the current state of an image file, not by former names of it or of other files."""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llama3v_mlx import embed, train
from llama3v_mlx.demo import CHECKPOINT
from llama3v_mlx.features.image_files import known_images, look_up
from llama3v_mlx.features.store import FeatureStore
from llama3v_mlx.features.writer import FeatureWriter
from llama3v_mlx.training.loop import Loop

COUNT = 4


def draw(folder: Path, first: int, count: int = COUNT) -> Path:
    """Write 0.bmp, 1.bmp, … with equal sizes and, as if from an archive, equal times."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(first + i).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.bmp")
        os.utime(folder / f"{i}.bmp", (1e9, 1e9))
    return folder


def digests(folder: Path) -> list[bytes]:
    return [hashlib.sha256((folder / f"{i}.bmp").read_bytes()).digest() for i in range(COUNT)]


def write_rows(path: Path, images: list[str]) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    path.write_text(
        "\n".join(json.dumps({"image": image, "conversations": turns}) for image in images), encoding="utf-8"
    )
    return path


class Seen:
    """Images that a run would be trained on, files that it read, and its stderr."""

    def __init__(self, images: list[bytes], read: set[str], said: str):
        self.images, self.read, self.said = images, read, said


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., Seen]:
    """Return a function that runs `train` up to its first step on rows with 0.bmp, 1.bmp, … in a working directory."""

    def run(cwd: Path, image_folder: str | Path, images: list[str] | None = None, store: str = "store") -> Seen:
        cwd.mkdir(exist_ok=True)
        monkeypatch.chdir(cwd)
        seen, read, whole = [], set(), Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: (read.add(path.name), whole(path))[1])

        def note_images(loop, *_) -> None:
            seen.extend(sha256 for i in range(len(loop._data)) for sha256 in loop._data[i].images)

        monkeypatch.setattr(Loop, "run", note_images)
        data = write_rows(tmp_path / "rows.jsonl", images or [f"{i}.bmp" for i in range(COUNT)])
        options = {"--stage": "finetune", "--model": CHECKPOINT, "--data": data, "--image-folder": image_folder}
        options |= {"--features": tmp_path / store, "--out": tmp_path / "run", "--batch-size": 1, "--iters": 1}
        train.main([str(word) for pair in options.items() for word in pair])
        shutil.rmtree(tmp_path / "run")
        monkeypatch.setattr(Path, "read_bytes", whole)
        return Seen(seen, {name for name in read if name.endswith(".bmp")}, capsys.readouterr().err)

    return run


ALL = {f"{i}.bmp" for i in range(COUNT)}


def test_two_data_sets_with_folders_of_one_name(tmp_path: Path, prepare) -> None:
    one, other = draw(tmp_path / "one" / "images", 0), draw(tmp_path / "other" / "images", 100)
    assert prepare(tmp_path / "one", "images").images == digests(one)
    assert prepare(tmp_path / "other", "images").images == digests(other)
    again = prepare(tmp_path / "one", "images")
    assert again.images == digests(one) and not again.read
    assert len(FeatureStore(tmp_path / "store")) == 2 * COUNT


def test_a_file_that_was_replaced(tmp_path: Path, prepare) -> None:
    images, later = draw(tmp_path / "images", 0), draw(tmp_path / "later", 100)
    assert prepare(tmp_path, "images").images == digests(images)
    shutil.copyfile(later / "0.bmp", images / "0.bmp")
    os.utime(images / "0.bmp", (1e9, 1e9))
    os.replace(later / "1.bmp", images / "1.bmp")
    changed = prepare(tmp_path, "images")
    assert changed.images == digests(images) and changed.read == {"0.bmp", "1.bmp"}
    assert not prepare(tmp_path, "images").read


def test_a_folder_or_link_that_leads_elsewhere(tmp_path: Path, prepare) -> None:
    one, other = draw(tmp_path / "one", 0), draw(tmp_path / "other", 100)
    (tmp_path / "images").symlink_to(one)
    assert prepare(tmp_path, "images").images == digests(one)
    (tmp_path / "images").unlink()
    (tmp_path / "images").symlink_to(other)
    assert prepare(tmp_path, "images").images == digests(other)
    (tmp_path / "images").unlink()
    os.rename(one, tmp_path / "images")
    assert prepare(tmp_path, "images").images == digests(tmp_path / "images")
    (other / "2.bmp").unlink()
    (other / "2.bmp").symlink_to(tmp_path / "images" / "3.bmp")
    linked = prepare(tmp_path, "other")
    assert linked.images == digests(other) and linked.read == {"2.bmp"}
    assert len(FeatureStore(tmp_path / "store")) == 2 * COUNT


def test_a_file_is_known_by_whatever_path_leads_there(tmp_path: Path, prepare) -> None:
    images = draw(tmp_path / "images", 0)
    assert prepare(tmp_path, "images").read == ALL
    (link := tmp_path / "link").symlink_to(images)
    for cwd, folder in ((tmp_path, images), (images, "."), (link, "../link/../images"), (tmp_path, "link")):
        found = prepare(cwd, folder)
        assert found.images == digests(images) and not found.read
    rows = ["0.bmp", "./0.bmp", str(images / "0.bmp"), "../link/0.bmp"]
    assert set(prepare(tmp_path, "images", rows).images) == {digests(images)[0]}


def test_a_data_set_that_was_moved_is_read_but_not_embedded(tmp_path: Path, prepare) -> None:
    draw(tmp_path / "images", 0)
    prepare(tmp_path, "images")
    before = FeatureStore(tmp_path / "store").sizes()
    os.rename(tmp_path / "images", tmp_path / "elsewhere")
    moved = prepare(tmp_path, "elsewhere")
    assert moved.images == digests(tmp_path / "elsewhere") and moved.read == ALL
    assert not prepare(tmp_path, "elsewhere").read
    assert FeatureStore(tmp_path / "store").sizes() == before


def test_names_that_embed_gave_are_not_believed(tmp_path: Path, prepare, monkeypatch, capsys) -> None:
    """Such names have no file sizes and times, and may be relative paths."""
    one, other = draw(tmp_path / "one" / "images", 0), draw(tmp_path / "other" / "images", 100)
    monkeypatch.chdir(tmp_path / "one")
    options = ["--out", tmp_path / "store", "--model", CHECKPOINT, "--kind", "visual-tokens"]
    embed.main(list(map(str, ("images", *options))))
    before = FeatureStore(tmp_path / "store").sizes()
    with FeatureWriter(FeatureStore(tmp_path / "store")) as writer:
        writer.name(digests(one)[3], str(one / "0.bmp"))
    known = prepare(tmp_path / "one", "images")
    assert known.images == digests(one) and known.read == ALL
    assert FeatureStore(tmp_path / "store").sizes() == before
    assert prepare(tmp_path / "other", "images").images == digests(other)
    capsys.readouterr()
    embed.main(["--out", str(tmp_path / "store"), "--export", str(tmp_path / "export")])
    index = [json.loads(line) for line in (tmp_path / "export" / "index.jsonl").read_text().splitlines()]
    assert {str(one / "1.bmp"), "images/1.bmp"} in [set(entry.get("paths", ())) for entry in index]


def test_images_that_are_deleted(tmp_path: Path, prepare) -> None:
    images = draw(tmp_path / "images", 0)
    expected = digests(images)
    prepare(tmp_path, "images")
    Image.new("RGB", (60, 40)).save(images / "3.bmp")
    prepare(tmp_path, "images")  # 3.bmp has now been two images
    shutil.rmtree(images)
    left = prepare(tmp_path, "images")
    assert left.images == expected[:3] and "note: 3 images no longer exist" in left.said
    assert "3.bmp: no such file" in left.said


def test_a_touched_file_has_one_name(tmp_path: Path, prepare, capsys) -> None:
    images = draw(tmp_path / "images", 0)
    for time in (1e9, 2e9):
        os.utime(images / "0.bmp", (time, time))
        prepare(tmp_path, "images")
    embed.main(["--out", str(tmp_path / "store"), "--export", str(tmp_path / "export")])
    index = [json.loads(line) for line in (tmp_path / "export" / "index.jsonl").read_text().splitlines()]
    assert len(index) == COUNT and not any("paths" in entry for entry in index)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("0.bmp/x.bmp", "no such file"),
        ("folder", "is not a file"),
        ("pipe", "is not a file"),
        ("loop", "oo many"),  # levels of symbolic links, worded by the system
        ("x" * 300, "ame too long"),
        ("a\0b", "is not a path"),
    ],
)
def test_paths_that_lead_to_no_file(tmp_path: Path, prepare, image: str, reason: str) -> None:
    images = draw(tmp_path / "images", 0)
    (images / "folder").mkdir()
    os.mkfifo(images / "pipe")
    (images / "loop").symlink_to("loop")
    seen = prepare(tmp_path, "images", ["0.bmp", image])
    assert seen.images == digests(images)[:1]
    assert "row 2: " in seen.said and reason in seen.said and "Traceback" not in seen.said


def test_files_are_looked_up_without_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(path) for path in sorted(draw(tmp_path / "images", 0).iterdir())]
    monkeypatch.setattr("builtins.open", None)
    monkeypatch.setattr(os, "open", None)
    files = look_up(paths)
    assert [files[path].stat[0] for path in paths] == [os.path.getsize(path) for path in paths]
    assert look_up(paths) == files
    assert look_up(["\ud800"])["\ud800"].problem == "is not a path"


def test_an_entry_that_the_store_has_lost_is_not_known(tmp_path: Path, prepare) -> None:
    images = draw(tmp_path / "images", 0)
    prepare(tmp_path, "images")
    store, files = FeatureStore(tmp_path / "store"), look_up([str(images / "0.bmp")])
    assert list(known_images(store, files).values()) == digests(images)[:1]
    with contextlib.closing(sqlite3.connect(tmp_path / "store" / "store.db")) as db, db:
        db.execute("DELETE FROM entries WHERE sha256 = ?", digests(images)[:1])
    assert not known_images(store, files)

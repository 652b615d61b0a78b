"""Searching a folder of pictures: its index follows the folder, and no hit is out of date."""

import errno
import json
import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import odd_character, unicode_names
from PIL import Image

from llama3v_mlx import files
from llama3v_mlx import search as command
from llama3v_mlx.demo import CHECKPOINT, IMAGES, SIGLIP
from llama3v_mlx.features import library as libraries
from llama3v_mlx.features.grammar import Filters, parse_date
from llama3v_mlx.features.library import Changes, Library
from llama3v_mlx.features.location import default_index
from llama3v_mlx.features.pipeline import Report
from llama3v_mlx.features.repair import verify
from llama3v_mlx.features.shards import FeatureError
from llama3v_mlx.features.store import FeatureStore
from llama3v_mlx.search import main

MODEL = str(SIGLIP)


def draw(path: Path, seed: int, taken: str | None = None) -> Path:
    """Write a picture of random colors, with a date in its EXIF."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(colors).resize((32, 32), Image.Resampling.NEAREST)
    exif = Image.Exif()
    if taken:
        exif.get_ifd(0x8769)[0x9003] = taken
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif) if taken else image.save(path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 12 pictures in 3 subfolders."""
    for i in range(12):
        draw(tmp_path / "pictures" / f"{i % 3}" / f"{i}.png", i)
    return tmp_path / "pictures"


@pytest.fixture
def library(pictures: Path, tmp_path: Path) -> Library:
    library = Library(pictures, MODEL, tmp_path / "index")
    assert counts(library.update()) == (12, 0, 0, 0, 12)
    return library


def counts(changes: Changes) -> tuple[int, int, int, int, int]:
    return changes.added, changes.moved, changes.changed, changes.deleted, changes.embedded


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Return a function that lists the pictures read since it was last called."""
    names, whole = set(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (names.add(path.name), whole(path))[1])

    def taken() -> set[str]:
        found = {name for name in names if name.endswith((".png", ".jpg"))}
        names.clear()
        return found

    return taken


def paths_of(library: Library, filters: Filters = Filters()) -> list[str]:  # noqa: B008
    """All hits, as paths relative to the folder, sorted."""
    found = library.rank(np.ones(library.encoder.width), 1000, filters)
    return sorted(os.path.relpath(match.path, library.folder) for match in found)


def test_only_what_changed_is_read(library: Library, pictures: Path, read) -> None:
    assert counts(library.update()) == (0, 0, 0, 0, 0) and not read()
    draw(pictures / "new.png", 100)
    draw(pictures / "0" / "3.png", 101)  # changed
    (pictures / "0" / "0.png").unlink()
    os.utime(pictures / "1" / "1.png", (1, 1))  # touched
    os.link(pictures / "1" / "4.png", pictures / "moved.png")  # which changes the ctime, like a copy
    (pictures / "1" / "4.png").unlink()
    shutil.copy(pictures / "2" / "2.png", pictures / "copy.png")
    assert counts(library.update()) == (2, 1, 1, 1, 2)
    assert read() == {"new.png", "3.png", "1.png", "moved.png", "copy.png"}
    expected = {f"{i % 3}/{i}.png" for i in range(12)} - {"0/0.png", "1/4.png"} | {"new.png", "moved.png"}
    assert set(paths_of(library)) - {"copy.png"} | {"2/2.png"} == expected
    assert counts(library.update()) == (0, 0, 0, 0, 0) and not read()
    assert library.counts() == (13, 0) and verify(library.index).lost == []


def test_a_renamed_folder_is_not_read(library: Library, pictures: Path, read) -> None:
    (pictures / "0").rename(pictures / "zero")
    assert counts(library.update()) == (0, 4, 0, 0, 0) and not read()
    assert [path for path in paths_of(library) if "/0/" in path or path.startswith("0/")] == []
    assert len(paths_of(library)) == 12 == library.counts()[0]


def test_a_file_that_came_and_went_is_known_again(library: Library, pictures: Path, tmp_path: Path) -> None:
    (pictures / "0" / "0.png").rename(tmp_path / "away.png")
    assert counts(library.update()) == (0, 0, 0, 1, 0) and len(paths_of(library)) == 11
    (tmp_path / "away.png").rename(pictures / "back.png")
    assert counts(library.update()) == (1, 0, 0, 0, 0) and "back.png" in paths_of(library)


def test_a_disk_that_is_not_mounted_is_not_forgotten(library: Library, pictures: Path, tmp_path: Path, read) -> None:
    """An empty folder is left where the disk was."""
    pictures.rename(tmp_path / "disk")
    with pytest.raises(ValueError, match="pictures: no such folder"):
        library.update()
    pictures.mkdir()
    with pytest.raises(ValueError, match="has no pictures any more; .*index"):
        library.update()
    assert paths_of(library) == []
    pictures.rmdir()
    (tmp_path / "disk").rename(pictures)
    assert str(library.update()) == "no changes" and not read() and len(paths_of(library)) == 12


def test_most_pictures_are_gone(library: Library, pictures: Path, tmp_path: Path, capsys) -> None:
    """As when a disk below the folder is not mounted; nothing is embedded again when it is back."""
    for i in "01":
        (pictures / i).rename(tmp_path / i)
    arguments = [str(pictures), "words", "--index", str(library.index)]
    main(arguments)
    assert "4 pictures; 8 deleted\nnote: most pictures are gone" in capsys.readouterr().err
    for i in "01":
        (tmp_path / i).rename(pictures / i)
    assert counts(library.update()) == (8, 0, 0, 0, 0)


def test_a_renamed_library_keeps_its_index(pictures: Path, tmp_path: Path, read, monkeypatch, capsys) -> None:
    monkeypatch.setattr("llama3v_mlx.features.location.CACHE", tmp_path / "cache")
    odd = f"{odd_character(tmp_path)}.png"
    (pictures / odd).write_bytes(b"broken")

    def search(folder: Path) -> str:
        main([str(folder), "words"])
        return capsys.readouterr().err.splitlines()[-1].rpartition(": ")[2]

    assert search(pictures) == "12 pictures and 1 broken ones; 12 added, 1 broken"
    read()
    (tmp_path / "moved").mkdir()
    folder = pictures.rename(tmp_path / "moved" / "photos")
    assert search(folder).startswith("12 pictures and 1 broken ones; 1") and not read() - {odd}
    shutil.copytree(folder, tmp_path / "copy")  # another folder, with an index of its own
    assert search(tmp_path / "copy").endswith("12 added, 1 broken")
    shutil.rmtree(tmp_path / "copy")
    assert search(folder) == "12 pictures and 1 broken ones; no changes"
    assert len(list((tmp_path / "cache" / "libraries").iterdir())) == 2


def test_a_damaged_index_is_not_taken_over(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llama3v_mlx.features.location.CACHE", tmp_path / "cache")
    index = Library(pictures, MODEL).index
    (index / "store.db").write_bytes(b"no database")
    (index.parent / "notes.txt").write_text("no index")
    pictures.rename(tmp_path / "moved")
    assert Library(tmp_path / "moved", MODEL).update().embedded == 12 and index.exists()


def test_pictures_in_icloud_only_are_not_read(library: Library, pictures: Path, read, monkeypatch) -> None:
    """Neither those with a placeholder nor the dataless ones, which reading would download; they are kept."""
    draw(pictures / "0" / "new.png", 100)
    (pictures / "0" / "0.png").rename(pictures / "0" / ".0.png.icloud")
    (pictures / "0" / ".notes.txt.icloud").touch()
    os.utime(pictures / "0" / "3.png", (1, 1))  # its state changes when it is evicted
    flags = {"new.png": 0x40000000, "3.png": 0x40000000, "6.png": 0x40000000}
    disguise(monkeypatch, lambda name, stat: SimpleNamespace(**fields_of(stat), st_flags=flags.get(name, 0)))
    changes = library.update()
    assert counts(changes) == (0, 0, 0, 0, 0) and not read() and library.counts() == (12, 0)
    assert sorted(map(os.path.basename, changes.skipped.remote)) == ["0.png", "3.png", "6.png", "new.png"]
    assert "4 in iCloud only: choose Download Now" in str(changes.skipped)
    assert changes.skipped.suffixes == {".icloud": 1}
    assert "0/6.png" in paths_of(library) and "0/0.png" not in paths_of(library)
    monkeypatch.undo()
    (pictures / "0" / ".0.png.icloud").rename(pictures / "0" / "0.png")
    assert counts(library.update()) == (1, 0, 0, 0, 1) and library.counts() == (13, 0)


def fields_of(stat: os.stat_result) -> dict:
    return {name: getattr(stat, name) for name in dir(stat) if name.startswith("st_")}


def disguise(monkeypatch: pytest.MonkeyPatch, stat: Callable) -> None:
    """Have a scan of a folder see `stat(name, its stat)` of each file."""
    real = os.scandir

    class Entry:
        def __init__(self, entry: os.DirEntry):
            self.__dict__ = {name: getattr(entry, name) for name in ("name", "path", "is_dir", "is_file")}
            self.stat = lambda: stat(entry.name, entry.stat())

    class Scan(list):
        __enter__, __exit__ = lambda self: self, lambda *_: None

    monkeypatch.setattr(os, "scandir", lambda top: Scan(map(Entry, real(top))))


def test_other_programs_libraries(pictures: Path, tmp_path: Path) -> None:
    """Their originals are pictures, if they are named, and what is derived from them is not."""
    for name in ("Photos.photoslibrary/originals/A", "Photos.photoslibrary/resources/derivatives"):
        draw(pictures / name / "1.jpg", 100)
    for name in ("Old.photolibrary", "Even Older.aplibrary"):
        draw(pictures / name / "Masters" / "2.jpg", 101)
        draw(pictures / name / "Thumbnails" / "2.jpg", 102)
    library = Library(pictures, MODEL, tmp_path / "index")
    changes = library.update()
    assert changes.added == 12
    assert changes.skipped.suffixes == {".photoslibrary": 1, ".photolibrary": 1, ".aplibrary": 1}
    for name, path in (("Photos.photoslibrary", "originals/A/1.jpg"), ("Old.photolibrary", "Masters/2.jpg")):
        library = Library(pictures / name, MODEL, tmp_path / name)
        assert library.update().added == 1 and paths_of(library) == [path]


def test_a_folder_is_named_as_on_the_disk(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    """A Mac's disks ignore case and Unicode form, and one folder must not have several indexes."""
    if not (tmp_path / "PICTURES").exists():  # a disk that minds case
        (tmp_path / "PICTURES").symlink_to(pictures)
    asked = []

    def fcntl_(descriptor: int, command: int, space: bytes) -> bytes:
        asked.append(os.readlink(f"/proc/self/fd/{descriptor}") if os.path.isdir("/proc/self/fd") else "")
        assert command == 50
        return os.fsencode(pictures).ljust(len(space), b"\0")

    monkeypatch.setattr(files.os.path, "realpath", lambda path: os.path.abspath(path))
    monkeypatch.setattr(files.fcntl, "F_GETPATH", 50, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", fcntl_)
    assert files.true_path(tmp_path / "PICTURES") == str(pictures) and len(asked) == 1
    monkeypatch.setattr(files.os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    assert files.true_path(tmp_path / "PICTURES") == str(tmp_path / "PICTURES")


def test_a_file_replaced_at_once_by_one_of_equal_size(library: Library, pictures: Path) -> None:
    """With the same inode and time of change, as if the clock had been set back; ctime cannot be set."""
    path = draw(pictures / "new.bmp", 100)
    assert library.update().added == 1
    old = path.stat()
    draw(path, 101)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_ino) == (old.st_size, old.st_ino)
    assert "new.bmp" not in paths_of(library)
    assert counts(library.update()) == (0, 0, 1, 0, 1) and "new.bmp" in paths_of(library)


def test_files_are_not_all_in_memory(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3,000 files in one folder, 100 are at a time."""
    names, stat = [f"{pictures}/{i:06}.jpg" for i in range(3000)], os.stat(pictures)
    monkeypatch.setattr(libraries, "_CHUNK", 100)
    monkeypatch.setattr(libraries, "scan_folder", lambda *_: ((name, stat) for name in names))
    seen = []
    read = SimpleNamespace(run=lambda sources: seen.extend(source.name[-10:-4] for source in sources) or Report())
    monkeypatch.setattr(libraries, "Pipeline", lambda *_: read)
    library = Library(pictures, MODEL, tmp_path / "index")
    tracemalloc.start()
    library.update()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == [f"{i:06}" for i in range(3000)] and peak < 1e6


def test_rehash_reads_all(library: Library, pictures: Path, read, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose stat does not tell that it changed, as on some network disks."""
    path = pictures / "0" / "0.png"
    stat = path.stat()
    draw(path, 100)
    disguise(monkeypatch, lambda name, found: stat if name == "0.png" else found)
    assert counts(library.update()) == (0, 0, 0, 0, 0) and not read()
    assert counts(library.update(rehash=True)) == (0, 0, 1, 0, 1) and len(read()) == 12
    assert library.counts() == (12, 0)
    assert counts(library.update()) == (0, 0, 0, 0, 0)


def test_a_stale_path_is_no_hit(library: Library, pictures: Path) -> None:
    (pictures / "0" / "0.png").unlink()
    draw(pictures / "0" / "3.png", 100)
    (pictures / "1" / "1.png").rename(pictures / "1" / "new.png")
    shown = paths_of(library)
    assert len(shown) == 9 and not {"0/0.png", "0/3.png", "1/1.png", "1/new.png"} & set(shown)


def test_broken_pictures_are_counted_once_and_read_once(library: Library, pictures: Path, read) -> None:
    (pictures / "broken.jpg").write_bytes(b"no picture")
    (pictures / "notes.txt").write_text("no picture either")
    (pictures / "dangling.png").symlink_to("nowhere")
    changes = library.update()
    assert [Path(name).name for name, _ in changes.failed] == ["broken.jpg"] and changes.skipped.suffixes == {".txt": 1}
    assert str(changes) == "1 broken" and library.counts() == (12, 1) and read() == {"broken.jpg"}
    assert str(library.update()) == "no changes" and not read()
    assert len(paths_of(library)) == len(list(library.store.names())) == 12
    draw(pictures / "broken.jpg", 100)
    assert counts(library.update())[4] == 1 and library.counts() == (13, 0)


def test_pages_of_a_pdf(library: Library, pictures: Path, read, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [Image.open(IMAGES / name).convert("RGB") for name in ("two-red-stars.jpg", "42.png")]
    pages[0].save(pictures / "a.pdf", save_all=True, append_images=pages[1:])
    (pictures / "broken.pdf").write_bytes(b"%PDF-1.7 no more")
    changes = library.update()
    assert counts(changes) == (2, 0, 0, 0, 2) and [Path(name).name for name, _ in changes.failed] == ["broken.pdf"]
    assert {"a.pdf#1", "a.pdf#2"} <= set(paths_of(library)) and library.counts() == (14, 1)
    with monkeypatch.context() as patch:
        patch.setattr("llama3v_mlx.features.library.expand", lambda _: pytest.fail("opened"))
        assert str(library.update()) == "no changes"
    (pictures / "a.pdf").rename(pictures / "b.pdf")
    assert counts(library.update()) == (0, 2, 0, 0, 0)
    assert {"b.pdf#1", "b.pdf#2"} <= set(paths_of(library)) and len(paths_of(library)) == 14
    pages[1].save(pictures / "b.pdf")
    assert library.update().deleted == 1 and library.counts() == (13, 1)


def test_a_disk_error_is_no_property_of_a_picture(library: Library, pictures: Path, monkeypatch) -> None:
    draw(pictures / "new.png", 100)
    monkeypatch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert library.update().failed == [(str(pictures / "new.png"), "Input/output error")]
    monkeypatch.undo()
    assert counts(library.update()) == (1, 0, 0, 0, 1)


def test_a_folder_that_cannot_be_listed_is_kept(library: Library, pictures: Path, read, monkeypatch) -> None:
    real = os.scandir

    def scandir(top: str):
        if top == str(pictures / "1"):
            raise PermissionError(1, "Operation not permitted")
        return real(top)

    monkeypatch.setattr(os, "scandir", scandir)
    changes = library.update()
    assert counts(changes) == (0, 0, 0, 0, 0)
    ((name, reason),) = changes.skipped.denied
    assert name == str(pictures / "1") and reason.startswith("Operation not permitted; on a Mac, allow access")
    monkeypatch.undo()
    assert counts(library.update()) == (0, 0, 0, 0, 0) and not read()


@pytest.mark.parametrize("known", [True, False])
def test_a_protected_folder(library: Library, pictures: Path, known: bool, tmp_path: Path, monkeypatch, capsys) -> None:
    """As macOS's privacy protection denies it: whatever the index has, one line says what to do."""

    real = os.scandir

    def scandir(top: str):
        if os.fspath(top).startswith(str(pictures)):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), top)
        return real(top)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(SystemExit) as stop:
            main([str(pictures), "words", "--index", str(library.index if known else tmp_path / "new")])
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        assert stop.value.code == 1 and len(said) == 1
        assert said[0].startswith(f"error: {pictures}: cannot be listed (Operation not permitted; ")
        assert "System Settings > Privacy & Security > Files and Folders" in said[0]
    with monkeypatch.context() as patch:
        patch.setattr("llama3v_mlx.image.read_file", lambda path: scandir(path))
        with pytest.raises(SystemExit):
            main([str(pictures), "--image", str(pictures / "0" / "0.png"), "--index", str(library.index)])
        assert "Full Disk Access" in capsys.readouterr().err.splitlines()[-1]
    assert len(paths_of(library)) == 12


def test_an_entry_that_the_store_lost_is_embedded_again(library: Library) -> None:
    with library.store.database.transaction() as db:
        db.execute("DELETE FROM entries WHERE start < 3")
    assert library.update().embedded == 3 and len(paths_of(library)) == 12


KILLED = """
import os, sys
from llama3v_mlx.features import library, writer
calls, real = 0, writer.FeatureWriter.add
def add(self, entries):
    global calls
    calls += 1
    if calls == int(sys.argv[3]): os._exit(9)
    return real(self, entries)
writer.FeatureWriter.add = add
library.Library(sys.argv[1], {model!r}, sys.argv[2]).update(batch_size=1)
"""


def test_a_damaged_index_of_the_database_hides_nothing(library: Library, pictures: Path) -> None:
    path = library.index / "store.db"
    with sqlite3.connect(path) as db:
        [(size,)] = db.execute("PRAGMA page_size")
        [(page,)] = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'files_by_sha256'")
    with path.open("r+b") as file:
        file.seek((page - 1) * size + 3)
        file.write(b"\0\0")  # the page's number of rows
    library = Library(pictures, MODEL, library.index)
    library.update()
    with pytest.raises(FeatureError, match="its index lacks files.*--verify"):
        library.rank(next(library.store.matrix())[0], 1)


def test_a_killed_update_is_continued(pictures: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED.format(model=MODEL), pictures, tmp_path / "index", "4"]
    assert subprocess.run(arguments).returncode == 9
    assert 0 < len(FeatureStore(tmp_path / "index")) < 12
    (pictures / "0" / "0.png").rename(pictures / "moved.png")
    library = Library(pictures, MODEL, tmp_path / "index")
    assert library.update().embedded == 9
    assert len(paths_of(library)) == 12 and verify(tmp_path / "index").good == 12


def test_dates_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for year in (2019, 2020, 2021):
        draw(folder / f"{year}" / "exif.jpg", year, f"{year}:05:17 12:30:00")
    draw(folder / "2021x" / "damaged.jpg", 1, "soon")
    file = draw(folder / "2022" / "file.png", 2)
    os.utime(file, (parse_date("2022-06-01T12:00").timestamp(),) * 2)
    os.utime(folder / "2021x" / "damaged.jpg", (parse_date("2018").timestamp(),) * 2)
    library = Library(folder, MODEL, tmp_path / "index")
    library.update()

    def found(after: str | None = None, before: str | None = None, inside: Path | None = None) -> list[str]:
        dates = (parse_date(text) if text else None for text in (after, before))
        return [path.partition("/")[0] for path in paths_of(library, Filters(*dates, inside and str(inside)))]

    assert found() == ["2019", "2020", "2021", "2021x", "2022"]
    assert found("2020-05-17T12:30", "2021-05-17") == ["2020"]
    assert found("2021") == ["2021", "2022"] and found(before="2019") == ["2021x"]
    assert found("2022-06-01", "2022-06-02") == ["2022"]
    assert found(inside=folder / "2021") == ["2021"] and found("2022", inside=folder / "2021") == []


@pytest.mark.parametrize("text", ["", "yesterday", "2024-13", "0000", "9999", "2024-02-30"])
def test_what_is_no_date(text: str) -> None:
    with pytest.raises(ValueError):
        parse_date(text)


def test_near_duplicates(library: Library, pictures: Path) -> None:
    shutil.copy(pictures / "0" / "0.png", pictures / "copy.png")
    pixels = np.asarray(Image.open(pictures / "1" / "1.png")).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(pictures / "edited.png")
    library.update()
    groups = library.duplicates(0.9999)
    assert sorted([os.path.relpath(path, pictures) for path in group] for group in groups) == [
        ["0/0.png", "copy.png"],
        ["1/1.png", "edited.png"],
    ]
    (pictures / "copy.png").unlink()
    assert len(library.duplicates(0.9999)) == 1
    rows = np.concatenate(list(library.store.matrix()))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
    assert library.duplicates(float(cosines.max()) + 1e-3) == [] and len(library.duplicates(-1)) == 1


def test_a_library_has_one_index_in_the_cache(pictures: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "link").symlink_to(pictures)
    for path in (pictures, tmp_path / "link", pictures / ".." / "pictures"):
        main([str(path), "a red circle", "--top", "2"])
        said = capsys.readouterr()
        assert len(said.out.splitlines()) == 2 and ("12 added" in said.err) == (path == pictures)
    assert len(FeatureStore(default_index(os.path.realpath(pictures), MODEL))) == 12
    assert default_index(str(pictures), "other") != default_index(str(pictures), MODEL)
    # Another environment has the bundled model in another folder.
    assert default_index(str(pictures), "demo:siglip") == default_index(str(pictures), MODEL)


def test_words_and_sums_find_pictures(tmp_path: Path, capsys) -> None:
    shutil.copytree(IMAGES, tmp_path / "pictures")
    path = tmp_path / "pictures" / "three-blue-circles.png"

    def first(*args: str) -> dict:
        main([str(tmp_path / "pictures"), *args, "--json", "--index", str(tmp_path / "index")])
        return json.loads(capsys.readouterr().out)["hits"][0]

    assert first("two red stars on a yellow background")["path"].endswith("two-red-stars.jpg")
    assert first("two red stars on a yellow background")["probability"] > 0
    same = [first(str(path)), first("--image", str(path))]
    assert same[0] == same[1] and same[0]["path"] == str(path) and same[0]["cosine"] == pytest.approx(1, abs=1e-3)
    text = '"two red stars on a yellow background"'
    assert first(f"0.01:{text} + 2:{path}")["path"] == str(path)
    assert first(f"2:{text} - 0.01:{path}")["path"].endswith("two-red-stars.jpg")
    assert first(f"{text} + {path}")["probability"] is None


EVIL = "a\n\x1b[31mb\u202ec.png"


@unicode_names
def test_names_are_printed_harmlessly(pictures: Path, capsysbinary) -> None:
    draw(pictures / EVIL, 100)
    odd = odd_character(pictures)
    draw(pictures / f"{odd}.png", 101)
    (pictures / "\x1b[32m.jpg").write_text("broken")
    main([str(pictures), "words", "--top", "100"])
    said = capsysbinary.readouterr()
    assert b"\x1b" not in said.out + said.err and len(said.out.splitlines()) == 14
    assert rb"a\n\x1b[31mb\u202ec.png" in said.out and f"{files.printable(odd)}.png".encode() in said.out
    main([str(pictures), "words", "--top", "100", "-0", "--no-update"])
    paths = capsysbinary.readouterr().out.split(b"\0")
    assert len(paths) == 15 and paths[-1] == b"" and all(os.path.exists(path) for path in paths[:-1])


def test_open_shows_the_hits(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name in ("open", "xdg-open"):
        said = shlex.quote(f"{tmp_path}/{name}.args")
        (tmp_path / name).write_text(f'#!{shutil.which("sh")}\nfor a; do echo "$a" >> {said}; done\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for platform in ("darwin", "linux"):
        monkeypatch.setattr(command.sys, "platform", platform)
        main([str(pictures), "words", "--top", "2", "--open"])
    found = [line[line.index(str(pictures)) :] for line in capsys.readouterr().out.splitlines()[:2]]
    assert (tmp_path / "open.args").read_text().splitlines() == ["-R", *found]
    assert (tmp_path / "xdg-open.args").read_text().splitlines() == [os.path.dirname(found[0])]


def test_watch(library: Library, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Between looks a picture is deleted, the disk is ejected and comes back, two are added, and then comes Ctrl-C."""
    away = pictures.with_name("away")

    def interrupt() -> None:
        raise KeyboardInterrupt

    happens = [(pictures / "0" / "0.png").unlink, lambda: pictures.rename(away), lambda: None]
    happens += [lambda: away.rename(pictures)]
    happens += [lambda: [draw(pictures / f"new{i}.png", 100 + i) for i in range(2)], interrupt]
    monkeypatch.setattr(command.time, "sleep", lambda _: happens.pop(0)())
    main([str(pictures), "--watch", "--index", str(library.index)])
    said = capsys.readouterr()
    assert [line.split(maxsplit=1)[1] for line in said.out.splitlines()] == ["1 deleted", "2 added"]
    assert "12 pictures; no changes" in said.err and not happens and library.counts() == (13, 0)
    assert said.err.count("note: ") == 2 and f"note: {pictures}: " in said.err  # and the one about the demo


def test_errors(library: Library, pictures: Path, tmp_path: Path, capsys) -> None:
    def error(*args: str | Path, code: int = 1) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, args)])
        assert stop.value.code == code
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "empty").mkdir()
    assert "empty: has no pictures" in error(tmp_path / "empty", "words")
    (tmp_path / "empty" / "broken.png").write_bytes(b"no picture")
    assert "none of 1 pictures could be read" in error(tmp_path / "empty", "words")
    assert f"no-dir: no such folder in {pictures}" in error(pictures, "words", "--in", tmp_path / "no-dir")
    assert "empty/broken.png: is not a folder" in error(tmp_path / "empty" / "broken.png", "words")
    assert "nowhere: no such folder" in error(tmp_path / "nowhere", "words")
    llama3v = error(pictures, "words", "--model", CHECKPOINT, "--index", tmp_path / "other")
    assert "is a Llama3-V" in llama3v and "give a SigLIP" in llama3v
    assert "is a text; in a sum, put" in error(pictures, '"dog" + cat')
    assert "cancel out" in error(pictures, '"dog" - "dog"')
    assert "these options are for folders" in error(library.index, "words", "--after", "2020", code=2)
    assert "'soon' is not a date" in error(pictures, "words", "--before", "soon", code=2)
    assert "--no-update takes none of" in error(pictures, "words", "--no-update", "--watch", code=2)
    assert "give a QUERY to search for, --image FILE" in error(pictures, code=2)
    assert "give only one of QUERY, --image" in error(pictures, "words", "--image", "x.png", code=2)
    assert "not allowed with argument" in error(pictures, "words", "--json", "-0", code=2)
    assert "is not a feature store and not empty" in error(pictures, "words", "--index", tmp_path)


def test_in_is_a_folder_of_the_library(library: Library, pictures: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Whatever the current folder has by that name."""
    (tmp_path / "1").mkdir()
    monkeypatch.chdir(tmp_path)
    main([str(pictures), "a red circle", "--index", str(library.index), "--in", "1", "-0"])
    found = capsys.readouterr().out.split("\0")[:-1]
    assert found and {Path(path).parent for path in found} == {pictures / "1"}


def test_what_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.shutil, "which", lambda _: "false")
    monkeypatch.setattr(command.sys, "platform", "linux")
    with pytest.raises(ValueError, match="--open: false could not show /pictures"):
        command.show(["/pictures/a.png"], None)


def test_what_is_not_found_is_said(library: Library, pictures: Path, capsys) -> None:
    for words, said in (
        (["a red circle", "--after", "2150"], "no picture is within"),
        (["a red circle", "--after", "2150", "--ask", "What color is it?"], "no picture is within"),
        (["--near-duplicates", "1.1"], "no near duplicates"),
    ):
        main([str(pictures), "--index", str(library.index), *words])
        printed = capsys.readouterr()
        assert said in printed.out + printed.err and "%" not in printed.out


def test_two_searches_at_once(pictures: Path, tmp_path: Path) -> None:
    libraries = [Library(pictures, MODEL, tmp_path / "index") for _ in range(2)]
    threads = [threading.Thread(target=library.update, kwargs={"batch_size": 2}) for library in libraries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(paths_of(library)) for library in libraries] == [12, 12] and libraries[0].counts() == (12, 0)
    assert str(libraries[1].update()) == "no changes"

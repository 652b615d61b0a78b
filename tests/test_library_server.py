"""The server's library: what it finds, what it shows, and what it must not."""

import http.client
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, odd_character, serving
from PIL import Image
from test_server import raw, request, uri

from llama3v_mlx.demo import IMAGES, SIGLIP
from llama3v_mlx.features.database import Database
from llama3v_mlx.features.library import Library
from llama3v_mlx.server import HarmlessFormatter, main
from llama3v_mlx.serving import indexer as indexers
from llama3v_mlx.serving import library as served
from llama3v_mlx.serving.app import App
from llama3v_mlx.serving.indexer import Indexer
from llama3v_mlx.serving.thumbnails import Thumbnails

SEARCH, UPDATE, STATUS = "/v1/library/search", "/v1/library/update", "/v1/library"
STARS = "two-red-stars.jpg"
GONE = "42.png"  # is moved away, and counts as changed after that
PAPER = "paper.pdf"  # of two pages
HOSTILE = "<img src=x onerror=alert(1)>\u202egnp.exe\n\x1b[2J.png"


FILES_AT_FIRST = """CREATE TABLE files (
    id INTEGER PRIMARY KEY,
    sha256 BLOB NOT NULL,  -- empty: not an image
    path BLOB NOT NULL,  -- UTF-8; as bytes, because a file name may be any bytes
    size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER,  -- when it was read, if known
    taken REAL  -- when the photo was taken, in seconds since 1970 in local time, if known
)"""


def fill(folder: Path) -> None:
    """Write the demo's pictures, one of them rotated by its EXIF with a date and a place, and one with a bad name."""
    shutil.copytree(IMAGES, folder)
    (folder / "sub").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # 90° to the right
    exif.get_ifd(0x8769)[0x9003] = "2020:05:17 18:30:00"
    exif.get_ifd(0x8825)[1] = "N"
    exif[0x010F] = "SECRET CAMERA"
    Image.new("RGB", (900, 300), "navy").save(folder / "sub" / "rotated.jpg", exif=exif)
    Image.new("RGBA", (5000, 50), (0, 255, 0, 128)).save(folder / "sub" / "wide.tiff")
    Image.new("RGB", (60, 60), "red").save(folder / HOSTILE)
    pages = [Image.new("L", size, 200) for size in ((300, 600), (800, 200))]
    pages[0].save(folder / PAPER, save_all=True, append_images=pages[1:])
    Image.new("RGB", (60, 61), "red").save(folder / f"{odd_character(folder)}.png")


@pytest.fixture(scope="module")
def app(demo, tmp_path_factory) -> Iterator[App]:
    """A server with a library that is indexed, but never updated; its key is "secret"."""
    folder = tmp_path_factory.mktemp("library") / "pictures"
    fill(folder)
    Library(folder, str(SIGLIP)).update()
    with serving(*demo, api_key="secret", embedding_model=SIGLIP, library=folder) as app:
        yield app


@pytest.fixture
def folder(app: App) -> Path:
    return Path(app.library.library.folder)


def search(port: int, query: str | None = None, **fields) -> list[dict]:
    status, said = request(port, SEARCH, {"query": query, **fields})
    assert status == 200, said
    return json.loads(said)["data"]


def refused(port: int, **fields) -> tuple[int, str]:
    status, said = request(port, SEARCH, fields)
    return status, json.loads(said)["error"]["message"]


def state(port: int) -> dict:
    status, said = request(port, STATUS)
    assert status == 200, said
    return json.loads(said)


def get(port: int, path: str, **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = {"Authorization": "Bearer secret", **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request("GET", path, headers={name: value for name, value in sent.items() if value})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, data, response.headers


def shown(port: int, kind: str, id: str) -> Image.Image:
    status, data, _ = get(port, f"/v1/library/{kind}/{id}")
    assert status == 200, data
    return Image.open(io.BytesIO(data))


def id_of(port: int, name: str) -> str:
    return next(hit["id"] for hit in search(port, "a picture", top=200) if hit["name"].endswith(name))


@pytest.fixture
def hidden(folder: Path) -> Iterator[Callable[[Path], None]]:
    """Return a function that moves a file or folder away until the test ends; a move keeps its times and inode."""
    moved: list[tuple[Path, Path]] = []

    def hide(path: Path) -> None:
        away = path.with_name(f"{path.name}.away")
        path.rename(away)
        moved.append((path, away))

    yield hide
    for path, away in reversed(moved):
        path.unlink(missing_ok=True) if path.is_symlink() or path.is_file() else None
        away.rename(path)


class TestSearch:
    def test_by_text(self, port: int) -> None:
        found = search(port, "two red stars", top=3)
        assert found[0]["name"] == STARS and len(found) == 3
        assert set(found[0]) == {"id", "name", "cosine", "probability", "date", "bytes", "width", "height"}
        assert (found[0]["width"], found[0]["height"]) == Image.open(IMAGES / STARS).size
        assert found[0]["bytes"] == (IMAGES / STARS).stat().st_size
        assert [hit["cosine"] for hit in found] == sorted((hit["cosine"] for hit in found), reverse=True)
        assert 1 >= found[0]["probability"] > found[1]["probability"] >= 0

    def test_by_image_and_by_sum(self, port: int) -> None:
        (found,) = search(port, image=uri(IMAGES / STARS), top=1)
        assert found["name"] == STARS and found["cosine"] == pytest.approx(1, abs=1e-5) and found["probability"] is None
        assert search(port, '3:"one purple cross" + "two red stars"', top=1)[0]["name"] == "one-purple-cross.jpg"
        (both,) = search(port, "one purple cross", image=uri(IMAGES / STARS), top=1)
        assert both["probability"] is None and both["cosine"] < 0.99

    def test_as_the_command(self, port: int, folder: Path) -> None:
        from llama3v_mlx.features.grammar import Term
        from llama3v_mlx.features.query import embed_query

        library = Library(folder, str(SIGLIP))
        query = embed_query([Term("three blue circles")], library.encoder, library.texts)
        expected = [
            (os.path.relpath(m.path, folder), pytest.approx(m.cosine, abs=1e-5)) for m in library.rank(query, 5)
        ]
        assert [(hit["name"], hit["cosine"]) for hit in search(port, "three blue circles", top=5)] == expected

    def test_filters(self, port: int) -> None:
        rotated = search(port, "blue", before="2021")
        assert [(hit["name"], hit["date"]) for hit in rotated] == [("sub/rotated.jpg", "2020-05-17T18:30:00")]
        assert (rotated[0]["width"], rotated[0]["height"]) == (300, 900)  # upright
        assert {hit["name"] for hit in search(port, "blue", folder="sub/")} == {"sub/rotated.jpg", "sub/wide.tiff"}
        assert (
            search(port, "blue", folder="sub", after="2020-05-17", before="2020-05-18")[0]["name"] == "sub/rotated.jpg"
        )
        assert search(port, "blue", folder="nowhere") == []

    def test_names_are_one_line(self, port: int) -> None:
        found = {hit["name"]: hit["id"] for hit in search(port, "red", top=200)}
        (name,) = (name for name in found if "onerror" in name)
        assert name == "<img src=x onerror=alert(1)>\\u202egnp.exe\\n\\x1b[2J.png"
        assert {"\\udcff.png", "\\u2066.png"} & found.keys()
        for name, id in found.items():
            assert name.isprintable() and shown(port, "thumbnail", id), name

    def test_no_query_reads_a_file(self, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An image's path is a text here; what it is must not be told, whether there is such a file or not."""
        there = tmp_path / "there.png"
        Image.new("RGB", (8, 8)).save(there)
        monkeypatch.setattr("llama3v_mlx.features.encoder.load_image", lambda *_: pytest.fail("read"))
        answers = [refused(port, query=f'"dog" + {path}') for path in (there, tmp_path / "gone.png")]
        assert [status for status, _ in answers] == [400, 400]
        assert answers[0][1].replace("there", "gone") == answers[1][1]
        assert search(port, str(there), top=1) and refused(port, image=str(there))[0] == 400

    def test_errors(self, port: int) -> None:
        for fields, where in (
            ({}, "query"),
            ({"query": " "}, "query"),
            ({"query": "x" * 1001}, "query"),
            ({"query": '"a" - "a"'}, "query"),
            ({"query": "\ud800"}, "query"),
            ({"query": "a", "top": 201}, "top"),
            ({"query": "a", "after": "soon"}, "after"),
            ({"query": "a", "before": "9999-01-01"}, "before"),
            ({"query": "a", "path": "/"}, "path"),
            ({"image": "http://localhost/a.png"}, "image"),
            ({"image": "data:image/png;base64,AAAA"}, "image"),
            ({"query": "a", "folder": "../other"}, "folder"),
            ({"query": "a", "folder": "sub/../.."}, "folder"),
            ({"query": "a", "folder": "/etc"}, "folder"),
        ):
            status, said = request(port, SEARCH, fields)
            assert status == 400, (fields, said[:200])
            message = json.loads(said)["error"]["message"]
            assert message.startswith(f"{where}: "), (fields, message)
        assert search(port, "a", folder="a\0b") == []
        assert request(port, SEARCH)[0] == 405 and request(port, UPDATE, {"rehash": True})[0] == 400

    def test_running_answers_go_on(self, app: App, port: int) -> None:
        """Queries are computed on the engine's thread, in steps."""
        threads = set()
        compute = app.library._embedder._compute
        app.library._embedder._compute = lambda chosen: (threads.add(threading.current_thread().name), compute(chosen))
        try:
            assert search(port, '"a" + "b"', top=1)
        finally:
            app.library._embedder._compute = compute
        assert threads == {"engine"}


class TestPictures:
    def test_are_upright_bounded_and_without_metadata(self, port: int) -> None:
        for kind, most in served.SIDE.items():
            rotated = shown(port, kind, id_of(port, "rotated.jpg"))
            assert rotated.format == "JPEG" and rotated.size == ((107, 320) if kind == "thumbnail" else (300, 900))
            status, data, headers = get(port, f"/v1/library/{kind}/{id_of(port, 'rotated.jpg')}")
            assert not rotated.getexif() and b"Exif" not in data and b"SECRET" not in data
            assert headers["Content-Type"] == "image/jpeg" and headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Cache-Control"].startswith("private")
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
            wide = shown(port, kind, id_of(port, "wide.tiff"))
            assert wide.width == most and wide.format == "JPEG"

    def test_thumbnails_are_made_once(self, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        id = id_of(port, STARS)
        first = get(port, f"/v1/library/thumbnail/{id}")[1]
        monkeypatch.setattr(served, "load_image", lambda *_, **__: pytest.fail("made again"))
        assert get(port, f"/v1/library/thumbnail/{id}")[1] == first

    def test_pages_of_a_pdf(self, port: int, folder: Path, hidden) -> None:
        pages = {hit["name"]: hit for hit in search(port, "a page", top=200) if hit["name"].startswith(PAPER)}
        assert sorted(pages) == [f"{PAPER}#1", f"{PAPER}#2"]
        for page, ratio in zip((pages[name] for name in sorted(pages)), (1 / 2, 4), strict=True):
            assert page["bytes"] == (folder / PAPER).stat().st_size
            assert max(page["width"], page["height"]) == served.SIDE["image"]
            assert page["width"] / page["height"] == pytest.approx(ratio, rel=0.02)
            for kind, most in served.SIDE.items():
                size = shown(port, kind, page["id"]).size
                assert max(size) == most and size[0] / size[1] == pytest.approx(ratio, rel=0.02)
        assert shown(port, "image", page["id"]).getpixel((9, 9)) == pytest.approx((200,) * 3, abs=2)
        hidden(folder / PAPER)
        Image.new("L", (300, 600)).save(folder / PAPER)
        assert get(port, f"/v1/library/image/{page['id']}")[0] == 404

    def test_an_older_index_has_no_sizes(self, demo, tmp_path: Path) -> None:
        """Also one on a read-only disk, which cannot be given the columns."""
        (tmp_path / "pictures").mkdir()
        shutil.copy(IMAGES / STARS, tmp_path / "pictures")
        library = Library(tmp_path / "pictures", str(SIGLIP), tmp_path / "index")
        library.update()
        with library.store.database.transaction() as db:
            db.execute("ALTER TABLE files RENAME TO now")
            db.execute(FILES_AT_FIRST)
            db.execute("INSERT INTO files SELECT id, sha256, path, size, mtime_ns, ctime_ns, inode, taken FROM now")
            db.execute("DROP TABLE now")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Database, "_add_sizes", lambda _: None)
            served = {"library": tmp_path / "pictures", "library_index": tmp_path / "index"}
            with serving(*demo, embedding_model=SIGLIP, **served) as app:
                (hit,) = search(app.server_port, "stars")
                assert (hit["name"], hit["width"], hit["height"]) == (STARS, None, None)
        library = Library(tmp_path / "pictures", str(SIGLIP), tmp_path / "index")
        assert str(library.update(rehash=True)) == "no changes"
        assert library.store.database.rows("SELECT width, height FROM files") == [Image.open(IMAGES / STARS).size]

    @pytest.mark.parametrize("kind", ["thumbnail", "image"])
    def test_only_by_id(self, port: int, folder: Path, kind: str) -> None:
        id, start = id_of(port, STARS), f"/v1/library/{kind}/"
        other = "0" * 64
        bad = [
            other,
            id.upper(),
            id[:-1],
            f"{id}0",
            f"{id}.jpg",
            f"{id}%00",
            STARS,
            f"../{kind}/{id}",
            "",
            "%2e%2e/",
            "é",
        ]
        bad += [
            "../../../etc/passwd",
            "..%2f..%2fetc%2fpasswd",
            "//etc/passwd",
            urllib.parse.quote(f"{folder}/{STARS}"),
            f"{id}/",
            f"{id}/{id}",
        ]
        for name in bad:
            target = (start + name).encode()
            said = raw(
                port,
                b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret\r\n"
                b"Connection: close\r\n\r\n" % target,
            )
            assert said.split()[1] == b"404" and b"root:" not in said, (name, said)
        assert get(port, f"/v1/library/file/{id}")[0] == get(port, "/v1/library//")[0] == 404
        assert get(port, f"{start}{id}?size=9")[0] == 200

    def test_only_unchanged_files(self, port: int, folder: Path, hidden) -> None:
        id = id_of(port, GONE)
        assert shown(port, "thumbnail", id) and shown(port, "image", id)
        hidden(folder / GONE)
        for kind in served.SIDE:  # also the thumbnail that is kept
            assert get(port, f"/v1/library/{kind}/{id}")[0] == 404
        Image.new("RGB", (8, 8)).save(folder / GONE)
        assert get(port, f"/v1/library/image/{id}")[0] == 404
        assert GONE not in {hit["name"] for hit in search(port, "stars", top=200)}

    def test_a_file_that_changes_while_it_is_read(self, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        id = id_of(port, STARS)
        other = (IMAGES / "one-purple-cross.jpg").read_bytes()
        monkeypatch.setattr(served.Path, "read_bytes", lambda _: other)
        assert get(port, f"/v1/library/image/{id}")[0] == 404

    def test_no_bomb(self, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """The limits of `load_image` are in force for what was indexed before they were, too."""
        id = id_of(port, STARS)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        status, said, _ = get(port, f"/v1/library/image/{id}")
        assert status == 404 and b"cannot be read" in said

    def test_links_out_of_the_library(self, demo, tmp_path: Path) -> None:
        """Also those that came with the index, and a file of an index that lists others."""
        inside, outside = tmp_path / "inside", tmp_path / "outside"
        for i, name in enumerate((inside / "own.png", outside / "secret.png", outside / "listed.png")):
            name.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((9, 9, 3), 80 * i, np.uint8)).save(name)
        (inside / "link.png").symlink_to(outside / "secret.png")
        (inside / "within.png").symlink_to("own.png")
        Image.new("L", (9, 9)).save(outside / "secret.pdf")
        (inside / "link.pdf").symlink_to(outside / "secret.pdf")
        library = Library(inside, str(SIGLIP), tmp_path / "index")
        library.update()
        other = Library(outside, str(SIGLIP), tmp_path / "index")
        other._scan, scan = lambda skipped: (scan(skipped), _keep_rows(other)), other._scan
        other.update()
        with serving(*demo, embedding_model=SIGLIP, library=inside, library_index=tmp_path / "index") as app:
            names = [(sha256, Path(name).name) for sha256, name in library.store.names()]
            assert {name for _, name in names} >= {"own.png", "listed.png", "link.png", "link.pdf#1"}
            (hit,) = search(app.server_port, "a")
            assert hit["name"] in ("own.png", "within.png")
            for sha256, name in names:
                status = get(app.server_port, f"/v1/library/image/{sha256.hex()}")[0]
                assert status == (200 if name in ("own.png", "within.png") else 404), name


def _keep_rows(library: Library) -> None:
    """Have an update of another folder remove no rows."""
    columns = "path, size, mtime_ns, ctime_ns, inode"
    with library.store.database.transaction() as db:
        db.execute(f"INSERT OR REPLACE INTO scan SELECT {columns} FROM files")


class TestAccess:
    def test_key(self, port: int) -> None:
        id = id_of(port, STARS)
        for path in (STATUS, f"/v1/library/thumbnail/{id}", f"/v1/library/image/{id}"):
            assert get(port, path, Authorization="")[0] == get(port, path, Authorization="Bearer x")[0] == 401
        assert request(port, SEARCH, {"query": "a"}, key="x")[0] == request(port, UPDATE, {}, key="x")[0] == 401

    def test_other_sites(self, port: int) -> None:
        """A page of another site shows pictures without asking, and would learn from errors which there are."""
        path = f"/v1/library/thumbnail/{id_of(port, STARS)}"
        for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
            assert get(port, path, Sec_Fetch_Site=site)[0] == status
        assert get(port, path, Origin="http://evil.example")[0] == get(port, path, Host="evil.example")[0] == 403
        assert request(port, SEARCH, {"query": "a"}, headers={"Content-Type": "text/plain"})[0] == 415

    def test_without_a_library(self, demo) -> None:
        with serving(*demo, embedding_model=SIGLIP) as app:
            for path, body in ((STATUS, None), (f"/v1/library/image/{'0' * 64}", None), (SEARCH, {"query": "a"})):
                status, said = request(app.server_port, path, body)
                assert status == 404 and "start it with --library FOLDER" in said
            assert json.loads(request(app.server_port, "/v1/models")[1])["data"][0]["library"] is None

    def test_is_named(self, port: int) -> None:
        model = json.loads(request(port, "/v1/models")[1])["data"][0]
        assert (model["library"], model["max_images"]) == ("pictures", 16)


class TestState:
    def test_idle(self, port: int, folder: Path) -> None:
        assert state(port) == {
            "object": "library",
            "name": "pictures",
            "pictures": sum(path.is_file() for path in folder.rglob("*")) + 1,  # pages are pictures
            "broken": 0,
            "updating": False,
            "progress": None,
            "changes": None,
            "notes": [],
            "error": None,
        }

    def test_a_folder_that_vanishes(self, port: int, folder: Path, hidden) -> None:
        id = id_of(port, STARS)
        hidden(folder)
        assert state(port)["error"] == "the folder does not exist at the moment"
        assert refused(port, query="a") == (503, "the folder pictures does not exist at the moment")
        assert get(port, f"/v1/library/thumbnail/{id}")[0] == 404

    def test_a_damaged_index(self, demo, tmp_path: Path) -> None:
        shutil.copytree(IMAGES, tmp_path / "pictures")
        index = tmp_path / "index"
        Library(tmp_path / "pictures", str(SIGLIP), index).update()
        with serving(*demo, embedding_model=SIGLIP, library=tmp_path / "pictures", library_index=index) as app:
            for shard in index.glob("shard-*"):
                shard.write_bytes(b"")
            status, message = refused(app.server_port, query="a")
            assert status == 503 and message.startswith("the library's index cannot be used: ")

    def test_update(self, demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In a process of its own, while the server answers; then what is new is found, and what is skipped said."""
        monkeypatch.setattr(indexers, "NICE", 0)
        pictures, index = tmp_path / "pictures", tmp_path / "index"
        (pictures / "Photos.photoslibrary").mkdir(parents=True)
        Image.new("RGB", (50, 50), "yellow").save(pictures / "new.png")
        with serving(*demo, embedding_model=SIGLIP, library=pictures, library_index=index) as app:
            port, indexer = app.server_port, app.library.indexer
            assert json.loads(request(port, UPDATE, {})[1])["updating"]
            pid = indexer._process.pid
            assert json.loads(request(port, UPDATE, {})[1])["updating"]  # the same one
            assert indexer._process.pid == pid != os.getpid()
            wait_for(lambda: not state(port)["updating"])
            assert (state(port)["changes"], state(port)["error"]) == ("1 added", None)
            assert state(port)["notes"] == ["pass a .photoslibrary to use its originals"]
            assert [hit["name"] for hit in search(port, "yellow", top=200)] == ["new.png"]


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 200  # far beyond any machine's need
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


class TestUpdates:
    @pytest.fixture
    def indexer(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Indexer]]:
        """Return a function that starts Python code instead of an update."""
        started = []

        def start(code: str) -> Indexer:
            monkeypatch.setattr(indexers, "COMMAND", (sys.executable, "-S", "-c", code))
            started.append(indexer := Indexer("folder", "model", "index"))
            indexer.start()
            return indexer

        yield start
        for indexer in started:
            indexer.stop()

    def test_progress(self, indexer) -> None:
        update = indexer('print(\'{"progress": [3, 9]}\', flush=True); input(); print(\'{"changes": "3 added"}\')')
        wait_for(lambda: update.progress == (3, 9))
        assert update.running and update.changes is None and update.ended is None
        update._process.stdin.write(b"\n")
        update._process.stdin.flush()
        wait_for(lambda: not update.running)
        assert (update.progress, update.changes, update.error) == (None, "3 added", None) and update.ended

    @pytest.mark.parametrize(
        ("code", "error"),
        [
            ("print('error: no such folder'); raise SystemExit(1)", "no such folder"),
            ("import os; os.kill(os.getpid(), 9)", "ended with -9"),
            ("print('[1]'); print('{\"progress\": 1, \"x\": 2}'); raise SystemExit(3)", "ended with 3"),
        ],
    )
    def test_failure(self, indexer, code: str, error: str) -> None:
        update = indexer(code)
        wait_for(lambda: not update.running)
        assert update.error == error and update.progress is None
        update.start()
        assert update.error is None

    def test_what_it_says_is_logged_harmlessly(self, indexer) -> None:
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(HarmlessFormatter().format(record))
        logging.getLogger(indexers.__name__).addHandler(handler)
        update = indexer("print('error: \x1b[2J\x9b'); raise SystemExit(1)")
        wait_for(lambda: not update.running)
        logging.getLogger(indexers.__name__).removeHandler(handler)
        assert said == ["the library could not be updated: \\x1b[2J\\x9b"]

    def test_stop(self, indexer) -> None:
        """By its own process id, and without leaving a message of a failure."""
        update = indexer("print('{\"progress\": [3, 9]}', flush=True); input()")
        wait_for(lambda: update.progress is not None)
        process = update._process
        update.stop()
        assert process.poll() == -15
        wait_for(lambda: not update.running)
        update.start()
        assert not update.running and update.error is None

    def test_closing_the_server_stops_it(self, demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(indexers, "COMMAND", (sys.executable, "-S", "-c", "input()"))
        (tmp_path / "pictures").mkdir()
        index = tmp_path / "index"
        with serving(*demo, embedding_model=SIGLIP, library=tmp_path / "pictures", library_index=index) as app:
            app.library.indexer.start()
            process = app.library.indexer._process
        assert process.poll() == -15

    def test_end_with_the_server(self, tmp_path: Path) -> None:
        """Whose end of the pipe is closed by whatever ends it."""
        command = [*indexers.COMMAND, tmp_path, str(SIGLIP), tmp_path / "index"]
        assert subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=60).returncode == 1

    def test_a_search_starts_one_when_the_last_is_long_ago(self, app: App, port: int, monkeypatch) -> None:
        started = []
        monkeypatch.setattr(app.library.indexer, "start", lambda: started.append(1))
        for ended, count in ((None, 0), (time.monotonic(), 0), (time.monotonic() - served.UPDATE_SECONDS - 1, 1)):
            monkeypatch.setattr(app.library.indexer, "ended", ended)
            assert search(port, "a", top=1) and len(started) == count


class TestThumbnails:
    JPEG = b"\xff\xd8" + bytes(96) + b"\xff\xd9"

    def ids(self, folder: Path) -> set[str]:
        return {path.name[0] for path in folder.glob("*.jpg")}

    def test_are_bounded(self, tmp_path: Path) -> None:
        kept = Thumbnails(tmp_path, 300)
        for letter in "abcad":
            assert kept.get(letter * 64, lambda: self.JPEG) == self.JPEG
        assert self.ids(tmp_path) == {"a", "c", "d"} and kept.nbytes == 300
        os.utime(tmp_path / f"{'c' * 64}.jpg", (1, 1))
        (tmp_path / "notes.jpg").write_bytes(b"not ours")
        again = Thumbnails(tmp_path, 200)  # a new process, which was given less
        again.get("d" * 64, lambda: pytest.fail("made again"))
        assert self.ids(tmp_path) == {"a", "d", "n"} and again.nbytes == 200

    def test_what_is_damaged_is_made_again(self, tmp_path: Path) -> None:
        kept = Thumbnails(tmp_path, 1000)
        path = tmp_path / f"{'a' * 64}.jpg"
        path.write_bytes(self.JPEG[:50])
        assert kept.get("a" * 64, lambda: self.JPEG) == path.read_bytes() == self.JPEG

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert Thumbnails(tmp_path / "file" / "in", 1000).get("a" * 64, lambda: self.JPEG) == self.JPEG

    def test_failures_leave_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError):
            Thumbnails(tmp_path, 1000).get("a" * 64, lambda: 1 // 0)
        assert list(tmp_path.iterdir()) == []


def test_options(capsys, tmp_path: Path, siglip: Path) -> None:
    for args, code, message in (
        (("--library-index", "x"), 2, "need --library"),
        (("--library", tmp_path / "nowhere"), 1, "no such folder"),
        (("--library", tmp_path, "--library-model", siglip), 1, "no spiece.model"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, args), "--port", "0"])
        said = capsys.readouterr().err
        assert stop.value.code == code and message in said
        assert ("your pictures: --library-model" in said) == (args[0] == "--library" and len(args) == 2)

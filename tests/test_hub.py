"""The Hub, by a server on 127.0.0.1 that speaks its API: room on the disk, broken connections, closed doors."""

import hashlib
import http.server
import json
import os
import re
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import close_session

from llama3v_mlx import generate, load
from llama3v_mlx.checkpoint import CheckpointError, find_checkpoint
from llama3v_mlx.demo import CHECKPOINT, IMAGES

COMMIT = "c0ffee" + "0" * 34
WEIGHTS = "model-00001-of-00001.safetensors"
CHUNK = 100_000  # bytes: what a broken connection keeps is whole chunks, which are larger than this file by default
Usage = namedtuple("Usage", "total used free")


class Hub(http.server.ThreadingHTTPServer):
    """Serves the bundled checkpoint as owner/llama3v."""

    daemon_threads = True

    def __init__(self):
        self.files = {path.name: path.read_bytes() for path in CHECKPOINT.iterdir()}
        self.files["pytorch_model.bin"] = bytes(1000)  # nobody asks for it
        self.gated, self.cuts = False, 0  # how many downloads of the weights break off in the middle
        self.ranges: list[str | None] = []  # of the requests for the weights
        self.sent = 0  # bytes of files
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, data: bytes, body: bool = True, **headers) -> None:
        self.send_response(status)
        headers.setdefault("Content_Length", len(data))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", body=self.command == "GET", X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/(\w+/\w+)(?:/revision/(\w+)|/tree/(\w+))?", path):
            self.describe(*match.groups())
        elif match := re.fullmatch(r"/owner/llama3v/resolve/\w+/(.+)", path):
            if hub.gated:
                self.refuse(403, "GatedRepo")
            else:
                self.send_file(match[1])
        else:
            self.refuse(404, "RepoNotFound")

    def describe(self, name: str, revision: str | None, tree: str | None) -> None:
        if name != "owner/llama3v":
            self.refuse(401, "RepoNotFound")
        elif revision not in (None, "main", COMMIT):
            self.refuse(404, "RevisionNotFound")
        elif tree:
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in self.server.files.items()
            ]
            self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        else:
            siblings = [{"rfilename": file} for file in self.server.files]
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def send_file(self, file: str) -> None:
        hub, data = self.server, self.server.files[file]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        asked, start = self.headers.get("Range"), 0
        if self.command == "HEAD":
            self.answer(200, data, body=False, **headers)
            return
        if asked:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest, status = data[start:], 206 if asked else 200
        if file == WEIGHTS:
            hub.ranges.append(asked)
            if hub.cuts:
                hub.cuts -= 1
                half = rest[: len(rest) // 2]
                hub.sent += len(half)
                self.answer(status, half, **headers, Content_Length=len(rest))
                self.close_connection = True
                return
        hub.sent += len(rest)
        self.answer(status, rest, **headers)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, and an empty cache."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
        close_session()
        yield server
        server.shutdown()
    close_session()


def cached(tmp_path: Path) -> int:
    """Bytes of the cache."""
    return sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.is_symlink())


def test_a_repository_is_downloaded_once(hub: Hub, tmp_path: Path, capsys) -> None:
    folder = find_checkpoint("owner/llama3v")
    assert sorted(os.listdir(folder)) == sorted(hub.files.keys() - {"pytorch_model.bin"})
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    size = sum(len(data) for name, data in hub.files.items() if name != "pytorch_model.bin")
    assert hub.sent == size
    printed = capsys.readouterr().err
    assert "dry-run" not in printed
    assert printed.splitlines()[-1] == (
        f"note: owner/llama3v takes {size / 1e9:.2f} GB in {tmp_path}/cache; when they are no longer needed: "
        "hf cache rm model/owner/llama3v"
    )
    assert find_checkpoint("owner/llama3v", COMMIT) == folder == find_checkpoint("owner/llama3v")
    assert hub.sent == size and "note" not in capsys.readouterr().err
    model, _ = load("owner/llama3v")
    assert model.args.model_type == "llama3v"


def test_a_connection_cut_in_the_middle_resumes(hub: Hub) -> None:
    hub.cuts = 1
    folder = find_checkpoint("owner/llama3v")
    kept = len(hub.files[WEIGHTS]) // 2 // CHUNK * CHUNK
    assert hub.ranges == [None, f"bytes={kept}-"]
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_a_download_that_broke_off_goes_on_in_the_next_run(hub: Hub, run_main) -> None:
    hub.cuts = 100
    done = run_main("llama3v_mlx.generate", "--model", "owner/llama3v", "--image", IMAGES / "42.png")
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: owner/llama3v: the download broke off (")
    assert last.endswith("); run the same command again to continue")
    hub.cuts, hub.sent = 0, 0
    folder = find_checkpoint("owner/llama3v")
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert hub.sent == len(hub.files[WEIGHTS])  # of no other file a byte


def test_a_full_disk_is_told_before_the_first_byte(hub: Hub, tmp_path: Path, monkeypatch, run_main) -> None:
    size = sum(len(data) for name, data in hub.files.items() if name != "pytorch_model.bin")
    free = size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    done = run_main("llama3v_mlx.generate", "--model", "owner/llama3v", "--image", IMAGES / "42.png")
    assert done.returncode == 1 and hub.sent == 0
    assert done.stderr.splitlines()[-1] == (
        f"error: owner/llama3v: {size / 1e9:.2f} GB are to be downloaded to {tmp_path}/cache, but only "
        f"{free / 1e9:.2f} GB are free there; make room, or set HF_HOME to a folder on another disk"
    )
    # To convert takes more; and what is in the cache is not counted.
    free = size + 1
    done = run_main("llama3v_mlx.convert", "--hf-path", "owner/llama3v", "--mlx-path", tmp_path / "out", "-q")
    assert done.returncode == 1 and hub.sent == 0 and not list(tmp_path.glob("out*"))
    assert f"and about {5.5 / 16 * size / 1e9:.2f} GB written afterwards, but only" in done.stderr
    find_checkpoint("owner/llama3v")
    free = 0
    assert find_checkpoint("owner/llama3v")


def test_converts_straight_from_the_cache(hub: Hub, tmp_path: Path, run_main) -> None:
    done = run_main("llama3v_mlx.convert", "--hf-path", "owner/llama3v", "--mlx-path", tmp_path / "out", "-q")
    assert done.returncode == 0, done.stderr
    assert "hf cache rm model/owner/llama3v" in done.stderr
    size = sum(len(data) for name, data in hub.files.items() if name != "pytorch_model.bin")
    assert hub.sent == size and cached(tmp_path) < 1.01 * size + 5000
    model, processor = load(tmp_path / "out")
    assert "42" in generate(model, processor, "What number is written?", image=IMAGES / "42.png", temperature=0)


def test_closed_doors_say_how_to_open_them(hub: Hub, monkeypatch) -> None:
    hub.gated = True
    licence = r"owner/llama3v: accept its licence at https://huggingface.co/owner/llama3v, then: hf auth"
    with pytest.raises(CheckpointError, match=licence):
        find_checkpoint("owner/llama3v")
    hub.gated = False
    with pytest.raises(CheckpointError, match="owner/other: no such folder, and no such repository .* hf auth login"):
        find_checkpoint("owner/other")
    with pytest.raises(CheckpointError, match="owner/llama3v: the repository has no revision 'old'"):
        find_checkpoint("owner/llama3v", "old")
    with pytest.raises(CheckpointError, match="owner/two--dashes: no such folder, and not the name of a repository"):
        find_checkpoint("owner/two--dashes")


def test_without_a_network_the_cache_does(hub: Hub, monkeypatch) -> None:
    offline = r"owner/llama3v: no such folder, and not in the cache, or not whole; HF_HUB_OFFLINE"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(CheckpointError, match=offline):
        find_checkpoint("owner/llama3v")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    close_session()
    folder = find_checkpoint("owner/llama3v")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    close_session()
    assert find_checkpoint("owner/llama3v") == folder
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=offline):
        find_checkpoint("owner/llama3v")


def test_a_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder here, which has no revision v2"):
        find_checkpoint(folder, "v2")


def test_a_hub_that_is_down_is_told(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(CheckpointError, match="owner/llama3v: .*run the same command again to continue"):
        find_checkpoint("owner/llama3v")


def test_a_process_of_its_own_converts(hub: Hub, tmp_path: Path, run_python) -> None:
    """As a user's: the server and the cache by the environment alone."""
    hub.cuts = 1
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = run_python("convert.py", "--hf-path", "owner/llama3v", "--mlx-path", tmp_path / "out", "-q", env=env)
    assert done.returncode == 0, done.stderr
    assert f"in {tmp_path}/home/hub; when they are no longer needed: hf cache rm model/owner/llama3v" in done.stderr
    assert "Traceback" not in done.stderr and len(hub.ranges) == 2

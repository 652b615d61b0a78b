"""Further commands that write, which need more than one model, a server, or an optional package."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path

from .harness import command, run_child
from .material import QUESTION, Material
from .shim import disturb_started
from .written import Action, Written, entries, hashes, whole_or_absent

LOOKED = "note: the library is complete"  # what the server's client prints


def _synthesize(material: Material, place: Path, *teacher: str | Path) -> Action:
    files = ("--captions", material / "captions.jsonl", "--out", place / "rows.jsonl")
    return command("synthesize", "--teacher", *teacher, *files, "--batch-size", 2, "--temp", 0, "--max-tokens", 100)


def _local(material: Material, place: Path) -> Action:
    return _synthesize(material, place, material / "teacher")


def _remote(material: Material, place: Path) -> Action:
    return _synthesize(material, place, material.teacher_url, "--teacher-model", "default_model")


def _calibrate(material: Material, place: Path) -> Action:
    rows = ("--calibrate", material / "rows.json", "--image-folder", material / "images")
    return command("convert", "--hf-path", material / "tiny", "--mlx-path", place / "out", "-q", *rows)


def _rerank(material: Material, place: Path) -> Action:
    def search() -> None:
        from llama3v_mlx import ask_found

        ask_found.CACHE = place / "cache"
        options = ("--model", material / "siglip", "--llm", material / "tiny", "--index", place / "index", "--force")
        asked = ("two red stars", "--ask", "What is it?", "--max-tokens", 2, "--json")
        command("search", material / "images", *asked, *options, "--batch-size", 1, "--workers", 1)()

    return search


def _reranked(material: Material, place: Path) -> object:
    ended = run_child(_rerank(material, place), place)
    if ended.code:
        return ended.errors
    hits = [(Path(hit["path"]).name, round(hit["match"], 4), hit["answer"]) for hit in json.loads(ended.out)["hits"]]
    return sorted(hits), *map(entries, _stores(place)), entries(place / "index")


def _stores(place: Path) -> list[Path]:
    return sorted(path.parent for path in (place / "cache").rglob("store.json"))


def _ask_by_schema(material: Material, place: Path) -> Action:
    schema = place.parent / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"many": {"type": "boolean"}}, "required": ["many"]}))
    options = ("--model", material / "tiny", *QUESTION[:2], "--max-tokens", 20, "--temp", 0, "--force")
    return command(
        "generate", "--images", material / "images", *options, "--schema", schema, "--out", place / "a.jsonl"
    )


def _serve(material: Material, place: Path) -> Action:
    """The server with a library, and a client in a thread, which looks at all pictures and then stops the server."""

    def serve() -> None:
        from llama3v_mlx.serving import library

        disturb_started()  # the process that updates the index
        library.CACHE = place / "cache"
        threading.Thread(target=_look, daemon=True).start()
        folder = ("--library", material / "images", "--library-model", material / "siglip")
        options = ("--library-index", place / "index", "--embedding-model", material / "siglip", "--force")
        command("server", "--model", material / "tiny", *folder, *options, "--port", 0)()

    return serve


def _look() -> None:
    """Wait for the library, update it again if that failed, and look at its pictures; then stop the server."""
    said = Path(f"/proc/self/fd/{sys.stderr.fileno()}")
    while not (
        found := re.search(r"serving .* at http://127.0.0.1:(\d+)", said.read_text(encoding="utf-8", errors="replace"))
    ):
        time.sleep(0.1)
    with contextlib.suppress(OSError, http.client.HTTPException):  # a signal stops the server
        _look_at(int(found[1]))
    os.kill(os.getpid(), signal.SIGTERM)


def _look_at(port: int) -> None:
    problem = None
    if _updated(port):
        _get(port, "/v1/library/update", {})
    error = _updated(port)
    status, data = _get(port, "/v1/library/search", {"query": "two red stars", "top": 9})
    for hit in json.loads(data)["data"] if status == 200 else ():
        status, data = _get(port, f"/v1/library/thumbnail/{hit['id']}")
        if status != 200 or not data.endswith(b"\xff\xd9"):
            problem = f"thumbnail of {hit['name']}: {status} {data[-80:]!r}"
    if problem or not error:
        print(f"error: {problem}" if problem else LOOKED, file=sys.stderr)


def _updated(port: int) -> str | None:
    """Wait for the end of an update, and return its error."""
    while True:
        status, data = _get(port, "/v1/library")
        state = json.loads(data)
        if status != 200 or not state["updating"]:
            return state["error"]
        time.sleep(0.1)


def _get(port: int, path: str, body: dict | None = None) -> tuple[int, bytes]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def _served(material: Material, place: Path) -> object:
    """Entries of the index; a thumbnail may be missing, but none is damaged."""
    thumbnails = (place / "cache" / "thumbnails").glob("*.jpg")
    odd = [path.name for path in thumbnails if not path.read_bytes().endswith(b"\xff\xd9")]
    return entries(place / "index"), odd


def _evaluate(material: Material, place: Path) -> Action:
    data = ("--tasks", "demo_world", "--data", material / "world", "--lmms-eval", os.environ["LMMS_EVAL_PYTHON"])
    evaluate = command("evaluate", *data, "--limit", 4, "--concurrency", 1, "--output", place / "out")

    def unlimited() -> None:  # torch, which lmms-eval imports, maps more than it uses
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        evaluate()

    return unlimited


def _evaluated(material: Material, place: Path) -> object:
    """The score of each question."""
    samples = sorted((place / "out").rglob("*_samples_*.jsonl"))
    rows = [json.loads(line) for path in samples for line in path.read_text().splitlines()]
    return sorted((row["doc_id"], row["score"], str(row["filtered_resps"])) for row in rows)


MORE = {
    "synthesize": Written(_local, lambda material, place: hashes(place)),
    "teacher-server": Written(_remote, lambda material, place: hashes(place)),
    "calibrate": Written(_calibrate, lambda material, place: hashes(place), kept=whole_or_absent),
    "rerank": Written(_rerank, _reranked),
    "server": Written(_serve, _served, goes_on=lambda ended: LOOKED not in ended.errors, slow=10),
}
if importlib.util.find_spec("llguidance"):
    MORE["schema"] = Written(_ask_by_schema, lambda material, place: hashes(place))
if "LMMS_EVAL_PYTHON" in os.environ:
    MORE["evaluate"] = Written(_evaluate, _evaluated, slow=20)

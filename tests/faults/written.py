"""The commands that write, what exists before each, and what it must have written in the end."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llama3v_mlx.files import MARKER

from .harness import Ended, command, run_child
from .material import QUESTION, Material

Action = Callable[[], None]


@dataclass(frozen=True)
class Written:
    """A command that writes, and what it writes."""

    action: Callable[[Material, Path], Action]
    result: Callable[[Material, Path], object]  # equal after any disturbance and another run
    prepare: Callable[[Material, Path], object] = lambda material, place: None  # what exists before
    kept: Callable[[Material, Path, object], str | None] = lambda material, place, wanted: None  # after a disturbance
    stdin: Callable[[Path], str] = lambda place: ""
    goes_on: Callable[[Ended], bool] = lambda ended: False  # it succeeds without all that it is to write
    slow: int = 1  # how many times as long as others it may take


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files below a folder, by relative path; of tensors, whose order in a file MLX leaves open.

    A marker that is left in a finished folder, by a kill just after the folder got its name, is harmless.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    files = [path for path in files if path.name != MARKER]
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    from safetensors import SafetensorError, deserialize

    data = path.read_bytes()
    if path.suffix == ".safetensors":
        with contextlib.suppress(SafetensorError):
            tensors = sorted((name, t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(data))
            data = repr(tensors).encode()
    return hashlib.sha256(data).hexdigest()


def _convert(material: Material, place: Path) -> Action:
    return command("convert", "--hf-path", material / "tiny", "--mlx-path", place / "out", "-q")


def _converted(material: Material, place: Path, wanted: object = None) -> dict[str, str]:
    return hashes(place)


def whole_or_absent(material: Material, place: Path, wanted: object) -> str | None:
    made = {f"out/{name}": digest for name, digest in hashes(place / "out").items()}
    return f"out is not whole: {sorted(wanted.items() ^ made.items())[:3]}" if made and made != wanted else None


def _train(stage: str) -> Callable[[Material, Path], Action]:
    def train(material: Material, place: Path) -> Action:
        return command("train", *material.train(stage), "--out", place / "run", "--resume")

    return train


def _trained(material: Material, place: Path) -> object:
    """Files but for what contains times, and the steps of the metrics."""
    found = hashes(place)
    found.pop("run/metrics.jsonl", None)
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    return found, [[row["step"], row.get("loss")] for row in map(json.loads, lines)]


def _fuse(material: Material, place: Path) -> Action:
    adapters = ("--adapter-path", material / "finetune", "--out", place / "out")
    return command("train", "--fuse", "--model", material / "mlx", *adapters)


def _chat(material: Material, place: Path) -> Action:
    return command("chat", "--model", material / "tiny", "--max-tokens", 3, "--temp", 0, "--force")


def _old_or_new(material: Material, place: Path, wanted: object) -> str | None:
    old = _sha256(material / "saved.safetensors")
    found = hashes(place).get("saved.safetensors")
    return None if found in (old, wanted["saved.safetensors"]) else "the saved conversation is neither old nor new"


def _embed(material: Material, place: Path) -> Action:
    paths = (material / "images", "--model", material / "siglip", "--out", place / "store", "--batch-size", 1)
    return command("embed", *paths, "--workers", 1)


def _embedded(material: Material, place: Path) -> object:
    """Rows by path, as exported."""
    export = place / "export"
    ended = run_child(command("embed", "--out", place / "store", "--export", export), place)
    if ended.code:
        return ended.errors
    import numpy as np

    rows = np.load(export / "embeddings.npy")
    entries = [json.loads(line) for line in (export / "index.jsonl").read_text().splitlines()]
    shutil.rmtree(export)
    return sorted((json.dumps(entry), row.tobytes().hex()) for entry, row in zip(entries, rows, strict=True))


def use_prompt_cache(material: Material, place: Path) -> Action:
    def store() -> None:
        import mlx.core as mx

        from llama3v_mlx.cli import run
        from llama3v_mlx.serving.prefix_cache import PrefixCache
        from llama3v_mlx.serving.prompts import Block

        def work() -> None:
            cache = PrefixCache(10**6, place / "cache", "model", shape=(2, 1, 4))
            blocks = [Block(f"{i:064}", 16 * i, 16 * (i + 1)) for i in range(3)]
            held, array = cache.fetch(blocks, 48)
            if held and not mx.array_equal(array[0, 0, 0, 0, :, 0], mx.arange(held) // 16):
                raise ArithmeticError("wrong values")
            cache.store(blocks, lambda start, end: mx.full((2, 2, 1, 1, 16, 4), float(start // 16)))
            while cache.save_one():
                pass

        run(work)

    return store


def _old_saved(material: Material, place: Path) -> None:
    shutil.copy(material / "saved.safetensors", place)


def _photos(place: Path) -> Path:
    return place.parent / f"{place.name}-photos"  # outside of the folder whose calls are disturbed


def search_folder(material: Material, photos: Path, index: Path) -> Action:
    options = ("--model", material / "siglip", "--index", index, "--json", "--batch-size", 1, "--workers", 1)
    return command("search", photos, "--image", material / "images" / "d.png", *options)


def _search(material: Material, place: Path) -> Action:
    return search_folder(material, _photos(place), place / "index")


def _index(material: Material, place: Path) -> None:
    """Index a folder, and then change the folder."""
    photos = Path(shutil.copytree(material / "images", _photos(place)))
    ended = run_child(_search(material, place), place)
    if ended.code:
        raise RuntimeError(f"the index is not made: {ended.errors}")
    (photos / "a.png").rename(photos / "moved.png")
    (photos / "b.jpg").unlink()
    shutil.copy(material / "formats" / "PNG" / "0.png", photos / "new.png")
    shutil.copy(material / "formats" / "GIF" / "0.gif", photos / "c.gif")
    (photos / "broken.png").write_bytes(b"not an image")


def _indexed(material: Material, place: Path) -> object:
    """Files and entries of the index, and the ranking."""
    ended = run_child(_search(material, place), place)
    if ended.code:
        return ended.errors
    photos = str(_photos(place))
    hits = [(hit["path"].removeprefix(photos), round(hit["cosine"], 5)) for hit in json.loads(ended.out)["hits"]]
    files = _rows(place / "index", "SELECT path, sha256 FROM files")
    files = sorted((path.decode(errors="surrogatepass").removeprefix(photos), sha256.hex()) for path, sha256 in files)
    return hits, files, entries(place / "index")


def _rows(store: Path, query: str) -> list[tuple]:
    from llama3v_mlx.features.database import Database

    return Database(store).rows(query)


def _compact(material: Material, place: Path) -> Action:
    options = ("--model", material / "siglip", "--index", place / "index", "--batch-size", 1, "--workers", 1)
    return command("search", _photos(place), "--compact", *options)


def entries(store: Path) -> list[tuple]:
    """Images of a store, with the checksums of their rows."""
    return sorted(_rows(store, "SELECT hex(sha256), rows, crc32 FROM entries"))


def _all_embedded(material: Material, place: Path, wanted: object) -> str | None:
    return _embedded_of(material, place, material / "images")


def _present_embedded(material: Material, place: Path, wanted: object) -> str | None:
    return _embedded_of(material, place, _photos(place))


def _embedded_of(material: Material, place: Path, folder: Path) -> str | None:
    """Say whether features are lost of images that were indexed at first and are in the folder."""
    before, there = (
        {hashlib.sha256(path.read_bytes()).digest() for path in images.iterdir()}
        for images in (material / "images", folder)
    )
    before &= there
    lost = before - {sha256 for (sha256,) in _rows(place / "index", "SELECT sha256 FROM entries")}
    return f"{len(lost)} images of the index are lost" if lost else None


def ask_folder(material: Material, out: Path) -> Action:
    return command("generate", "--images", material / "images", "--model", material / "tiny", *QUESTION, "--out", out)


def _ask(material: Material, place: Path) -> Action:
    return ask_folder(material, place / "answers.jsonl")


def _copy_answers(material: Material, place: Path) -> None:
    """Copy the first two of four answers."""
    shutil.copytree(material / "answers", place, dirs_exist_ok=True)
    lines = (place / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (place / "answers.jsonl").write_bytes(b"".join(lines[:2]))


def _no_answer_lost(material: Material, place: Path, wanted: object) -> str | None:
    lines = (place / "answers.jsonl").read_bytes().splitlines(keepends=True)
    expected = (material / "answers" / "answers.jsonl").read_bytes().splitlines(keepends=True)
    if lines[:2] != expected[:2]:
        return "answers are lost"
    odd = [line for line in lines if line not in expected and line.endswith(b"\n")]
    return f"the file has {odd[0]!r}" if odd else None


def ask_with_features(material: Material, store: Path) -> Action:
    images = (material / "images" / name for name in ("a.png", "b.jpg", "d.png"))
    return command("generate", "--model", material / "tiny", "--image", *images, *QUESTION, "--features", store)


def _features(material: Material, place: Path) -> Action:
    return ask_with_features(material, place / "store")


def _kept_features(material: Material, place: Path) -> object:
    ended = run_child(command("embed", "--verify", place / "store"), place)
    return ended.errors or ended.out.count("\n"), entries(place / "store")


WRITTEN = {
    "convert": Written(_convert, _converted, kept=whole_or_absent),
    "fuse": Written(_fuse, _converted, kept=whole_or_absent),
    "pretrain": Written(_train("pretrain"), _trained),
    "finetune": Written(_train("finetune"), _trained),
    "chat": Written(
        _chat,
        _converted,
        prepare=_old_saved,
        kept=_old_or_new,
        stdin=lambda place: f"What is a disk?\n/save {place / 'saved'}\n",
        goes_on=lambda ended: True,  # after Ctrl-C
    ),
    "embed": Written(_embed, _embedded),
    "index": Written(_search, _indexed, prepare=_index, kept=_all_embedded),
    "compact": Written(_compact, _indexed, prepare=_index, kept=_present_embedded),
    "ask": Written(_ask, _converted),
    "ask-on": Written(_ask, _converted, prepare=_copy_answers, kept=_no_answer_lost),
    "features": Written(_features, _kept_features),
    "prompt-cache": Written(use_prompt_cache, lambda material, place: None),  # it checks the values itself
}

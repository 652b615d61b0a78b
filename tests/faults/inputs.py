"""Broken files of training rows, of captions, of rows to calibrate on, and JSON schemas; images that vanish.

A command must end with an error line that names the file, or do what is left to do.
"""

import contextlib
import functools
import importlib.util
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .checkpoints import Broken
from .checkpoints import cases as break_and_run
from .harness import Ended, command, complaint, run_child
from .material import QUESTION, Material
from .mutate import mutate_bytes, mutate_json, mutate_tree

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["star", "disk"]},
        "many": {"type": "integer", "minimum": 1, "maximum": 4},
        "colors": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}, "maxItems": 2},
        "more": {"anyOf": [{"$ref": "#/$defs/more"}, {"type": "null"}]},
    },
    "required": ["shape", "many"],
    "additionalProperties": False,
    "$defs": {"more": {"type": "boolean"}},
}
# What happens to an image, and to one that was put aside.
ACTS: tuple[Callable[[Path, Path], object], ...] = (
    lambda path, aside: path.unlink(),
    lambda path, aside: path.rename(aside),
    lambda path, aside: aside.rename(path),
    lambda path, aside: os.truncate(path, 50),
    lambda path, aside: path.write_bytes(b"no image"),
    lambda path, aside: path.mkdir(),
    lambda path, aside: path.rmdir(),
)


def make_inputs(material: Material) -> None:
    """Write a schema, and the rows also one per line."""
    (material / "schema.json").write_text(json.dumps(SCHEMA))
    rows = json.loads((material / "rows.json").read_text())
    (material / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def mutate_input(rng: random.Random, path: Path) -> str:
    """Change values, a line or bytes, or put no file in its place."""
    data = path.read_bytes()
    match rng.randrange(12):
        case 0:
            path.unlink()
            odd = rng.choice(
                (lambda: path.mkdir(), lambda: path.symlink_to(path.name), lambda: path.symlink_to("none"))
            )
            odd()
            return f"{path.name}: no file"
        case 1 | 2:
            path.write_bytes(mutate_bytes(rng, data))
        case _ if path.suffix == ".jsonl":
            lines = data.splitlines()
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(mutate_tree(rng, json.loads(lines[at]))).encode()
            path.write_bytes(b"\n".join(lines) + rng.choice((b"", b"\n")))
        case _:
            path.write_bytes(mutate_json(rng, data))
    return f"{path.name}: {path.read_bytes()[:2000]!r}"


def _train(material: Material, broken: Path) -> Callable[[], None]:
    options = [*material.train("finetune"), "--out", broken.with_name("run")]
    options[options.index("--data") + 1] = broken
    return command("train", *options)


def _synthesize(material: Material, broken: Path) -> Callable[[], None]:
    options = ("--teacher", material / "teacher", "--temp", 0, "--max-tokens", 60, "--out", broken.with_name("rows"))
    return command("synthesize", "--captions", broken, *options)


def _calibrate(material: Material, broken: Path) -> Callable[[], None]:
    options = ("--calibrate", broken, "--image-folder", material / "images", "-q")
    return command("convert", "--hf-path", material / "tiny", "--mlx-path", broken.with_name("out"), *options)


def _ask(material: Material, broken: Path) -> Callable[[], None]:
    image = ("--image", material / "images" / "a.png", "--schema", broken)
    return command("generate", "--model", material / "tiny", *image, *QUESTION)


def vanish(rng: random.Random, folder: Path) -> None:
    """Remove, replace, cut and rename images of a folder at random moments, until the process ends."""
    names = sorted(os.listdir(folder))
    while True:
        time.sleep(rng.choice((0, 0.001, 0.01, 0.05)))
        path = folder / rng.choice(names)
        for act in rng.sample(ACTS, k=2):
            with contextlib.suppress(OSError):
                act(path, path.with_name(f".{path.name}"))


def case(kind: str, number: int, material: Material, place: Path) -> tuple[str, str | None]:
    """Run a command on a folder whose images vanish; what it finds, and another run after it, must be right."""
    rng = random.Random(f"{kind} {number}")
    folder = place / "images"
    folder.mkdir()
    for i, path in enumerate(sorted((material / "formats").rglob("*.*")) * 2):
        shutil.copy(path, folder / f"{i}{path.suffix}")
    name = kind.partition(":")[2]
    arguments = {
        "embed": (folder, "--model", material / "siglip", "--out", place / "store", "--batch-size", 4),
        "search": (folder, "a star", "--model", material / "siglip", "--index", place / "index", "--batch-size", 4),
        "generate": ("--images", folder, "--model", material / "tiny", *QUESTION, "--out", place / "answers.jsonl"),
    }[name]

    def disturbed() -> None:
        threading.Thread(target=vanish, args=(rng, folder), daemon=True).start()
        command(name, *arguments)()

    problem = _complaint(run_child(disturbed, place))
    second = _complaint(run_child(command(name, *arguments), place))
    return f"{len(os.listdir(folder))} files left", problem or (second and f"the second run: {second}")


def _complaint(ended: Ended) -> str | None:
    """As `complaint`, but images that failed may be listed."""
    is_list = ended.code == 1 and "failed: " in ended.errors and "error: " not in ended.errors.replace("failed: ", "")
    return complaint(replace(ended, code=0) if is_list else ended)


BROKEN = {
    "inputs:rows": Broken("rows.json", _train, mutate=mutate_input),
    "inputs:lines": Broken("rows.jsonl", _train, mutate=mutate_input),
    "inputs:captions": Broken("captions.jsonl", _synthesize, mutate=mutate_input),
    "inputs:calibrate": Broken("rows.json", _calibrate, mutate=mutate_input),
}
if importlib.util.find_spec("llguidance"):
    BROKEN["inputs:schema"] = Broken("schema.json", _ask, mutate=mutate_input)
KINDS = (*BROKEN, "vanishing:embed", "vanishing:search", "vanishing:generate")
BATCHED = dict.fromkeys(BROKEN, 20)
cases = functools.partial(break_and_run, kinds=BROKEN)

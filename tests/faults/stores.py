"""Broken feature stores, indexes of libraries, files of answers and cached prompts.

A command on one must end with an error line that names it, or succeed with what is right.
"""

import hashlib
import json
import random
import sqlite3
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from .checkpoints import Broken
from .checkpoints import cases as break_and_run
from .harness import Ended, command, run_child
from .material import Material
from .mutate import STRANGE, mutate_file, mutate_tree
from .written import ask_folder, ask_with_features, search_folder, use_prompt_cache

TABLES = {"entries": ("writer", "shard", "start", "rows", "crc32", "overview_columns", "grid_rows", "sha256")}
TABLES["files"] = ("sha256", "path", "size", "mtime_ns", "inode", "taken")
SCHEMAS = ("DROP TABLE files", "DROP TABLE entries", "ALTER TABLE entries DROP COLUMN grid_rows", "VACUUM")
SCHEMAS += ("DROP INDEX files_by_path", "ALTER TABLE files RENAME COLUMN path TO name", "PRAGMA user_version = 3")
SCHEMAS += ("CREATE TRIGGER t BEFORE INSERT ON entries BEGIN SELECT RAISE(ABORT, 'no'); END", "CREATE TABLE more (a)")
SCHEMAS += ("CREATE VIEW v AS SELECT * FROM files", "PRAGMA journal_mode = WAL", "PRAGMA user_version = 0")
VALUES = tuple(v for v in STRANGE if v is None or isinstance(v, float | str) or (isinstance(v, int) and abs(v) < 2**63))
VALUES += (b"", bytes(32), b"../x", b"\xff" * 32)
SHAPES = (
    (2, 2, 1, 1, 8, 4),
    (2, 2, 1, 2, 16, 4),
    (1, 2, 1, 1, 16, 4),
    (2, 2, 1, 1, 16, 8),
    (64,),
    (),
    (0, 0, 0, 0, 16, 0),
)


def mutate_store(rng: random.Random, path: Path) -> str:
    """Mutate a file of a store: rubbish in the tables of its database, or another schema, besides flipped bits."""
    if path.suffix != ".db" or rng.random() < 0.4:
        return mutate_file(rng, path)
    done = []
    with sqlite3.connect(path) as db:
        for _ in range(rng.choice((1, 1, 2))):
            statement, parameters = _rubbish(rng)
            try:
                db.execute(statement, parameters)
                done.append(f"{statement} {parameters}")
            except (sqlite3.Error, UnicodeEncodeError):  # a constraint, or no text of SQLite
                continue
    db.close()
    return f"{path.name}: {done}"


def _rubbish(rng: random.Random) -> tuple[str, tuple]:
    table = rng.choice(list(TABLES))
    column = rng.choice(TABLES[table])
    where = "WHERE rowid = 1" if table == "files" else "WHERE start = (SELECT min(start) FROM entries)"
    match rng.randrange(6):
        case 0 | 1:
            return f"UPDATE {table} SET {column} = ? {where if rng.random() < 0.7 else ''}", (rng.choice(VALUES),)
        case 2:
            return f"UPDATE {table} SET {column} = {column} + ? {where}", (rng.choice((1, -1, 4, 2**31, 2**40)),)
        case 3:
            return f"DELETE FROM {table} {where if rng.random() < 0.7 else ''}", ()
        case 4:
            values = ", ".join("?" * len(TABLES[table]))
            columns = ", ".join(TABLES[table])
            return f"INSERT INTO {table} ({columns}) VALUES ({values})", tuple(
                rng.choices(VALUES, k=len(TABLES[table]))
            )
        case _:
            return rng.choice(SCHEMAS), ()


def mutate_answers(rng: random.Random, path: Path) -> str:
    """Mutate a file of answers or its settings: bytes, or a value of a line."""
    if path.suffix != ".jsonl" or rng.random() < 0.5:
        return mutate_file(rng, path)
    lines = path.read_bytes().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json.dumps(mutate_tree(rng, json.loads(lines[at]))).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"{path.name}: {lines[at].decode()}"


def mutate_prompt(rng: random.Random, path: Path) -> str:
    """Mutate a cached prompt; at times its name matches its new contents."""
    from safetensors.numpy import save

    if rng.random() < 0.3:
        return mutate_file(rng, path)
    import numpy as np

    shape, dtype = rng.choice(SHAPES), rng.choice(("float32", "float16", "int8", "uint32"))
    data = save({rng.choice(("held", "held", "held", "x")): np.zeros(shape, dtype)})
    path.unlink()
    path.with_stem(f"{path.stem.partition('-')[0]}-{hashlib.sha256(data).hexdigest()}").write_bytes(data)
    return f"{path.name}: {dtype} {shape}"


def _export(material: Material, broken: Path) -> Callable[[], None]:
    return command("embed", "--out", broken, "--export", broken.with_name("export"))


def _embed(material: Material, broken: Path) -> Callable[[], None]:
    options = ("--model", material / "siglip", "--out", broken, "--batch-size", 1, "--workers", 1)
    return command("embed", material / "images", *options)


def _verify(material: Material, broken: Path) -> Callable[[], None]:
    def repair() -> None:
        from llama3v_mlx.cli import run
        from llama3v_mlx.features.repair import verify

        run(lambda: verify(broken))

    return repair


def _search(material: Material, broken: Path) -> Callable[[], None]:
    return search_folder(material, material / "images", broken)


def _search_store(material: Material, broken: Path) -> Callable[[], None]:
    return command("search", broken, "--image", material / "images" / "d.png", "--json")


def _ask(material: Material, broken: Path) -> Callable[[], None]:
    return ask_folder(material, broken / "answers.jsonl")


def _export_beside(material: Material, broken: Path) -> Callable[[], None]:
    return command("embed", "--out", broken, "--export", broken.with_name("exported"))


def _exported(folder: Path, ended: Ended) -> dict[str, str] | str:
    """Rows by SHA-256 of a store as exported, or the error."""
    import numpy as np

    if ended.code:
        return ended.errors
    rows = np.load(folder / "embeddings.npy")
    entries = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    return {entry["sha256"]: row.tobytes().hex() for entry, row in zip(entries, rows, strict=True)}


@cache
def _wanted(material: Material) -> dict[str, str]:
    ended = run_child(_export_beside(material, material / "store"), material.folder)
    return _exported(material / "exported", ended)


def _right_rows(material: Material, broken: Path, ended: Ended, export: Ended) -> str | None:
    """No row under another image's SHA-256; an error of the export is right as well."""
    wanted, found = _wanted(material), _exported(broken.with_name("exported"), export)
    wrong = [] if isinstance(found, str) else [key for key, row in found.items() if wanted.get(key) != row]
    return f"wrong rows of {wrong}" if wrong else None


def _repaired(material: Material, broken: Path, ended: Ended, export: Ended) -> str | None:
    return f"not repaired: {export.errors}" if export.code else _right_rows(material, broken, ended, export)


def _right_hits(material: Material, broken: Path, ended: Ended) -> str | None:
    import numpy as np

    wanted = _wanted(material)
    query = hashlib.sha256((material / "images" / "d.png").read_bytes()).hexdigest()
    rows = {key: np.frombuffer(bytes.fromhex(row), np.float32).astype(float) for key, row in wanted.items()}
    for hit in json.loads(ended.out)["hits"]:
        if hit["sha256"] not in rows:
            return f"found {hit}"
        one, other = rows[query], rows[hit["sha256"]]
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        if abs(cosine - hit["cosine"]) > 1e-3:
            return f"cosine {cosine}, but found {hit}"
    return None


def _right_folder(material: Material, broken: Path, ended: Ended) -> str | None:
    names = sorted(Path(hit["path"]).name for hit in json.loads(ended.out)["hits"])
    if names != sorted(path.name for path in (material / "images").iterdir()):
        return f"found only {names}"
    return _right_hits(material, broken, ended)


def _right_answers(material: Material, broken: Path, ended: Ended) -> str | None:
    rows = [json.loads(line) for line in (broken / "answers.jsonl").read_bytes().splitlines()]
    paths = [row["path"] for row in rows]
    missing = {str(path) for path in (material / "images").iterdir()} - {row["path"] for row in rows if "answer" in row}
    return f"answers: {paths}" if missing or len(paths) != len(set(paths)) else None


KINDS = {
    "stores:export": Broken("store", _export, mutate=mutate_store, then=_export_beside, right=_right_rows),
    "stores:embed": Broken("store", _embed, mutate=mutate_store, then=_export_beside, right=_right_rows),
    "stores:verify": Broken("store", _verify, mutate=mutate_store, then=_export_beside, right=_repaired),
    "stores:search": Broken("store", _search_store, mutate=mutate_store, right=_right_hits),
    "stores:index": Broken("index", _search, mutate=mutate_store, right=_right_folder),
    "stores:features": Broken("visual", ask_with_features, mutate=mutate_store),
    "stores:answers": Broken(
        "answers", _ask, mutate=mutate_answers, names=("answers.jsonl", "/dev/zero"), right=_right_answers
    ),
    "stores:prompt-cache": Broken("prompts", use_prompt_cache, mutate=mutate_prompt),
}
BATCHED = dict.fromkeys(KINDS, 20)
cases = partial(break_and_run, kinds=KINDS)

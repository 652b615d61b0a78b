"""Broken checkpoints, adapters, run folders, saved conversations and cached prompts."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .harness import Task, command, complaint, copy_tree, run_batch
from .material import QUESTION, Material
from .mutate import mutate_file, replace_file

Action = Callable[[Material, Path], Callable[[], None]]


@dataclass(frozen=True)
class Broken:
    """A file or folder of the material that is broken, and the command that reads it."""

    source: str
    action: Action  # given the broken copy
    stdin: Callable[[Path], str] = lambda broken: ""
    names: tuple[str, ...] = ()  # names besides the copy's, one of which the error must contain
    skipped: tuple[str, ...] = ()  # files that the command does not read
    mutate: Callable[[random.Random, Path], str] = mutate_file
    then: Action | None = None  # what is run after it
    right: Callable[..., str | None] = lambda material, broken, ended, then=None: None  # given how both ended


def _generate(material: Material, broken: Path) -> Callable[[], None]:
    return command("generate", "--model", broken, "--image", material / "images" / "a.png", *QUESTION)


def _convert(material: Material, broken: Path) -> Callable[[], None]:
    return command("convert", "--hf-path", broken, "--mlx-path", broken.with_name("converted"), "-q")


def _embed(material: Material, broken: Path) -> Callable[[], None]:
    return command("embed", material / "images", "--model", broken, "--out", broken.with_name("store"))


def _embed_text(material: Material, broken: Path) -> Callable[[], None]:
    def encode() -> None:
        from llama3v_mlx.cli import run
        from llama3v_mlx.features.encoder import TextEncoder, load_encoder

        run(lambda: TextEncoder(broken, load_encoder(broken).model).encode(["two red stars"]).tolist())

    return encode


def _assemble(material: Material, broken: Path) -> Callable[[], None]:
    return command("convert", "--vision", broken, "--llm", material / "tiny", "--mlx-path", broken.with_name("new"))


def _assemble_llm(material: Material, broken: Path) -> Callable[[], None]:
    return command("convert", "--vision", material / "siglip", "--llm", broken, "--mlx-path", broken.with_name("new"))


def _adapters(material: Material, broken: Path) -> Callable[[], None]:
    return command("generate", "--model", material / "mlx", "--adapter-path", broken, *QUESTION)


def _fuse(material: Material, broken: Path) -> Callable[[], None]:
    adapters = ("--adapter-path", broken, "--out", broken.with_name("fused"))
    return command("train", "--fuse", "--model", material / "mlx", *adapters)


def _chat(material: Material, broken: Path) -> Callable[[], None]:
    return command("chat", "--model", material / "tiny", "--max-tokens", 2, "--temp", 0, "--force")


def _load(broken: Path) -> str:
    return f"/load {broken}\nAnd now?\n/undo\n/save {broken.with_name('again')}\n"


def _resume(stage: str) -> Action:
    def resume(material: Material, broken: Path) -> Callable[[], None]:
        return command("train", *material.train(stage), "--out", broken, "--resume")

    return resume


KINDS = {
    "checkpoints:generate": Broken("tiny", _generate),
    "checkpoints:generate-mlx": Broken("mlx", _generate, skipped=("README.md", "chat_template.jinja")),
    "checkpoints:generate-4bit": Broken("mlx-4bit", _generate, skipped=("README.md", "chat_template.jinja")),
    "checkpoints:convert": Broken("tiny", _convert),
    "checkpoints:convert-mlx": Broken("mlx", _convert, skipped=("README.md", "chat_template.jinja")),
    "checkpoints:assemble": Broken(
        "siglip", _assemble, names=("vision_tower.",), skipped=("spiece.model", "preprocessor_config.json")
    ),
    "checkpoints:assemble-llm": Broken(
        "tiny", _assemble_llm, names=("language_model.",), skipped=("generation_config.json",)
    ),
    "checkpoints:embed": Broken("siglip", _embed, names=("features are not finite",), skipped=("spiece.model",)),
    "checkpoints:embed-text": Broken("siglip", _embed_text),
    "checkpoints:adapters": Broken("finetune", _adapters, skipped=("run.json", "metrics.jsonl")),
    "checkpoints:fuse": Broken("pretrain", _fuse, skipped=("run.json", "metrics.jsonl")),
    "checkpoints:resume": Broken("finetune", _resume("finetune")),
    "checkpoints:chat": Broken("saved.safetensors", _chat, _load),
}


BATCHED = dict.fromkeys(KINDS, 20)  # cases per child


def cases(
    kind: str, numbers: range, material: Material, place: Path, kinds: dict[str, Broken] = KINDS
) -> list[tuple[str, str | None]]:
    """Break a file for each number and run the command on it, in one child.

    Returns:
        What was broken, and what is wrong with how the command ended.
    """
    what, made, tasks = kinds[kind], [], []
    for number in numbers:
        rng, here = random.Random(f"{kind} {number}"), place / str(number)
        outside = here / "outside"
        outside.mkdir(parents=True)
        broken = copy_tree(material / what.source, here / Path(what.source).name)
        done = _break(kind, what, rng, broken, outside)
        made.append((broken, done, {path.name for path in here.iterdir()}))
        folder = broken if broken.is_dir() else here
        tasks.append(Task(what.action(material, broken), folder, what.stdin(broken).encode(), outside))
        if what.then:
            tasks.append(Task(what.then(material, broken), folder))
    ended = iter(run_batch(tasks, place))
    results = []
    for broken, done, before in made:
        both = [next(ended) for _ in range(2 if what.then else 1)]
        problem = complaint(both[0], (str(broken), *what.names))
        if problem is None and both[0].code == 0:
            problem = what.right(material, broken, *both)
        left = {path.name for path in broken.parent.iterdir()} - before
        if problem is None and both[0].code and any(not _is_kept(name) for name in left):
            problem = f"failed, but left {', '.join(left)}"
        results.append((done, problem))
    return results


def _break(kind: str, what: Broken, rng: random.Random, broken: Path, outside: Path) -> str:
    done = []
    for path in [broken] if broken.is_file() else _files(kind, rng, broken, what):
        replace = rng.random() < 0.06 and broken.is_dir()
        done.append(replace_file(rng, path, outside) if replace else what.mutate(rng, path))
    return ", ".join(done)


def _is_kept(name: str) -> bool:
    return name in ("store", "again.safetensors", "exported")  # written before the failure, and whole


def _files(kind: str, rng: random.Random, folder: Path, what: Broken) -> list[Path]:
    """Choose the files to break: JSON mostly, because most is in it; at times two."""
    if kind == "checkpoints:resume":
        shutil.rmtree(sorted((folder / "checkpoints").iterdir())[-1])  # so that steps are left
        for name in ("adapters.safetensors", "adapter_config.json"):
            (folder / name).unlink()
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.name not in what.skipped)
    if kind in ("checkpoints:adapters", "checkpoints:fuse"):
        found = [path for path in found if path.parent == folder]
    weights = [1 if path.name == "metrics.jsonl" else 3 for path in found]
    return list(dict.fromkeys(rng.choices(found, weights, k=rng.choice((1, 1, 1, 1, 2)))))

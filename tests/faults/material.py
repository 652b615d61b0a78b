"""Small checkpoints, images, runs and saved conversations to be broken, made once per run of the faults."""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from .harness import command, run_child

QUESTION = ("--prompt", "What is it?", "--max-tokens", 2, "--temp", 0, "--force")
TRAINING = ("--batch-size", 2, "--iters", 4, "--save-every", 2, "--report-every", 1, "--max-seq-length", 400)


class Material:
    """Folder of what the cases copy and break; see `make` for its contents."""

    def __init__(self, folder: Path):
        self.folder = folder

        self._servers = contextlib.ExitStack()

    def close(self) -> None:
        self._servers.close()

    @functools.cached_property
    def teacher_url(self) -> str:
        """Address of mlx-lm's server with the teacher, which is started."""
        from llama3v_mlx.evaluate import served

        _, port, _ = self._servers.enter_context(served("mlx_lm", "server", "--model", self / "teacher"))
        return f"http://127.0.0.1:{port}/v1"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def make(self) -> None:
        """Make everything, each part in a child because the parent must not compute.

        Raises:
            RuntimeError: if a command fails although nothing is broken.
        """
        from . import written
        from .images import make_images
        from .inputs import make_inputs

        self._do(lambda: _save_models(self.folder))
        self._do(command("convert", "--hf-path", self / "tiny", "--mlx-path", self / "mlx"))
        self._do(command("convert", "--hf-path", self / "tiny", "--mlx-path", self / "mlx-4bit", "-q"))
        for stage in ("pretrain", "finetune"):
            self._do(command("train", *self.train(stage), "--out", self / stage))
        chat = command("chat", "--model", self / "tiny", "--max-tokens", 3, "--temp", 0, "--force")
        self._do(chat, f"{self / 'images' / 'a.png'} What is it?\n/save {self / 'saved'}\n".encode())
        self._do(lambda: make_images(self / "formats"))
        make_inputs(self)
        self._do(command("embed", self / "images", "--model", self / "siglip", "--out", self / "store"))
        (self / "answers").mkdir()
        (self / "prompts").mkdir()
        for action in (
            written.ask_folder(self, self / "answers" / "answers.jsonl"),
            written.ask_with_features(self, self / "visual"),
            written.search_folder(self, self / "images", self / "index"),
            written.use_prompt_cache(self, self / "prompts"),
        ):
            self._do(action)

    def train(self, stage: str) -> list[object]:
        """Arguments of a short run, but for --out."""
        data = (
            "--data",
            self / "rows.json",
            "--image-folder",
            self / "images",
            "--features",
            self / f"{stage}.features",
        )
        return ["--stage", stage, "--model", self / "mlx", *data, *TRAINING]

    def _do(self, action: Callable[[], None], stdin: bytes = b"") -> None:
        ended = run_child(action, self.folder, stdin, seconds=300)
        if ended.code:
            raise RuntimeError(f"nothing was broken, but exit status {ended.code}: {ended.errors}")


def _save_models(folder: Path) -> None:
    from PIL import Image, ImageDraw

    from llama3v_mlx.demo import SIGLIP
    from tests.conftest import SIGLIP_TEXT, save_siglip, save_tiny
    from tests.test_synthesize import CAPTIONS, save_teacher

    SIGLIP_TEXT["vocab_size"] = 121  # of the demo's tokenizer; this is a child, where it changes nothing else
    for name, save in (("tiny", save_tiny), ("siglip", save_siglip)):
        (folder / name).mkdir()
        save(folder / name)
    shutil.copy(SIGLIP / "spiece.model", folder / "siglip")
    (folder / "images").mkdir()
    for i, name in enumerate(("a.png", "b.jpg", "c.gif", "d.png")):
        image = Image.new("RGB", (60 + i, 50), (40 * i, 80, 200))
        ImageDraw.Draw(image).ellipse((5 * i, 5, 30 + i, 40), fill="yellow")
        image.save(folder / "images" / name)
    rows = [
        {
            "image": name,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": f"A disk, {i}."},
            ],
        }
        for i, name in enumerate(("a.png", "b.jpg", "c.gif", "d.png"))
    ]
    captions = [{"id": name, "image": name, "captions": [text]} for name, text in CAPTIONS.items()]
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in captions))
    (folder / "teacher").mkdir()
    save_teacher(folder / "teacher")
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "world" / "demo_world").mkdir(parents=True)
    asked = [
        {"image": str(folder / "images" / row["image"]), "question": "What is it?", "answer": "A disk."} for row in rows
    ]
    (folder / "world" / "demo_world" / "test.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked))

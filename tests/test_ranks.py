"""Two ranks, each a process in a folder of its own that stands for the disk of a machine."""

import json
import platform
import shutil
import signal
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from llama3v_mlx import train
from llama3v_mlx.demo import CHECKPOINT
from llama3v_mlx.features.store import FeatureStore

COUNT = 8
# A rank works through many commands, so that all of them cost the start of two processes.
RANK = """
import contextlib, io, json, os, shutil, signal, sys
from llama3v_mlx import train
from llama3v_mlx.training.loop import Loop

def die(loop, plan):
    os.kill(os.getpid(), signal.SIGKILL)

os.chdir(sys.argv[1])
for command in json.loads(sys.argv[2]):
    said, code = io.StringIO(), 0
    if command[0] == "resume" and os.path.exists("run"):
        shutil.move("run/checkpoints/step-0000004", "kept")
    if command[0] == "die":
        Loop._step = die
    with contextlib.redirect_stderr(said):
        try:
            train.main(command[1:])
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


def fill(disk: Path) -> Path:
    """A folder with the checkpoint `model`, `data.jsonl` and `images`."""
    shutil.copytree(CHECKPOINT, disk / "model")
    (disk / "images").mkdir()
    words = ["red", "green", "blue", "white", "black", "one", "two", "three"]
    with (disk / "data.jsonl").open("w") as file:
        for i in range(COUNT):
            pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(disk / "images" / f"{i}.png")
            turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": words[i]}]
            file.write(json.dumps({"image": f"{i}.png", "conversations": turns}) + "\n")
    return disk


def options(before: str = "", **changes: object) -> list[str]:
    """Arguments of a short run in the working directory, with changes: True for a flag, None to omit an option."""
    given = {"stage": "finetune", "model": "model", "data": "data.jsonl", "image_folder": "images", "iters": 4}
    given |= {"features": "store", "out": "run", "batch_size": 4, "lora_layers": 1, "save_every": 2}
    words = [before, "--dtype", "float32"]
    for name, value in (given | changes).items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


# Of one rank or of both: what is wrong, and what is said of it.
DIFFERING = {
    "a missing image": (
        options(image_folder="missing", iters=None),  # so that the number of steps differs, too
        options(image_folder="missing", iters=None),
        "rank 1 (HOST) differs from rank 0 (HOST) in its usable rows: it skips row 4 of data.jsonl; "
        "give every machine the same images",
    ),
    "another image": (
        options(image_folder="changed"),
        options(image_folder="changed"),
        "in its usable rows: row 6 of data.jsonl has another image or other tokens; give every machine",
    ),
    "other data": (
        options(data="other.jsonl"),
        options(data="other.jsonl"),
        "in the file of --data; copy it from one machine to the others",
    ),
    "other weights of Llama": (
        options(model="other"),
        options(model="other"),
        "in the weights or the config of --model; copy its folder",
    ),
    "another option": (
        options(learning_rate=1e-3),
        options(learning_rate=1e-4),
        "in --learning-rate (0.0001 and 0.001); start every rank with the same options",
    ),
    "validation on one": (options(), options(val="data.jsonl"), "in the file of --val"),
    "another stage": (
        options(stage="pretrain", features="patch"),
        options(features="tokens"),
        "in --stage (finetune and pretrain)",
    ),
    "no data": (
        options(),
        options(data="gone.jsonl"),
        "rank 1 (HOST) failed: gone.jsonl: no such file, or an empty one",
    ),
    "no store": (
        options(),
        options(features="images"),
        "rank 1 (HOST) failed: images: is not a feature store and not empty",
    ),
    "no place for the run": (
        options(out="images"),
        options(out="images"),
        "rank 0 (HOST) failed: images: is not empty and contains no run",
    ),
    "a later checkpoint": (
        options(out="later", resume=True),
        options(out="later", resume=True),
        "rank 1 (HOST) has later at step 6, rank 0 (HOST) at step 0, and --resume continues from rank 0's",
    ),
}


@pytest.fixture(scope="module")
def disks(tmp_path_factory) -> tuple[Path, Path]:
    """Two disks with the same data, and with what `DIFFERING` needs."""
    folder = tmp_path_factory.mktemp("disks")
    a, b = disks = fill(folder / "a"), fill(folder / "b")
    for disk in disks:
        for name in ("missing", "changed"):
            shutil.copytree(disk / "images", disk / name)
        shutil.copytree(disk / "model", disk / "other")
        shutil.copy(disk / "data.jsonl", disk / "other.jsonl")
    (b / "missing" / "3.png").unlink()
    shutil.copy(b / "images" / "4.png", b / "changed" / "5.png")
    (b / "other.jsonl").write_text((b / "data.jsonl").read_text().replace("What?", "What is it?"))
    (path,) = (b / "other").glob("*.safetensors")
    tensors = mx.load(str(path))
    name = next(name for name in tensors if name.endswith("layers.0.input_layernorm.weight"))
    mx.save_safetensors(str(path), tensors | {name: tensors[name] * 2}, {"format": "mlx"})
    (b / "later" / "checkpoints" / "step-0000006").mkdir(parents=True)
    return disks


@pytest.fixture(scope="module")
def results(disks: tuple[Path, Path], start_ranks) -> dict[str, list]:
    """Of each command: exit statuses of both ranks, and what both said."""
    commands = {
        "whole": [options()] * 2,
        "resumed": [options("resume", resume=True)] * 2,
        "shared": [options(features=disks[0] / "shared", image_folder=disk / "images", out="2") for disk in disks],
        **{name: case[:2] for name, case in DIFFERING.items()},
        "killed": [options("", out="3"), options("die", out="3")],
    }
    each = [json.dumps([command[rank] for command in commands.values()]) for rank in (0, 1)]
    ranks = start_ranks(*(["-c", RANK, disk, words] for disk, words in zip(disks, each, strict=True)))
    printed = [[json.loads(line) for line in rank.stdout.splitlines()] for rank in ranks]
    assert [len(lines) for lines in printed] == [len(commands), len(commands) - 1], ranks
    printed[1].append([ranks[1].returncode, ""])
    return {name: list(zip(*both, strict=True)) for name, *both in zip(commands, *printed, strict=True)}


def adapters(run: Path) -> dict[str, mx.array]:
    return mx.load(str(run / "adapters.safetensors"))


def test_ranks_with_disks_of_their_own_learn_as_one(disks, results, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, said = results["whole"]
    assert codes == (0, 0), said
    assert [len(FeatureStore(disk / "store")) for disk in disks] == [COUNT, COUNT]
    assert not (disks[1] / "run").exists()
    monkeypatch.chdir(disks[0])
    train.main(options(out="alone")[1:])
    together, alone = adapters(disks[0] / "run"), adapters(disks[0] / "alone")
    assert together.keys() == alone.keys()
    assert all(mx.abs(together[name] - alone[name]).max().item() < 1e-4 for name in alone)


def test_all_ranks_resume_from_rank_0s_checkpoint(disks, results) -> None:
    codes, said = results["resumed"]
    assert codes == (0, 0) and "continued after step 2" in said[0], said
    resumed, whole = adapters(disks[0] / "run"), adapters(disks[0] / "kept")
    assert resumed.keys() == whole.keys()
    assert all(mx.array_equal(resumed[name], whole[name]) for name in whole)


def test_ranks_share_a_store_where_images_have_other_paths(disks, results) -> None:
    codes, said = results["shared"]
    assert codes == (0, 0) and "skipped" not in said[0], said
    assert len(FeatureStore(disks[0] / "shared")) == COUNT
    shards = sorted(path.name for path in (disks[0] / "shared").glob("shard-*"))
    assert shards == ["shard-000-00000.safetensors", "shard-001-00000.safetensors"]
    assert not list(disks[0].parent.glob("*/*/store.json.*"))


@pytest.mark.parametrize("case", DIFFERING)
def test_ranks_that_differ_all_stop(disks, results, case: str) -> None:
    codes, said = results[case]
    *_, reason = DIFFERING[case]
    assert codes == (1, 1), said
    for text in said:
        (line,) = (line for line in text.splitlines() if line.startswith("error: "))
        own = reason.partition("failed: ")[2]  # the failed rank's own message
        assert reason.replace("HOST", platform.node()) in line or (own and line.startswith(f"error: {own}")), said


def test_a_rank_that_is_killed_ends_the_other(results) -> None:
    codes, said = results["killed"]
    assert codes == (1, -signal.SIGKILL)
    assert said[0].splitlines()[-1].startswith("error: lost the connection to another rank")

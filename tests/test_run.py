"""The folder of a training run, interrupted anywhere: what is there is whole, and the run goes on from it."""

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from conftest import at_every

from llama3v_mlx import files as atomic
from llama3v_mlx.training import run as run_folder
from llama3v_mlx.training.run import RunFolder, weights_digest

WRITERS = {module.__file__ for module in (run_folder, atomic)}


class Run:
    """A run whose model's weights are all the number of the step."""

    def __init__(self, folder: Path, resume: bool = False):
        self.folder = RunFolder(folder, {"seed": 0}, resume, writes=True)
        self.model, self.optimizer = nn.Linear(2, 2), optim.AdamW(1e-3)
        self.optimizer.init(self.model.trainable_parameters())
        self.state = {"best_step": None} | (self.folder.restore(self.model, self.optimizer) if resume else {})

    def save(self, step: int, best: int) -> None:
        self.model.weight = mx.full((2, 2), float(step))
        self.state["best_step"] = best
        self.folder.save(step, self.model, self.optimizer, {"best_step": best}, {})


@contextmanager
def interrupted_at(line: int) -> Iterator[None]:
    """Ctrl-C before the so-many-th line that the writing modules run."""
    lines, before = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in WRITERS:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@at_every
def test_ctrl_c_anywhere_in_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Step 4 is the best so far: a checkpoint that is kept, and that `best` leads to, once it is there at all."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which takes most of the time, and matters to power alone
    line, interrupted = 0, True
    while interrupted:
        line += every
        run = Run(tmp_path / str(line))
        for step in (1, 2, 3):
            run.save(step, best=1)
        interrupted = False
        try:
            with interrupted_at(line):
                run.save(4, best=4)
        except KeyboardInterrupt:
            interrupted = True
        del run
        run = Run(tmp_path / str(line), resume=True)
        newest = run.state["step"]
        assert newest in (3, 4) and mx.array_equal(run.model.weight, mx.full((2, 2), float(newest))), line
        for step in range(newest + 1, 9):
            run.save(step, best=4 if step >= 4 else 1)
        folder = tmp_path / str(line)
        assert sorted(os.listdir(folder)) == ["best", "checkpoints", "run.json"], line
        assert (folder / "best").resolve() == folder / "checkpoints" / "step-0000004", line
        assert sorted(os.listdir(folder / "checkpoints")) == [f"step-{i:07}" for i in (4, 7, 8)], line
    assert line > 30


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.folder.log({"step": 1, "loss": 0.5})
    before = run.folder.metrics.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl: No space left on device; make room"):
            run.folder.log({"step": 2, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.folder.metrics.read_bytes() == before


DAMAGE = {"half": b'{"step": 3, "lo', "zeros": b"\0" * 40, "a list": b"[]", "empty": b""}
DAMAGE |= {"not utf-8": b'{"step": 3}\xff'}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_of_the_metrics_is_dropped(tmp_path: Path, damage: bytes) -> None:
    run = Run(tmp_path / "run")
    for step in (1, 2, 3):
        run.folder.log({"step": step})
    run.save(2, best=2)
    lines = run.folder.metrics.read_bytes().splitlines(keepends=True)
    run.folder.metrics.write_bytes(lines[0] + damage + b"\n" + b"".join(lines[1:]) + damage)
    del run
    run = Run(tmp_path / "run", resume=True)
    assert [json.loads(line)["step"] for line in run.folder.metrics.read_text().splitlines()] == [1, 2]


def test_weights_are_known_wherever_they_lie(tmp_path: Path, folder: Path) -> None:
    digest = weights_digest(folder)
    moved = folder.rename(tmp_path / "moved")
    assert weights_digest(moved) == digest
    path = next(moved.glob("*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert weights_digest(moved) != digest


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The newest checkpoint of a run in tmp_path/run."""
    Run(tmp_path / "run").save(2, best=2)
    return tmp_path / "run" / "checkpoints" / "step-0000002"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", lambda path: path.write_text('{"step": "2"}')),
        ("state.json", lambda path: path.write_text('{"step": 1, "best_step": 1}')),
        ("state.json", lambda path: path.write_text("[" * 10**5)),
        ("adapters.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("adapters.safetensors", lambda path: mx.save_safetensors(str(path), {"weight": mx.zeros((3, 2))})),
        ("optimizer.safetensors", lambda path: path.write_bytes(b"")),
        ("optimizer.safetensors", lambda path: mx.save_safetensors(str(path), {"99999999.m": mx.zeros(1)})),
    ],
)
def test_a_damaged_checkpoint_is_named(saved: Path, name: str, damage) -> None:
    damage(saved / name)
    with pytest.raises(ValueError, match=str(saved / name)):
        Run(saved.parents[1], resume=True)


def test_metrics_elsewhere_are_not_touched(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("mine\n")
    (saved.parents[1] / "metrics.jsonl").symlink_to(tmp_path / "other.jsonl")
    with pytest.raises(OSError, match="metrics.jsonl: is a link"):
        Run(saved.parents[1], resume=True)
    assert (tmp_path / "other.jsonl").read_text() == "mine\n"


def test_a_run_killed_while_it_is_created_begins_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.999999999.partial.json").write_text('{"se')
    Run(tmp_path / "run", resume=True).save(1, best=1)
    assert sorted(os.listdir(tmp_path / "run")) == ["best", "checkpoints", "run.json"]


@pytest.mark.parametrize("resume", [False, True])
def test_one_process_at_a_time(tmp_path: Path, resume: bool) -> None:
    run = Run(tmp_path / "run")
    run.folder.log({"step": 1})
    run.folder.metrics.open("a").write('{"step": 2')  # that it is just writing
    with pytest.raises(OSError, match="run: is being written by another process"):
        Run(tmp_path / "run", resume)
    assert run.folder.metrics.read_text() == '{"step": 1}\n{"step": 2'


def test_metrics_are_flushed_before_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a loss of power takes the lines of steps that are not repeated."""
    run, flushed = Run(tmp_path / "run"), []
    run.folder.log({"step": 1})
    monkeypatch.setattr(run_folder, "flush", lambda path: flushed.append((path.name, run.folder.newest_step())))
    run.save(1, best=1)
    assert flushed == [("metrics.jsonl", 0)]

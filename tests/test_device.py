"""Device selection by an environment variable, for every command and its child processes; and a pretended GPU."""

import ast
import os
import threading
from pathlib import Path

import mlx.core as mx
import pytest

import llama3v_mlx
from llama3v_mlx import device, load
from llama3v_mlx.cli import error_line
from llama3v_mlx.demo import CHECKPOINT, IMAGES, SIGLIP
from llama3v_mlx.features.encoder import load_encoder
from llama3v_mlx.models import linux_cpu


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "is_available", lambda device: device == mx.Device(mx.cpu))


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(mx, "is_available", lambda device: True)
    monkeypatch.setattr(mx, "set_default_device", chosen.append)
    for value in ("", "gpu", "cpu"):
        monkeypatch.setenv(device.DEVICE, value)
        device.select()
    assert chosen == [mx.Device(mx.gpu), mx.Device(mx.cpu)]


@pytest.mark.parametrize(
    ("value", "said"),
    [("tpu", "LLAMA3V_DEVICE is 'tpu'; it must be cpu or gpu"), ("gpu", "LLAMA3V_DEVICE is gpu, but MLX has no GPU")],
)
def test_a_wrong_value_is_one_line(value: str, said: str, no_gpu, monkeypatch, run_main) -> None:
    monkeypatch.setenv(device.DEVICE, value)
    done = run_main("llama3v_mlx.generate", "--image", IMAGES / "42.png")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {said}") and done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match=said):
        load(CHECKPOINT)


def test_the_package_selects_when_it_is_imported(run_python) -> None:
    """Importing selects the device, also in child processes of a command; a wrong value is not an error yet."""
    code = "import sys, llama3v_mlx; print('mlx.core' in sys.modules)"
    for value, imported in (("cpu", "True"), ("", "False")):
        env = {**os.environ, "LLAMA3V_DEVICE": value}
        done = run_python("-c", code, env=env)
        assert (done.stdout.strip(), done.stderr) == (imported, "")
    help = run_python("-m", "llama3v_mlx.generate", "--help", env={**env, "LLAMA3V_DEVICE": "tpu"})
    assert help.returncode == 0 and help.stderr == ""


def test_a_pretended_gpu_takes_its_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.PRETEND, "1")
    model, _ = load(CHECKPOINT)
    assert model.language_model.model.embed_tokens.weight.dtype == mx.float16
    assert load_encoder(SIGLIP).dtype == mx.float16
    assert not linux_cpu.applies(mx.ones(1))
    monkeypatch.setenv(device.PRETEND, "")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert load_encoder(SIGLIP).dtype == mx.float32


def test_one_function_asks_for_the_device() -> None:
    """Otherwise a GPU branch could not be taken by any test here."""
    package = Path(llama3v_mlx.__file__).parent
    asks = set()
    for path in package.rglob("*.py"):
        names = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
        }
        if names & {"default_device", "is_available", "metal"}:
            asks.add(path.name)
    assert asks == {"device.py"}


def test_the_chip_has_a_name_and_memory() -> None:
    assert device.chip()
    assert 0 < device.memory_limit() <= device.memory()
    assert device.cores() >= 1


def test_no_memory_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX would abort, or wait forever for those that were started."""
    started, start = [], threading.Thread.start

    def few(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    device.check_threads.cache_clear()
    with pytest.raises(RuntimeError) as raised:
        load(CHECKPOINT)
    assert error_line(raised.value).startswith("out of memory")
    for thread in started:
        thread.join()

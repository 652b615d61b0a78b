"""The Linux CPU's fast path restores process-wide state, above all OpenBLAS's number of threads."""

import ctypes
import errno
import json
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from llama3v_mlx import HAS_OPENBLAS, embed, train
from llama3v_mlx.demo import CHECKPOINT
from llama3v_mlx.image import tile_image
from llama3v_mlx.models import linux_cpu as cpu

pytestmark = pytest.mark.skipif(not HAS_OPENBLAS, reason="needs OpenBLAS")


@pytest.fixture
def threads() -> Iterator:
    """Return a function that reads OpenBLAS's number of threads, set to 3 before the test."""
    blas = ctypes.CDLL("libopenblas.so.0")
    before = blas.openblas_get_num_threads()
    blas.openblas_set_num_threads(3)
    yield blas.openblas_get_num_threads
    blas.openblas_set_num_threads(before)


def rows(pixels: mx.array) -> mx.array:
    """Map uint8 (B, height, width, 3) to (B, 1, 3) with a matrix product."""
    x = pixels.reshape(len(pixels), -1, 3).astype(mx.float32)
    return (x.swapaxes(1, 2) @ x).sum(axis=1, keepdims=True)


def test_threads_are_restored(threads) -> None:
    pixels = np.arange(5 * 8 * 8 * 3, dtype=np.uint8).reshape(5, 8, 8, 3)
    during = []

    def encode(part: mx.array) -> mx.array:
        during.append(threads())
        return rows(part)

    together = cpu.in_streams(encode, pixels, most=2)
    assert set(during) == {1} and threads() == 3
    assert mx.array_equal(together, rows(mx.array(pixels)))  # whole numbers: exact in any order

    with cpu.all_threads():
        assert threads() == ctypes.CDLL("libopenblas.so.0").openblas_get_num_procs()
        cpu.in_streams(encode, pixels, most=2)
    assert threads() == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_threads_are_restored_when_an_exception_passes(threads, error: type[BaseException]) -> None:
    def fail(part: mx.array) -> mx.array:
        raise error

    with pytest.raises(error):
        cpu.in_streams(fail, np.zeros((2, 8, 8, 3), np.uint8), most=1)
    assert threads() == 3
    with pytest.raises(error), cpu.all_threads():
        raise error
    assert threads() == 3


def test_threads_are_restored_when_two_python_threads_encode(threads) -> None:
    pixels, done = np.ones((2, 8, 8, 3), np.uint8), []

    def encode() -> None:
        for _ in range(50):
            done.append(cpu.in_streams(rows, pixels, most=1).shape)

    workers = [threading.Thread(target=encode) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(done) == 200 and threads() == 3


def test_commands_leave_the_number_of_threads(threads, demo, siglip: Path, tmp_path: Path) -> None:
    model, processor = demo
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        Image.new("RGB", (50, 50), (i, 0, 0)).save(path)
    model.encode_image([tile_image(paths[0], processor.image_config)])
    assert threads() == 3
    embed.main([*map(str, paths), "--out", str(tmp_path / "store"), "--model", str(siglip), "--batch-size", "2"])
    assert threads() == 3
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    lines = [json.dumps({"image": path.name, "conversations": turns}) for path in paths]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = {"--stage": "finetune", "--model": CHECKPOINT, "--data": tmp_path / "data.jsonl", "--iters": 1}
    options |= {"--image-folder": tmp_path, "--features": tmp_path / "tokens", "--out": tmp_path / "run"}
    train.main([str(word) for pair in options.items() for word in pair])
    assert threads() == 3


@pytest.mark.parametrize("given, expected", [("Haswell", {"Haswell"}), (None, {"Cooperlake", "SkylakeX", "Haswell"})])
def test_kernels_of_a_cpu_newer_than_openblas(run_python, given: str | None, expected: set[str]) -> None:
    """The CPU's features choose them, not its model; the user's own choice is kept."""
    if not {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split()):
        pytest.skip("a CPU of other kernels")
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    environment |= {"OPENBLAS_CORETYPE": given} if given else {}
    script = """
import llama3v_mlx, ctypes
blas = ctypes.CDLL("libopenblas.so.0")
for name in ("config", "corename"):
    function = getattr(blas, f"openblas_get_{name}")
    function.restype = ctypes.c_char_p
    print(function().decode())
"""
    config, core = run_python("-c", script, env=environment).stdout.splitlines()
    if "DYNAMIC_ARCH" not in config:
        pytest.skip("an OpenBLAS for one CPU")
    assert core in expected


PRODUCT = """
import resource, llama3v_mlx, mlx.core as mx
x = mx.ones((512, 512)) + 0
mx.eval(x)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 40_000_000,) * 2)
print((x @ x)[0, 0].item())
"""


def test_a_product_ends_without_memory_for_buffers(run_python) -> None:
    """OpenBLAS would wait forever for a buffer of 128 MiB."""
    done = run_python(
        "-c", PRODUCT, timeout=60, env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "LLAMA3V_DEVICE": "cpu"}
    )
    assert done.stdout == "512.0\n", done.stderr


def test_no_memory_for_the_buffers_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", no_memory)
    monkeypatch.setattr(cpu, "_THREAD", threading.local())
    with pytest.raises(MemoryError, match="OpenBLAS"):
        cpu.in_streams(rows, np.zeros((2, 8, 8, 3), np.uint8), 1)

"""Shared by all tests: the environment, OpenBLAS before MLX, and the checkpoints to try things on."""
# ruff: noqa: E402

import os
import tempfile

# What a user's shell and home may have set, and a test's verdict must not depend on. float32 is float32, also on a GPU.
CACHE = tempfile.TemporaryDirectory(prefix="llama3v-cache-")
os.environ |= {"MLX_ENABLE_TF32": "0", "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": CACHE.name, "no_proxy": "*"}
for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "MLX_RANK", "MLX_HOSTFILE", "PYTHONWARNINGS"):
    os.environ.pop(name, None)
# The workers of pytest-xdist share the cores, and OpenBLAS's threads would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import llama3v_mlx  # noqa: F401, I001  (loads OpenBLAS, which must come before mlx.core)

import contextlib
import importlib
import io
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from llama3v_mlx.checkpoint import read_tensors
from llama3v_mlx.conversion.assemble import RELEASED_TOKENS
from llama3v_mlx.demo import CHECKPOINT, SIGLIP
from tools.demo.make import HF_CONFIG, build_model, save
from llama3v_mlx.features import database
from llama3v_mlx.features.encoder import published_tensors
from llama3v_mlx.sampling import Sampling
from llama3v_mlx.models.siglip import SigLIP, TextConfig, VisionConfig
from llama3v_mlx.serving.app import App, Options
from llama3v_mlx.serving.prefix_cache import PrefixCache

ROOT = Path(__file__).parents[1]
# Interrupted at every fourth place of many, and, marked `faults`, at each.
at_every = pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.faults)])
unicode_names = pytest.mark.skipif(
    sys.getfilesystemencoding() != "utf-8", reason="names of files are not Unicode, by PYTHONUTF8=0 and the locale"
)
# A job in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test simulates a power failure, and on a busy disk every flush of a database takes a while.
database.SYNCHRONOUS = "OFF"

# The demo's architecture at a hundredth of its cost, for tests that train, or that any weights will do for.
TINY = HF_CONFIG | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "query_num": 4}
TINY["vision_config"] = HF_CONFIG["vision_config"] | {"hidden_size": 32, "intermediate_size": 64}
TINY["vision_config"] |= {"num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP_VISION |= {"image_size": 56, "patch_size": 14}
SIGLIP_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
}


# Transform of each EXIF orientation, applied to stored (height, width, 3) arrays.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def tolerance(dtype: mx.Dtype, scale: float) -> float:
    """How far apart two computations in `dtype` of the same numbers, up to `scale` in size, may end.

    At least three times what the tests' models need; on a GPU they compute in half precision unless told otherwise.
    """
    return scale * {mx.float32: 1e-5, mx.float16: 1e-2, mx.bfloat16: 8e-2}[dtype]


@pytest.fixture(scope="session")
def demo():
    """The bundled model and its processor, for tests that do not change them."""
    from llama3v_mlx import load

    return load(CHECKPOINT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint, to be damaged."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def save_tiny(folder: Path) -> Path:
    """Write a small checkpoint of random weights in the released layout."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    mx.random.seed(0)
    save(build_model(Tokenizer.from_file(str(folder / "tokenizer.json")), TINY), folder, TINY)
    return folder


@pytest.fixture(scope="session")
def siglip(tmp_path_factory) -> Path:
    return save_siglip(tmp_path_factory.mktemp("siglip"))


def save_siglip(folder: Path) -> Path:
    """Write a SigLIP of random weights, as Google publishes its own."""
    mx.random.seed(0)
    model = SigLIP(
        VisionConfig.from_dict({**SIGLIP_VISION, "model_type": "siglip_vision_model"}),
        TextConfig.from_dict(SIGLIP_TEXT),
    )
    mx.save_safetensors(str(folder / "model.safetensors"), published_tensors(model))
    config = {"model_type": "siglip", "vision_config": SIGLIP_VISION, "text_config": SIGLIP_TEXT}
    (folder / "config.json").write_text(json.dumps(config))
    size = {"height": 56, "width": 56}
    preprocessor = {"size": size, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """The demo's Llama as Meta publishes its own: names without a prefix, image tokens still reserved."""
    folder = tmp_path_factory.mktemp("llama")
    tensors = read_tensors(CHECKPOINT)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {name.removeprefix("llm."): tensor for name, tensor in tensors.items() if name.startswith("llm.")},
    )
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("vision_config", "slice_config", "query_num")}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    first = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|begin_of_text|>")
    for token in tokenizer["added_tokens"]:
        if token["id"] - first in RELEASED_TOKENS:
            token["content"] = f"<|reserved_special_token_{token['id'] - first + 100}|>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def odd_character(folder: Path) -> str:
    """A character that is escaped when printed: a byte that is not UTF-8, if names on the disk may have it.

    They may not on a Mac.
    """
    try:
        (folder / "\udcff").touch()
        (folder / "\udcff").unlink()
    except OSError:
        return "\u2066"
    return "\udcff"


@pytest.fixture(scope="session")
def circles() -> Image.Image:
    """Three blue circles on white, 640×480: sliced in two rows of two by the demo."""
    image = Image.new("RGB", (640, 480), "white")
    for x, y in ((140, 130), (420, 160), (260, 350)):
        ImageDraw.Draw(image).ellipse((x - 80, y - 80, x + 80, y + 80), fill=(40, 70, 220))
    return image


@pytest.fixture
def picture(circles: Image.Image, tmp_path: Path) -> Path:
    path = tmp_path / "circles.png"
    circles.save(path)
    return path


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """Run `python ARGS…` in the repository and keep what it prints."""

    def run(*args: str | Path, **kwargs) -> subprocess.CompletedProcess:
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | kwargs
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run([sys.executable, *map(str, args)], **options)

    return run


@pytest.fixture(scope="session")
def run_main() -> Callable[..., subprocess.CompletedProcess]:
    """As `python -m MODULE ARGS…`, in this process: seconds less, where nothing depends on its being another."""

    def run(module: str, *args: str | Path, input: str | bytes = "") -> subprocess.CompletedProcess:
        out, errors, code = io.StringIO(), io.StringIO(), 0
        stdin = io.BytesIO(input if isinstance(input, bytes) else input.encode())
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            patch.setattr(sys, "stdin", io.TextIOWrapper(stdin, encoding="utf-8"))
            try:
                importlib.import_module(module).main([*map(str, args)])
            except SystemExit as e:
                code = e.code or 0
        return subprocess.CompletedProcess(args, code, out.getvalue(), errors.getvalue())

    return run


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory) -> Callable[..., list[subprocess.CompletedProcess]]:
    """Run `python ARGS…` for each list of arguments, as ranks of `mlx.distributed` on 127.0.0.1."""

    def start(*each: Sequence[str | Path]) -> list[subprocess.CompletedProcess]:
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in each]
            for s in sockets:
                s.bind(("127.0.0.1", 0))
            hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
        hostfile = tmp_path_factory.mktemp("ranks") / "hosts.json"
        hostfile.write_text(json.dumps(hosts))
        ranks = []
        for i, args in enumerate(each):
            env = {**os.environ, "MLX_RANK": str(i), "MLX_HOSTFILE": str(hostfile)}
            options = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            ranks.append(subprocess.Popen([sys.executable, *map(str, args)], **options))
        try:
            output = [rank.communicate(timeout=200) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        ended = zip(ranks, output, strict=True)
        return [subprocess.CompletedProcess(rank.args, rank.returncode, *printed) for rank, printed in ended]

    return start


@pytest.fixture(scope="session")
def run_ranks(start_ranks) -> Callable[..., list[str]]:
    """Run `python ARGS…` as two ranks, which must succeed, and return what each printed."""

    def run(*args: str | Path) -> list[str]:
        ranks = start_ranks(args, args)
        assert [rank.returncode for rank in ranks] == [0, 0], ranks
        return [rank.stdout for rank in ranks]

    return run


@contextlib.contextmanager
def serving(model, processor, prefixes: PrefixCache | None = None, **options) -> Iterator[App]:
    """A server in this process, on a free port of 127.0.0.1; greedy unless a request says otherwise."""
    app = App(Options(name="llama3v-demo", port=0, **options))
    app.listen(model, processor, prefixes or PrefixCache(10**8), Sampling(temperature=0, repetition_penalty=1))
    thread = threading.Thread(target=app.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield app
    finally:
        app.close()
        thread.join()


@pytest.fixture(scope="module")
def app(demo) -> Iterator[App]:
    """A server with the demo, its key "secret"; nothing that is asked of it may be an internal error.

    Tests that break a server of their own do it by a division by zero.
    """
    errors: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: None if record.exc_info[0] is ZeroDivisionError else errors.append(record)
    logging.getLogger("llama3v_mlx").addHandler(handler)
    with serving(*demo, api_key="secret", max_body=2_000_000, embedding_model=SIGLIP) as app:
        yield app
    logging.getLogger("llama3v_mlx").removeHandler(handler)
    assert not errors, [(record.getMessage(), record.exc_info) for record in errors]


@pytest.fixture(scope="module")
def port(app: App) -> int:
    return app.server_port


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)

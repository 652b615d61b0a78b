"""Latency of the server: gaps between tokens while another image is encoded, and an image known before a restart.

    python benchmarks/serve.py                # a model of 10 tiles and random weights, for a laptop's CPU
    python benchmarks/serve.py --model DIR    # a checkpoint

Gaps are seen by clients that stream, first undisturbed and then while images of as many tiles as the model takes are
read one after another, each a new one. The last line is one JSON object with all figures.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from embed import machine, say  # first: it loads OpenBLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from llama3v_mlx.checkpoint import read_config
from llama3v_mlx.demo import CHECKPOINT
from llama3v_mlx.evaluate import served
from llama3v_mlx.loading import build_model

CHAT = "/v1/chat/completions"
MODEL = {
    "image_config": {"scale_resolution": 448, "patch_size": 14, "max_slice_nums": 9},
    "vision_config": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 12, "num_attention_heads": 2},
    "projector_config": {"hidden_size": 768, "vision_hidden_size": 96, "num_attention_heads": 6, "num_queries": 96},
    "text_config": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def make_checkpoint(folder: Path) -> None:
    """A model of the released slicing and small nets with random weights; the tokenizer is the demo's.

    A layer of the tower takes about a fifth of a step of Llama, as on the Macs that the real ones are for.
    """
    config = read_config(CHECKPOINT)
    for name, values in MODEL.items():
        config[name] = {**config[name], **values}
    config["text_config"] |= {"num_key_value_heads": 6, "max_position_embeddings": 8192}
    mx.random.seed(0)
    model = build_model(config)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    for path in CHECKPOINT.glob("tokenizer*"):
        shutil.copy(path, folder)


def picture(seed: int) -> str:
    """A new image of 1344×1344 pixels, a data: URI."""
    pixels = np.random.default_rng(seed).integers(0, 256, (42, 42, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((1344, 1344), Image.Resampling.NEAREST).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(port: int, text: str, image: str | None = None, **options) -> http.client.HTTPResponse:
    parts = [{"type": "image_url", "image_url": {"url": image}}] if image else []
    body = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", CHAT, json.dumps(body | options), {"Content-Type": "application/json"})
    return connection.getresponse()


@contextlib.contextmanager
def streaming(port: int, ends: dict[str, int]) -> Iterator[list[float]]:
    """Times at which a client receives tokens of an endless answer."""
    times: list[float] = []
    # With log-probabilities every token has an event, also one that is no text yet.
    response = ask(port, "Hello", stream=True, max_tokens=8000, logit_bias=ends, logprobs=True)

    def read() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError, http.client.HTTPException):
            for line in response:
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield times
    finally:
        response.fp.raw._sock.shutdown(2)
        reader.join()


def gaps(port: int, ends: dict[str, int], clients: int, images: int, quiet: float) -> dict:
    """Milliseconds between a client's tokens, undisturbed and while images are read."""
    json.loads(ask(port, "Hello", picture(10**6), max_tokens=1).read())  # warms up
    with contextlib.ExitStack() as stack:
        times = [stack.enter_context(streaming(port, ends)) for _ in range(clients)]
        while not all(len(each) > 20 for each in times):
            time.sleep(0.01)
        begin = time.perf_counter()
        time.sleep(quiet)
        middle = time.perf_counter()
        for i in range(images):
            usage = json.loads(ask(port, "Hello", picture(i), max_tokens=1).read())["usage"]
        end = time.perf_counter()

    def between(start: float, stop: float) -> np.ndarray:
        found = [np.diff([t for t in each if start <= t <= stop]) for each in times]
        return 1000 * np.concatenate(found)

    alone, reading = between(begin, middle), between(middle, end)
    median = float(np.median(alone))
    figures = {"median_ms": median, "alone_max_ms": float(alone.max()), "reading_median_ms": float(np.median(reading))}
    figures |= {f"reading_p{p}_ms": float(np.percentile(reading, p)) for p in (99, 100)}
    figures |= {"seconds_per_image": (end - middle) / images, "prompt_tokens": usage["prompt_tokens"]}
    say(f"{clients} clients, undisturbed: tokens every {median:.1f} ms, all within {alone.max() / median:.2f} medians")
    say(
        f"while images of {usage['prompt_tokens']} tokens are read: every {np.median(reading):.1f} ms, "
        f"99 % within {figures['reading_p99_ms'] / median:.2f} medians, all within {reading.max() / median:.2f}"
    )
    return figures


def restart(model: str, folder: Path) -> list[dict]:
    """A first question about an image, and after a restart a second one about it and one about another image."""
    rows = []
    for name, seed, text in (("first", 0, "Hello"), ("second", 0, "Who are you?"), ("other image", 1, "Who are you?")):
        with served("llama3v_mlx.server", "--model", model, "--prompt-cache-dir", folder) as (_, port, _):
            ask(port, "Hello", max_tokens=1).read()
            start = time.perf_counter()
            usage = json.loads(ask(port, text, picture(seed), max_tokens=1).read())["usage"]
            seconds = time.perf_counter() - start
        read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        rows.append({"question": name, "prompt_tokens": usage["prompt_tokens"], "read": read, "seconds": seconds})
        say(f"{name}: {read} of {usage['prompt_tokens']} tokens read, first token after {seconds:.2f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint (default: one with random weights is made)")
    parser.add_argument("--clients", type=int, default=2, help="streaming clients (default: 2)")
    parser.add_argument("--images", type=int, default=3, help="images encoded meanwhile (default: 3)")
    parser.add_argument("--quiet", type=float, default=5.0, help="seconds without images, before (default: 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = args.model or f"{work}/model"
        if args.model is None:
            Path(model).mkdir()
            make_checkpoint(Path(model))
        ends = {str(token): -100 for token in read_config(Path(model))["eos_token_id"]}
        result = {"benchmark": "serve", "machine": machine()}
        with served("llama3v_mlx.server", "--model", model) as (_, port, _):
            result["gaps"] = gaps(port, ends, args.clients, args.images, args.quiet)
        result["restart"] = restart(model, Path(work, "prefixes"))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Images per second of `llama3v generate --images` against asking about one after another.

    python benchmarks/folder.py                  # the demo, and two layers of Llama-3-8B's width
    python benchmarks/folder.py --images 64 --tokens 128 --batch 1,8,16

Both answer the same pictures with the same number of tokens, in turn; medians of wall time, and of CPU time, which
other processes disturb less. A batch gains in decoding: a step of all answers reads the weights once. The answers must
be equal. The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from embed import machine, say  # first: it loads OpenBLAS before MLX

# isort: split
import mlx.core as mx
from generate import never, wide
from PIL import Image

from llama3v_mlx import generate, load
from llama3v_mlx.ask_folder import Asking, Lines
from llama3v_mlx.batch_generate import ImageBatch
from llama3v_mlx.demo import CHECKPOINT, IMAGES
from llama3v_mlx.features.sources import find_sources
from llama3v_mlx.models.llama3v import Model
from llama3v_mlx.sampling import Sampling
from llama3v_mlx.serving.batch import Settings

QUESTION = "What is this image?"
GREEDY = Sampling(temperature=0, repetition_penalty=1)


class Collected(Lines):
    """Answers in memory, by path."""

    def __init__(self):
        self.rows: dict[str, str] = {}

    def write(self, row: dict) -> None:
        self.rows[row["path"]] = row["answer"]


def pictures(folder: Path, count: int) -> None:
    """Write `count` pictures of different bytes."""
    originals = [Image.open(path).convert("RGB") for path in sorted(IMAGES.iterdir())]
    for i in range(count):
        image = originals[i % len(originals)].copy()
        image.putpixel((0, 0), (i % 256, i // 256, 0))
        image.save(folder / f"{i:05}.png")


def one_by_one(model: Model, processor, folder: Path, length: int) -> dict[str, str]:
    options = {"temperature": 0, "repetition_penalty": 1, "max_tokens": length}
    ban = never(list(processor.tokenizer.eos_token_ids))
    return {
        str(path): generate(model, processor, QUESTION, path, logits_processors=[ban], **options)
        for path in sorted(folder.iterdir())
    }


def batched(model: Model, processor, folder: Path, length: int, size: int) -> dict[str, str]:
    bias = dict.fromkeys(processor.tokenizer.eos_token_ids, float("-inf"))
    settings, collected = Settings(length, GREEDY, logit_bias=bias), Collected()
    with ImageBatch(model, processor, QUESTION, settings, size) as batch:
        Asking(batch, collected, processor.image_config, None, False, lambda _: None).run(find_sources([str(folder)]))
    return collected.rows


def measure(name: str, model: Model, processor, folder: Path, args: argparse.Namespace) -> dict:
    ways: dict[str, Callable] = {"one by one": lambda: one_by_one(model, processor, folder, args.tokens)}
    ways |= {f"{n} at once": lambda n=n: batched(model, processor, folder, args.tokens, n) for n in args.batch}
    times, answers = {way: [] for way in ways}, {}
    for i in range(args.repeats + 1):  # the first warms up
        for way, run in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            answers[way] = run()
            if i:
                times[way].append((time.perf_counter() - wall, time.process_time() - cpu))
    count = len(answers["one by one"])
    say(f"{name}, {count} images, {args.tokens} tokens each:")
    rows = {}
    for way, measured in times.items():
        wall, cpu = map(statistics.median, zip(*measured, strict=True))
        equal = sum(answers[way][path] == text for path, text in answers["one by one"].items())
        rows[way] = {"images_per_second": count / wall, "cpu_seconds_per_image": cpu / count, "equal": equal / count}
        gain = rows["one by one"]["cpu_seconds_per_image"] / (cpu / count)
        say(
            f"  {way:>12}: {count / wall:6.2f} images/s, {cpu / count:.3f} s of CPU per image ({gain:.2f}x), "
            f"{equal} of {count} answers equal"
        )
    return {"name": name, "images": count, "tokens": args.tokens, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers of the wide Llama; 0: the demo only (default: 2)")
    parser.add_argument("--images", type=int, default=32, help="(default: 32)")
    parser.add_argument("--tokens", type=int, default=32, help="generated tokens per image (default: 32)")
    parser.add_argument("--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    args = parser.parse_args()
    small, processor = load(CHECKPOINT)
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures(folder, args.images)
        rows = [measure("demo", small, processor, folder, args)]
        if args.layers:
            model = wide(small, args.layers, dtype)
            rows.append(measure(f"4096 wide, {args.layers} layers", model, processor, folder, args))
    print(json.dumps({"benchmark": "folder", "machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()

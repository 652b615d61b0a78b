"""Throughput of embedding images and its bound: the roofline, then a sweep over batch sizes.

    python benchmarks/embed.py                                  # so400m at 384 px, random weights: no download
    python benchmarks/embed.py --random so400m-224 --batch 8,32 --peers --plot embed.png
    python benchmarks/embed.py --end-to-end 24                  # JPEGs through the whole command as well
    python benchmarks/embed.py --preprocess --memory --rows 1000000 --batch ''   # the rest of what is claimed

The tower's time is from uint8 pixels in numpy to embeddings that are evaluated, the median after a warm-up. The last
line is one JSON object with all figures.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from llama3v_mlx import HAS_OPENBLAS  # first: it loads OpenBLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
from PIL import Image

from llama3v_mlx.device import chip, cores, matmul_peak, on_gpu
from llama3v_mlx.features.encoder import ImageEncoder, load_encoder, published_tensors
from llama3v_mlx.features.store import Features, FeatureStore, StoreInfo
from llama3v_mlx.features.writer import FeatureWriter
from llama3v_mlx.models.siglip import SigLIP, VisionConfig
from llama3v_mlx.tiling import TiledImage

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SHAPES = {
    "so400m-384": {**SO400M, "image_size": 384, "patch_size": 14},
    "so400m-224": {**SO400M, "image_size": 224, "patch_size": 14},
    "so400m-448": {**SO400M, "image_size": 448, "patch_size": 14},
    "base-224": {**BASE, "image_size": 224, "patch_size": 16},
}
TARGET = 32.0  # images per second, of the original article
PEER_PROGRAM = Path(__file__).with_name("peers.py")
PEERS = ("torch", "torch-compile", "mlx-vlm", "mlx-embeddings")


def say(text: str = "") -> None:
    print(text, flush=True)


def machine() -> dict:
    """The machine and the versions."""
    gpu = on_gpu()
    return {
        "chip": chip(),
        "backend": "gpu" if gpu else f"cpu, {cores()} cores" + (", OpenBLAS" if HAS_OPENBLAS else ""),
        "system": f"{platform.system()} {platform.release()}",
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
    }


def random_encoder(shape: str, dtype: mx.Dtype) -> ImageEncoder:
    """An encoder of a true shape with small random weights."""
    mx.random.seed(0)
    model = SigLIP(VisionConfig.from_dict({**SHAPES[shape], "model_type": "siglip_vision_model"}), None)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return ImageEncoder(f"random {shape}", model, "pooled", None)


def measure(encoder: ImageEncoder, batch: int, repeats: int) -> list[float]:
    """Seconds per batch after a warm-up."""
    side = encoder.config.image_size
    rng = np.random.default_rng(0)
    images = [TiledImage((rng.integers(0, 256, (side, side, 3), dtype=np.uint8),), None) for _ in range(batch)]
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        mx.eval([f.rows for f in encoder.encode(images)])
        times.append(time.perf_counter() - start)
    return times[1:]


def sweep(encoder: ImageEncoder, batches: list[int], repeats: int, peak: float) -> list[dict]:
    """The tower alone, batch size by batch size."""
    flops = encoder.flops((encoder.config.image_size, encoder.config.image_size))
    rows = []
    say(f"{'batch':>6} {'ms/batch':>10} {'images/s':>10} {'TFLOP/s':>9} {'of peak':>8}")
    for batch in batches:
        times = measure(encoder, batch, repeats)
        rate = batch / statistics.median(times)
        rows.append({"batch": batch, "seconds": times, "images_per_second": rate, "tflops": rate * flops / 1e12})
        rows[-1]["share_of_peak"] = rate * flops / peak
        say(f"{batch:6} {1000 * batch / rate:10.1f} {rate:10.2f} {rows[-1]['tflops']:9.3f} {rate * flops / peak:8.1%}")
    return rows


def peers(encoder: ImageEncoder, batch: int, repeats: int, dtypes: list[str], python: str, ours: float) -> list[dict]:
    """Time other towers of the same shape in processes of their own; ratios are ours to theirs."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    config = json.dumps({name: getattr(encoder.config, name) for name in names})
    rows = []
    for name in PEERS:
        for dtype in dtypes if name.startswith("torch") else [str(encoder.dtype).removeprefix("mlx.core.")]:
            # As their users get them on a CPU: a minute and more for one image, so they are asked for one.
            slow = name.startswith("mlx") and not on_gpu()
            size = 1 if slow else batch
            interpreter = python if name.startswith("mlx") else sys.executable
            command = [interpreter, str(PEER_PROGRAM), name, dtype, config, str(size), str(repeats)]
            done = subprocess.run(command, capture_output=True, text=True)
            row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"missing": done.stderr[-300:]}
            row["name"] = name
            rows.append(row)
            if "missing" in row:
                say(f"{name} {dtype}: not measured ({row['missing'].strip().splitlines()[-1]})")
                continue
            row["images_per_second"] = size / row["median"]
            row["ours_to_theirs"] = ours / row["images_per_second"]
            say(
                f"{row['peer']} {dtype}, batch {size}: {row['images_per_second']:.3f} images/s; "
                f"ours is {row['ours_to_theirs']:.2f}x"
            )
    return rows


def jpeg(width: int, height: int, seed: int) -> bytes:
    """A JPEG about as slow to decode as a photograph: coarse and fine noise, 4:2:0."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (height // 64, width // 64, 3), dtype=np.uint8))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = rng.normal(0, 9, (height // 2, width // 2)).astype(np.int16).repeat(2, 0).repeat(2, 1)[..., None]
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def save_checkpoint(encoder: ImageEncoder, folder: Path) -> None:
    """The random tower as a folder that the command can load."""
    mx.save_safetensors(str(folder / "model.safetensors"), published_tensors(encoder.model))
    vision = {key: value for key, value in vars(encoder.config).items() if key != "model_type"}
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))


def run_command(*args: str) -> tuple[dict, float, int]:
    """The embed command: its figures, seconds with start and end, and its peak of resident memory in bytes."""
    command = [sys.executable, "-m", "llama3v_mlx.embed", *args, "--json"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: {' '.join(command)} failed; its message is above")
    unit = 1 if sys.platform == "darwin" else 1024
    return json.loads(output.splitlines()[-1]), time.perf_counter() - start, usage.ru_maxrss * unit


def end_to_end(encoder: ImageEncoder, count: int, batch: int) -> list[dict]:
    """JPEGs through the whole command, and the same number of images through the tower alone, in turn."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "model").mkdir()
        save_checkpoint(encoder, folder / "model")
        for width, height in ((640, 480), (4032, 3024)):
            images = folder / f"{width}x{height}"
            images.mkdir()
            for i in range(count):
                (images / f"{i}.jpg").write_bytes(jpeg(width, height, i))
            dtype = str(encoder.dtype).removeprefix("mlx.core.")
            figures, _, _ = run_command(
                *(str(images), "--out", str(folder / f"store-{width}"), "--model", str(folder / "model")),
                *("--batch-size", str(batch), "--dtype", dtype),
            )
            # `seconds` is the pipeline's: from the first file to the last row written, without loading the model.
            alone = batch / statistics.median(measure(encoder, batch, max(2, count // batch)))
            row = {"size": [width, height], "images": count, "images_per_second": figures["images_per_second"]}
            row |= {"tower_alone": alone, "ratio": figures["images_per_second"] / alone}
            row["stage_seconds"] = figures["stage_seconds"]
            rows.append(row)
            say(
                f"{count} JPEGs of {width}x{height}: {row['images_per_second']:.2f} images/s end to end, "
                f"{alone:.2f} the tower alone: {row['ratio']:.2f}"
            )
    return rows


def preprocess(repeats: int) -> list[dict]:
    """From JPEG bytes to what the tower takes at 384 px, on one core: exact, with --draft, and Hugging Face's."""
    shape = VisionConfig.from_dict({**SHAPES["so400m-384"], "num_hidden_layers": 0, "model_type": "siglip"})
    model = SigLIP(shape, None)
    ways = {
        "ours, exact": ImageEncoder("", model, "pooled", None).prepare,
        "ours, --draft": ImageEncoder("", model, "pooled", None, draft=True).prepare,
    }
    try:
        from transformers import SiglipImageProcessor

        side = {"height": 384, "width": 384}
        processor = SiglipImageProcessor(size=side)
        ways[f"transformers {type(processor).__name__}"] = lambda data: processor(
            Image.open(io.BytesIO(data)), return_tensors="np"
        )
    except ImportError as e:
        say(f"Hugging Face's processor: not measured ({e})")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    for width, height in ((640, 480), (4032, 3024)):
        files = [jpeg(width, height, seed) for seed in range(3)]
        for name, prepare in ways.items():
            prepare(files[0])
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                for data in files:
                    prepare(data)
                times.append((time.perf_counter() - start) / len(files))
            rows.append({"size": [width, height], "way": name, "seconds": statistics.median(times)})
        exact = rows[-len(ways)]["seconds"]
        for row in rows[-len(ways) :]:
            say(f"{width}x{height} {row['way']}: {1000 * row['seconds']:.1f} ms, {row['seconds'] / exact:.2f} of exact")
    return rows


def memory(counts: tuple[int, ...] = (1000, 20000)) -> list[dict]:
    """The command's peak memory on many small PNGs, with the bundled SigLIP."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as temporary:
            images = Path(temporary, "images")
            images.mkdir()
            rng = np.random.default_rng(0)
            for i in range(count):
                pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((160, 120)).save(images / f"{i}.png")
            store = str(Path(temporary, "store"))
            figures, _, peak = run_command(str(images), "--out", store, "--batch-size", "16")
        rows.append({"images": count, "peak_bytes": peak, "images_per_second": figures["images_per_second"]})
        say(f"{count} images: {figures['images_per_second']:.0f} images/s, peak memory {peak / 1e6:.0f} MB")
    say(f"peak memory at {counts[-1]} images is {rows[-1]['peak_bytes'] / rows[0]['peak_bytes']:.3f} of {counts[0]}'s")
    return rows


def opening(count: int, width: int = 8) -> dict:
    """Time opening, look-ups and streaming of a store of `count` rows."""
    with tempfile.TemporaryDirectory() as temporary:
        store = FeatureStore.create(Path(temporary, "store"), StoreInfo("random", "pooled", "0", width, "float16"))
        rng = np.random.default_rng(0)
        block = mx.array(rng.normal(size=(1, width)).astype(np.float16))
        with FeatureWriter(store) as writer:
            for start in range(0, count, 10000):
                keys = rng.bytes(32 * min(10000, count - start))
                writer.add([(keys[i : i + 32], Features(block, (1, 1))) for i in range(0, len(keys), 32)])
        start = time.perf_counter()
        store = FeatureStore(Path(temporary, "store"))
        opened = time.perf_counter() - start
        keys = [key for key, _ in store.sizes()]
        start = time.perf_counter()
        for i in rng.integers(0, count, 1000):
            store.get(keys[i])
        found = (time.perf_counter() - start) / 1000
        start = time.perf_counter()
        streamed = sum(len(rows) for rows in store.matrix())
        rate = streamed / (time.perf_counter() - start)
    say(f"{count} rows: opened in {opened:.2f} s, one found in {1e6 * found:.0f} us, streamed at {rate:.3g} rows/s")
    return {"rows": count, "open_seconds": opened, "get_seconds": found, "rows_per_second": rate}


def plot(figures: dict, path: str) -> None:
    """Images per second over the batch size, under the bound; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = figures["sweep"]
    _, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    sizes = [row["batch"] for row in rows]
    axes.plot(sizes, [row["images_per_second"] for row in rows], marker="o", label="llama3v_mlx")
    axes.axhline(figures["bound"], color="#888888", linestyle="--", label="bound: measured matmul peak")
    for row in figures.get("peers", []):
        if "images_per_second" in row:
            axes.plot(row["batch"], row["images_per_second"], "x", label=f"{row['name']} {row['dtype']}")
    axes.set(xscale="log", xlabel="batch size", ylabel="images/s", xticks=sizes, ylim=(0, None))
    axes.set_xticklabels([str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_title(f"{figures['model']}, {figures['dtype']}, {figures['machine']['chip']}", fontsize=10)
    axes.legend(frameon=False)
    plt.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="SigLIP checkpoint, instead of random weights")
    parser.add_argument("--random", choices=SHAPES, default="so400m-384", help="a shape (default: so400m-384)")
    gpu = on_gpu()
    batches = "1,2,4,8,16,32" if gpu else "1,2,4"
    parser.add_argument("--batch", default=batches, help=f"batch sizes; '' for no sweep (default here: {batches})")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="(default: what suits the device)")
    repeats = 20 if gpu else 3
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed runs (default here: {repeats})")
    parser.add_argument("--peers", action="store_true", help="time other installed packages, at the last batch size")
    parser.add_argument("--peers-python", default=sys.executable, help="the Python that has mlx-vlm and mlx-embeddings")
    parser.add_argument("--end-to-end", type=int, metavar="N", help="N JPEGs of two sizes through the whole command")
    parser.add_argument("--preprocess", action="store_true", help="JPEGs to pixels, on one core")
    parser.add_argument("--memory", action="store_true", help="peak memory of the command at 1,000 and 20,000 images")
    parser.add_argument("--rows", type=int, metavar="N", help="a store of N rows: opened, looked up, streamed")
    parser.add_argument("--plot", metavar="PNG", help="draw the sweep (needs matplotlib)")
    args = parser.parse_args()

    # First: on Linux a process counts what the one that started it had in memory.
    peaks = memory() if args.memory else None
    dtype = getattr(mx, args.dtype or ("float16" if gpu else "float32"))
    encoder = load_encoder(args.model, "pooled", dtype) if args.model else random_encoder(args.random, dtype)
    encoder.all_cores = True
    side = encoder.config.image_size
    flops, peak = encoder.flops((side, side)), matmul_peak(dtype)
    bound = peak / flops
    figures = {"machine": machine(), "model": encoder.name, "dtype": str(dtype).removeprefix("mlx.core.")}
    figures |= {"image_size": side, "gflop_per_image": flops / 1e9, "peak_tflops": peak / 1e12, "bound": bound}
    say(", ".join(f"{key} {value}" for key, value in figures["machine"].items()))
    say(f"{encoder.name} at {side} px, {figures['dtype']}")
    say(
        f"roofline: {flops / 1e9:.1f} GFLOP per image; the matmul peak measured here is {peak / 1e12:.3f} TFLOP/s; "
        f"so at most {bound:.2f} images/s"
    )
    if peaks:
        figures["memory"] = peaks
    sizes = [int(size) for size in args.batch.split(",") if size]
    if sizes:
        figures["sweep"] = sweep(encoder, sizes, args.repeats, peak)
        best = max(row["images_per_second"] for row in figures["sweep"])
        say(
            f"target {TARGET:.0f} images/s: {'met' if best >= TARGET else 'not met'}; at this resolution it takes "
            f"{TARGET * flops / 1e12:.1f} TFLOP/s sustained, this device's bound is {peak / 1e12:.3f}"
        )
    if args.peers and sizes:
        dtypes = list(dict.fromkeys([figures["dtype"], "bfloat16"]))
        ours = figures["sweep"][-1]["images_per_second"]
        figures["peers"] = peers(encoder, sizes[-1], args.repeats, dtypes, args.peers_python, ours)
    if args.end_to_end:
        figures["end_to_end"] = end_to_end(encoder, args.end_to_end, sizes[-1] if sizes else 4)
    if args.rows:
        figures["store"] = opening(args.rows)
    if args.plot and sizes:
        plot(figures, args.plot)
    if args.preprocess:  # last: it keeps this process on one core
        figures["preprocess"] = preprocess(max(3, args.repeats))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()

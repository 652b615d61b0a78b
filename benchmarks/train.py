"""Training steps from stored features against steps that run the tower; and the whole recipe on paper.

    python benchmarks/train.py                       # the demo's size, and so400m with two layers of Llama-3-8B
    python benchmarks/train.py --shape demo --steps 10
    python benchmarks/train.py --qlora 3             # QLoRA steps on a random 4-bit checkpoint of full size

Weights, features, images and text are random and of the true shapes. A step is all of it: reading the store, batch,
gradients, update; "with the tower" also encodes the same images, ready as tiles, in each. The last line is one JSON
object with all figures.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from embed import SO400M, machine, say  # first: it loads OpenBLAS before MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from llama3v_mlx.features.encoder import ImageEncoder
from llama3v_mlx.features.store import Features, FeatureStore, StoreInfo
from llama3v_mlx.features.writer import FeatureWriter
from llama3v_mlx.models.llama3v import Model, ModelArgs
from llama3v_mlx.tiling import ImageConfig
from llama3v_mlx.training.batch import collate, count_answers
from llama3v_mlx.training.data import Dialogue
from llama3v_mlx.training.trainer import Trainer

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY_LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY_TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4}


@dataclass(frozen=True)
class Shape:
    """Shape of a model and of its rows."""

    llama: dict
    layers: int
    tower: dict
    side: int  # pixels of a tile
    queries: int
    vocabulary: int
    batch: int
    prompt: int  # tokens of text before the answer
    answer: int


SHAPES = {
    "demo": Shape(TINY_LLAMA, 3, TINY_TOWER, 112, 12, 512, 16, 30, 30),
    "so400m": Shape(LLAMA_8B, 2, SO400M, 378, 96, 4096, 2, 32, 32),
    "8b": Shape(LLAMA_8B, 32, SO400M, 378, 96, 128256, 1, 4, 4),
}


def build(shape: Shape) -> Model:
    """A model of random weights; its image token is the vocabulary's last."""
    text = {**shape.llama, "num_hidden_layers": shape.layers, "vocab_size": shape.vocabulary, "rms_norm_eps": 1e-5}
    width = shape.llama["hidden_size"]
    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama3v",
            text_config={**text, "model_type": "llama", "rope_theta": 500000.0, "tie_word_embeddings": False},
            vision_config={**shape.tower, "image_size": 980},
            projector_config={
                "hidden_size": width,
                "vision_hidden_size": shape.tower["hidden_size"],
                "num_queries": shape.queries,
                "num_attention_heads": width // 128,
            },
            prompt_tokens={"image": shape.vocabulary - 1},
        )
    )
    model.projector.query = 0.02 * mx.random.normal(model.projector.query.shape)
    return model


def make_rows(shape: Shape, folder: Path, kind: str) -> tuple[FeatureStore, list[Dialogue]]:
    """Rows with an image of one tile each, and a store with its features."""
    rng = np.random.default_rng(0)
    grid = shape.side // 14
    tower, llama = shape.tower["hidden_size"], shape.llama["hidden_size"]
    rows, width = (grid * grid, tower) if kind == "patch" else (shape.queries, llama)
    store = FeatureStore.create(folder, StoreInfo("random", kind, "", width, "float16"))
    dialogues = []
    with FeatureWriter(store) as writer:
        for i in range(shape.batch):
            key = hashlib.sha256(f"{kind} {i}".encode()).digest()
            values = rng.standard_normal((rows, width), dtype=np.float32).astype(np.float16)
            writer.add([(key, Features(mx.array(values), (grid, grid)))])
            text = rng.integers(0, shape.vocabulary - 1, shape.prompt + shape.answer)
            ids = np.r_[[shape.vocabulary - 1] * shape.queries, text].astype(np.int32)
            dialogues.append(Dialogue(ids, np.arange(len(ids)) >= len(ids) - shape.answer, (key,)))
    return store, dialogues


def measure(shape: Shape, stage: str, steps: int, dtype: mx.Dtype) -> dict:
    """Seconds and memory of a step of a stage, from the store and with the tower."""
    model = build(shape)
    model.set_dtype(dtype)
    model.freeze()
    if stage == "pretrain":
        model.projector.set_dtype(mx.float32)
        model.projector.unfreeze()
    else:
        linear_to_lora_layers(model, shape.layers, {"rank": 16, "scale": 2.0, "dropout": 0.0})
    kind = "patch" if stage == "pretrain" else "visual-tokens"
    config = ImageConfig(scale_resolution=shape.side, patch_size=14, max_slice_nums=1)
    encoder = ImageEncoder("random", model, kind, config)
    mx.eval(model.parameters())
    tower = dict(tree_flatten(model.vision_tower.parameters()))
    rng = np.random.default_rng(0)
    tiles = [encoder.prepare(_image(rng, shape.side)) for _ in range(shape.batch)]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        store, dialogues = make_rows(shape, Path(folder), kind)
        optimizer = optim.AdamW(1e-4)
        optimizer.init(model.trainable_parameters())
        vision = model.pop("vision_tower")
        trainer = Trainer(model.train(), optimizer)
        total, tokens = count_answers(dialogues), sum(len(d.ids) for d in dialogues)
        for name in ("stored", "tower"):
            times = []
            for i in range(steps + 1):  # the first compiles
                if i == 1:
                    mx.reset_peak_memory()
                start = time.perf_counter()
                batch = collate(dialogues, store, shape.vocabulary - 1, shape.queries)
                if name == "tower":
                    model.vision_tower = vision
                    rows = [f.rows for f in encoder.encode(tiles)]
                    del model.vision_tower
                    visual = [mx.stack(rows)] if kind == "patch" else [mx.concatenate(rows)]
                    batch = replace(batch, visual=visual)
                    mx.eval(visual)
                if trainer.step([batch], total) is None:
                    raise SystemExit("error: a step was not finite")
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times[1:])
            found[name] = {"seconds": times[1:], "tokens_per_second": tokens / seconds}
            found[name] |= {"images_per_second": shape.batch / seconds, "peak_memory_gb": mx.get_peak_memory() / 1e9}
    weights = sum(t.nbytes for t in tower.values()) / 1e9
    found["stored"]["peak_memory_gb"] -= weights  # it is in memory here for the comparison, and never in the command
    ratio = statistics.median(found["tower"]["seconds"]) / statistics.median(found["stored"]["seconds"])
    for name, label in (("stored", "from the store"), ("tower", "with the tower")):
        row = found[name]
        say(
            f"  {stage} {label}: {1000 * statistics.median(row['seconds']):9.1f} ms a step, "
            f"{row['tokens_per_second']:8.1f} tokens/s, {row['images_per_second']:7.2f} images/s, "
            f"{row['peak_memory_gb']:.2f} GB"
        )
    say(f"  {stage}: the store makes a step {ratio:.2f} times as fast")
    return {"stage": stage, "batch": shape.batch, "tokens": tokens, "speedup": ratio, **found}


def _image(rng: np.random.Generator, side: int):
    from PIL import Image

    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def qlora(steps: int) -> dict:
    """Steps of QLoRA on a random checkpoint of full size, quantized layer by layer as it is made."""
    shape = SHAPES["8b"]
    model = build(shape)
    model.pop("vision_tower")
    model.pop("projector")
    model.set_dtype(mx.float32)
    start = time.perf_counter()
    for part in (*model.layers, model.language_model):  # one after the other: never all of it in float32
        nn.quantize(part, group_size=64, bits=4)
        mx.eval(part.parameters())
    mx.clear_cache()
    size = sum(t.nbytes for _, t in tree_flatten(model.parameters())) / 1e9
    say(f"QLoRA: a random Llama-3-8B in 4 bits, {size:.2f} GB, made in {time.perf_counter() - start:.0f} s")
    model.freeze()
    linear_to_lora_layers(model, 16, {"rank": 16, "scale": 2.0, "dropout": 0.0})
    times, losses = [], []
    with tempfile.TemporaryDirectory() as folder:
        short = replace(shape, queries=4)
        store, dialogues = make_rows(short, Path(folder), "visual-tokens")
        optimizer = optim.AdamW(1e-4)
        optimizer.init(model.trainable_parameters())
        trainer = Trainer(model.train(), optimizer)
        for i in range(steps):
            start = time.perf_counter()
            # Unpadded: on a CPU the quantized products are nearly all of a step, and padding costs what tokens do.
            batch = collate(dialogues, store, shape.vocabulary - 1, short.queries, length_step=1)
            losses.append(trainer.step([batch], count_answers(dialogues)))
            times.append(time.perf_counter() - start)
            say(f"  step {i + 1}: loss {losses[-1]:.3f}, {times[-1]:.1f} s")
    peak = mx.get_peak_memory() / 1e9
    say(f"  peak memory {peak:.2f} GB")
    return {"weights_gb": size, "seconds": times, "losses": losses, "peak_memory_gb": peak}


# The recipe on paper. Every figure here is an assumption or follows from the config; none was measured by us.
PRETRAIN_IMAGES, FINETUNE_IMAGES = 600_000, 1_000_000  # the original article's
PRETRAIN_TOKENS, FINETUNE_TOKENS = 60, 300  # of text to an image, besides its 96 visual tokens
PARAMETERS = 8.03e9  # Llama-3-8B
TOWER_FLOPS = 670e9  # so400m at 384 px, see the table of `embed.py`
PROJECTOR_FLOPS = 2 * 729 * (1152 * 4096 + 2 * 4096**2) + 2 * 96 * 3 * 4096**2  # of 729 patches, forward
DOLLARS_PER_KWH = 0.30
MACHINES = {  # peak TFLOP/s in half precision, share of it that is reached, watts, dollars an hour to rent
    "M4 Max (40)": (18.4, 0.6, 70, 0.0),
    "M5 Max (40), estimate": (65.0, 0.5, 80, 0.0),
    "8 x H100": (8 * 989.0, 0.4, 8 * 1000, 8 * 2.5),
}


def on_paper() -> list[dict]:
    """Hours, energy and dollars of the whole recipe: a backward pass costs what its forward one does, or twice that
    where the weights are trained too."""
    images = PRETRAIN_IMAGES + FINETUNE_IMAGES
    pretrain = PRETRAIN_IMAGES * (3 * PROJECTOR_FLOPS + 4 * PARAMETERS * (96 + PRETRAIN_TOKENS))
    tokens = FINETUNE_IMAGES * (96 + FINETUNE_TOKENS)
    parts = {
        "embed once": images * TOWER_FLOPS,
        "pretrain": pretrain,
        "finetune, LoRA": 4 * PARAMETERS * tokens,
        "finetune, full": 6 * PARAMETERS * tokens,
    }
    say(f"\nOn paper, {PRETRAIN_IMAGES:,} + {FINETUNE_IMAGES:,} images, one pass each; hours:")
    say(f"{'':22}" + "".join(f"{name:>16}" for name in parts) + f"{'with LoRA: kWh':>16}{'$':>8}")
    rows = []
    for name, (peak, share, watts, rent) in MACHINES.items():
        hours = {part: flops / (peak * 1e12 * share) / 3600 for part, flops in parts.items()}
        whole = sum(hours.values()) - hours["finetune, full"]
        kwh, dollars = whole * watts / 1000, whole * rent
        dollars += 0.0 if rent else kwh * DOLLARS_PER_KWH
        rows.append({"machine": name, "hours": hours, "kwh": kwh, "dollars": dollars})
        say(f"{name:22}" + "".join(f"{h:16.1f}" for h in hours.values()) + f"{kwh:16.1f}{dollars:8.0f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("demo", "so400m"), nargs="*", default=["demo", "so400m"])
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that compiles (default: 3)")
    parser.add_argument("--qlora", type=int, metavar="STEPS", help="run only this many steps of QLoRA at full size")
    args = parser.parse_args()

    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    result = {"benchmark": "train", "machine": machine(), "dtype": str(dtype).removeprefix("mlx.core.")}
    if args.qlora:
        result["qlora"] = qlora(args.qlora)
    else:
        result["shapes"] = {}
        for name in args.shape:
            shape = SHAPES[name]
            text = shape.prompt + shape.answer
            say(f"{name}: rows of {shape.queries} visual and {text} other tokens, {shape.batch} at once")
            result["shapes"][name] = [measure(shape, stage, args.steps, dtype) for stage in ("pretrain", "finetune")]
        result["on_paper"] = on_paper()
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Quantize the demo with and without calibration, and compare: bytes, KL, top-1, right answers, seconds.

    python benchmarks/quantize.py                       # all rows of the table; needs the demo extra
    python benchmarks/quantize.py --only "4 bits" "4 bits calibrated" --questions 0
    python benchmarks/quantize.py --full-size 1024      # one decoder layer of Llama-3-8B's size, and so many tokens
    python benchmarks/quantize.py --tower 27            # so400m's tower in 8 bits: so many layers, random weights

Calibration prompts are the demo's training data from another seed. KL and top-1 are of the answers' tokens of held-out
questions, given the right answers before them; the right answers are counted by `tools.demo.evaluate`.
Bounds: a matrix in b bits and groups of 64 takes b + 0.5 bits per weight, calibrated or not; a layer takes the matrix
products that `layer_flops` counts. The tower is offered in 8 bits only if they move its features by less than three
times what float16 does.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from embed import machine  # first: it loads OpenBLAS before MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path
from mlx_lm.models.llama import ModelArgs, TransformerBlock

from llama3v_mlx import load
from llama3v_mlx.checkpoint import read_config, read_tensors
from llama3v_mlx.conversion.agreement import verify_rows
from llama3v_mlx.conversion.calibrate import MATRICES, MAX_TOKENS, Quantizer, _quantize_layer, working_bytes
from llama3v_mlx.conversion.rows import read_sets
from llama3v_mlx.conversion.shard_writer import Plan
from llama3v_mlx.convert import convert
from llama3v_mlx.demo import CHECKPOINT, IMAGES
from llama3v_mlx.models.siglip import VisionConfig, VisionTower

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tools.demo

PLAIN = {f"{bits} bits": {"q_bits": bits} for bits in (2, 3, 4, 5)}
SENSITIVE = {
    f"sensitive, {bits}": {"quant_predicate": "sensitive", "q_target_bpw": bits, "calibrated": True}
    for bits in (3.5, 4.5)
}
RUNS = {**PLAIN, **{f"{name} calibrated": {**own, "calibrated": True} for name, own in PLAIN.items()}, **SENSITIVE}


def write_rows(folder: Path, count: int, questions: int) -> tuple[Path, Path]:
    """Write calibration rows, and held-out questions with their answers."""
    from tools.demo.evaluate import held_out
    from tools.demo.rows import draw_row

    with (folder / "calibrate.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(draw_row(i, folder, seed=777) for i in range(count))
    with (folder / "held-out.jsonl").open("w", encoding="utf-8") as file:
        for i, (_, image, _, question, answer) in enumerate(held_out(questions)):
            image.save(folder / f"held-out-{i}.png", compress_level=1)
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"image": f"held-out-{i}.png", "conversations": turns}) + "\n")
    return folder / "calibrate.jsonl", folder / "held-out.jsonl"


def measure(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Convert and compare; one dict per row of the table, printed as it comes."""
    from tools.demo.evaluate import evaluate

    calibration, held_out = write_rows(folder, args.rows, args.prompts)
    _, prompts = read_sets(CHECKPOINT, read_config(CHECKPOINT), True, None, None, held_out, args.prompts)
    results = []
    print(f"{'':20}{'Llama, bytes':>14}{'KL, 1e-6 nats':>15}{'top-1':>9}{'right':>12}{'CPU s':>8}")
    for name in args.only or RUNS:
        options = {key: value for key, value in RUNS[name].items() if key != "calibrated"}
        if RUNS[name].get("calibrated"):
            options["calibrate"] = calibration
        tic = time.process_time()
        convert(CHECKPOINT, folder / name, quantize=True, **options)
        seconds = time.process_time() - tic
        tensors = read_tensors(folder / name)
        num_bytes = sum(tensor.nbytes for key, tensor in tensors.items() if key.startswith("language_model."))
        agreement = verify_rows(CHECKPOINT, folder / name, prompts)
        right = evaluate(str(folder / name), args.questions)["all"][0] if args.questions else None
        results.append({"name": name, "bytes": num_bytes, "kl": agreement.kl, "top1": agreement.top1})
        results[-1] |= {"right": right, "questions": args.questions, "cpu_seconds": seconds}
        answers = f"{right} of {args.questions}" if args.questions else ""
        kl, top1 = f"{1e6 * agreement.kl:.1f}", f"{agreement.top1:.2%}"
        print(f"{name:20}{num_bytes:>14,}{kl:>15}{top1:>9}{answers:>12}{seconds:>8.1f}", flush=True)
    return results


def layer_flops(tokens: int) -> float:
    """FLOPs of calibrating a layer of Llama-3-8B's size: passes and Hessians by token; factors, drift and rounding."""
    n, m = 4096, 14336
    attention, mlp = 2 * n * n + 2 * n * n // 4, 3 * n * m
    passes = 2 * ((3 * n * n // 2) + attention + 2 * n * m + mlp)  # to o_proj and down_proj, and of both halves
    hessians = 2 * (3 * n * n + m * m)  # and drifts
    factors = 2 / 3 * (3 * n**3 + m**3)
    # drift·H⁻¹ and its product with the weights; for down_proj first the weights' with the drift
    drifts = 3 * (2 * n**3) + 2 * n * n * (6144 + n + 2 * m) + 2 * n * m * m * 2
    rounding = n * n * (6144 + n + 2 * m) + n * m * m
    return 2 * tokens * (passes + hessians) + factors + drifts + rounding


def measure_layer(tokens: int) -> dict:
    """Quantize one decoder layer of Llama-3-8B's size, of random weights; CPU seconds and peak memory."""

    class Sink:
        """A `ShardWriter` that keeps nothing."""

        def make_room(self, out_bytes: int, working_bytes: int) -> None: ...
        def add(self, tensors: dict[str, mx.array]) -> None: ...

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    args = ModelArgs("llama", num_hidden_layers=1, vocab_size=128256, rms_norm_eps=1e-5, **sizes)
    mx.random.seed(0)
    original, quantized = TransformerBlock(args), TransformerBlock(args)
    quantized.update(original.parameters())
    xs = [mx.random.normal((1, min(1024, tokens), 4096)) for _ in range(max(1, tokens // 1024))]
    ys = [x + 0.05 * mx.random.normal(x.shape) for x in xs]
    mx.eval(original.parameters(), xs, ys)
    how = {"group_size": 64, "bits": 4, "mode": "affine"}
    plan = Plan(mx.float16, {f"layer.{name}": how for name in MATRICES}, {}, 0)
    tic = time.perf_counter(), time.process_time()
    _quantize_layer(quantized, original, "layer", xs, ys, Quantizer(plan, Sink()))
    wall, cpu = time.perf_counter() - tic[0], time.process_time() - tic[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    token_bytes = 2 * mx.float32.size * sizes["hidden_size"]
    planned = [working_bytes(sizes) + count * token_bytes for count in (tokens, MAX_TOKENS)]
    print(f"one layer, {tokens} tokens: {layer_flops(tokens) / 1e12:.1f} TFLOP, {cpu:.0f} s of CPU, {wall:.0f} s")
    most = f"{planned[1] / 1e9:.2f} for {MAX_TOKENS} tokens"
    print(f"peak memory {peak / 1e9:.2f} GB; calibrate() plans with {planned[0] / 1e9:.2f}, and {most}")
    figures = {"tokens": tokens, "flops": layer_flops(tokens), "cpu_seconds": cpu, "seconds": wall}
    return {**figures, "peak_bytes": peak, "planned_bytes": planned}


def measure_tower(layers: int) -> list[dict]:
    """Compare a tower in float16 and in 8 bits: the demo's visual tokens, and patch features of random so400m's."""

    model, processor = load(CHECKPOINT, dtype=mx.float32)
    images = [processor.encode("", [path]).images[0] for path in sorted(IMAGES.iterdir())]
    results = [compare_tower("demo", model.vision_tower, lambda: mx.concatenate(model.encode_image(images)))]
    pixels = mx.array(np.random.default_rng(0).integers(0, 256, (1, 112, 112, 3), dtype=np.uint8))
    channels, factors = mx.arange(0, 1152, 144), mx.array(np.geomspace(20, 100, 8).astype(np.float32))
    for outliers in ("without outliers", "outliers in the residual", "outliers in the weights"):
        mx.random.seed(0)
        tower = VisionTower(VisionConfig(num_hidden_layers=layers))
        for layer in tower.encoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = (attention.v_proj, mlp.fc1)  # not queries and keys: softmax would saturate, float16 be 0.4 off
            for linear in (attention.q_proj, attention.k_proj, *readers, attention.out_proj, mlp.fc2):
                linear.weight = mx.random.normal(linear.weight.shape) / linear.weight.shape[1] ** 0.5
            if outliers == "outliers in the residual":
                for linear in (attention.out_proj, mlp.fc2):  # what is added to it
                    linear.weight[channels] *= factors[:, None]
            elif outliers == "outliers in the weights":
                for linear in readers:  # columns, each in a group of its own
                    linear.weight[:, channels] *= factors
        results.append(compare_tower(f"so400m, {outliers}", tower, lambda tower=tower: tower(pixels)))
    return results


def compare_tower(name: str, tower: nn.Module, run: Callable[[], mx.array]) -> dict:
    """Errors of what `run` computes with a tower of weights in float16, computed in float32 elsewhere."""

    def rounded(path: str, array: mx.array) -> mx.array:
        """Round a matrix to 8 bits in groups of 64; fc2's 4304 columns are padded, as MLX would need it."""
        if array.ndim != 2 or "position" in path:
            return array
        padded = mx.pad(array, [(0, 0), (0, -array.shape[1] % 64)]).astype(mx.float16)
        packed = mx.quantize(padded, group_size=64, bits=8)
        return mx.dequantize(*packed, group_size=64, bits=8)[:, : array.shape[1]].astype(mx.float32)

    half = tree_map_with_path(lambda path, w: w.astype(mx.float16), tower.parameters())
    weights = tree_map_with_path(lambda path, w: w.astype(mx.float32), half)
    outputs = []
    for own in (weights, half, tree_map_with_path(rounded, weights)):
        tower.update(own)
        outputs.append(run().astype(mx.float32))
        mx.eval(outputs[-1])
    norms = [mx.linalg.norm(output - outputs[0]).item() for output in outputs[1:]]
    in_half, in_eight = (norm / mx.linalg.norm(outputs[0]).item() for norm in norms)
    print(f"{name}: float16 {in_half:.1e}, 8 bits {in_eight:.1e}, {in_eight / in_half:.1f} times", flush=True)
    return {"name": name, "layers": len(tower.encoder.layers), "float16": in_half, "8 bits": in_eight}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96, help="rows to calibrate with (default: 96)")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts for KL and top-1 (default: 200)")
    parser.add_argument("--questions", type=int, default=500, help="held-out questions to answer (default: 500)")
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="NAME", help=f"some of: {', '.join(RUNS)}")
    parser.add_argument("--full-size", type=int, metavar="TOKENS", help="measure one layer of an 8B's size instead")
    parser.add_argument("--tower", type=int, metavar="LAYERS", help="measure so400m's tower in 8 bits instead")
    args = parser.parse_args()
    figures = {"machine": machine(), "kernels": os.environ.get("OPENBLAS_CORETYPE")}
    if args.full_size:
        figures["layer"] = measure_layer(args.full_size)
    elif args.tower:
        figures["tower"] = measure_tower(args.tower)
    else:
        with tempfile.TemporaryDirectory(prefix="quantize-") as folder:
            figures["rows"] = measure(Path(folder), args)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

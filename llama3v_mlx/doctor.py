"""Check this machine with `llama3v doctor`: its hardware, the models that fit, correctness and speed.

The exit status is 0 only if the bundled models compute correct results here. Speeds are measured on random layers of
the real model's width, and extrapolated to all of its layers.
"""

import argparse
import json
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .cli import note_slow_cpu, run
from .files import existing

MODEL = "openbmb/MiniCPM-Llama3-V-2_5"
DOWNLOAD_BYTES = 17.1e9
BITS = (16, 8, 6, 5, 4, 3)  # bits per weight of Llama
ANSWER = {"images": 1, "text_tokens": 1024 + 64}  # memory is estimated for a large image, a question, an answer
SECONDS = 1.5  # duration of a measurement, after a warm-up


def released_config() -> dict:
    """Config of the released weights in our layout; token ids do not matter here."""
    text = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    text |= {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
    return {
        "model_type": "llama3v",
        "text_config": {**text, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False},
        "vision_config": {"model_type": "idefics2"},
        "projector_config": {"num_queries": 96},
        "image_config": {},
        "prompt_tokens": dict.fromkeys(("image", "image_start", "image_end", "slice_start", "slice_end", "newline"), 0),
    }


def machine() -> dict:
    """Hardware, system and library versions."""
    from importlib.metadata import version

    import mlx.core as mx
    from huggingface_hub import constants

    from . import HAS_OPENBLAS, __version__, device

    system = f"{platform.system()} {platform.release()}"
    if sys.platform == "darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    return {
        "chip": device.chip(),
        "cores": device.cores(),
        "device": device.name(),
        "openblas": HAS_OPENBLAS,
        "memory_bytes": device.memory(),
        "usable_bytes": device.memory_limit(),
        "disk_free_bytes": shutil.disk_usage(existing(Path(constants.HF_HUB_CACHE))).free,
        "system": f"{system} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": mx.__version__,
        "mlx_lm": version("mlx-lm"),
        "llama3v_mlx": __version__,
    }


def fits() -> list[dict]:
    """Memory of the released model for each number of bits, without and with --low-memory."""
    from dataclasses import replace

    import mlx.core as mx
    from mlx.utils import tree_flatten

    from .device import memory_limit
    from .loading import build_model
    from .memory import footprint_of

    config, limit = released_config(), memory_limit()
    model = build_model(config)  # lazy arrays, never evaluated
    model.set_dtype(mx.float16)
    whole = footprint_of(config, tree_flatten(model.parameters()), **ANSWER)
    rows = []
    for bits in BITS:
        need = whole if bits == 16 else whole.quantized(bits)
        frugal = replace(need, low_memory=True)
        how = "yes" if need.total <= limit else "with --low-memory" if frugal.total <= limit else "no"
        rows.append({"bits": bits, "bytes": need.total, "low_memory_bytes": frugal.total, "fits": how})
    return rows


def selftest() -> list[dict]:
    """Compare every stage of the bundled models with the stored results, in this device's default dtype."""
    from .selftest import compare, observe

    found, dtype = observe()
    name = str(dtype).removeprefix("mlx.core.")
    return [{**vars(check), "dtype": name, "passed": check.passed} for check in compare(found, dtype)]


def speed() -> dict:
    """Measure random layers of the real width, and extrapolate to the whole model."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import llama

    from .device import matmul_peak, on_gpu
    from .models import linux_cpu
    from .models.siglip import VisionConfig, VisionTower

    dtype = mx.float16 if on_gpu() else mx.float32
    with linux_cpu.all_threads():
        peak = matmul_peak(dtype)
    # Enough layers and rows to keep a GPU busy; few on a CPU, to finish in seconds.
    layers, batch, prompt = (4, 8, 512) if peak > 1e12 else (1, 1, 8)

    tower = VisionTower(VisionConfig(num_hidden_layers=layers))
    tower.set_dtype(dtype)
    side = 448  # pixels per side of a tile of the released model
    pixels = mx.random.randint(0, 256, (batch, side, side, 3)).astype(mx.uint8)
    tile_seconds = measure(lambda: tower(pixels)) / batch / layers * VisionConfig().num_hidden_layers

    text = released_config()["text_config"]
    decoder = llama.Model(llama.ModelArgs.from_dict({**text, "num_hidden_layers": layers, "vocab_size": 32064}))
    decoder.set_dtype(dtype)
    nn.quantize(decoder, 64, 4, class_predicate=lambda path, module: hasattr(module, "to_quantized"))
    randomize(decoder)

    def layer_seconds(tokens: int) -> float:
        x = mx.random.normal((1, tokens, text["hidden_size"])).astype(dtype)

        def through() -> mx.array:
            y = x
            for layer in decoder.layers:
                y = layer(y, "causal" if tokens > 1 else None)
            return y

        return measure(through) / layers

    row = mx.random.normal((1, 1, text["hidden_size"])).astype(dtype)
    head_seconds = measure(lambda: decoder.lm_head(row)) * text["vocab_size"] / 32064
    token_seconds = text["num_hidden_layers"] * layer_seconds(1) + head_seconds
    prompt_seconds = text["num_hidden_layers"] * layer_seconds(prompt) / prompt
    return {
        "dtype": str(dtype).removeprefix("mlx.core."),
        "matmul_tflops": peak / 1e12,
        "extrapolated_from_layers": layers,
        "tiles_per_second": 1 / tile_seconds,
        "prompt_tokens_per_second": 1 / prompt_seconds,
        "tokens_per_second": 1 / token_seconds,
        "first_token_seconds": 10 * tile_seconds + 1040 * prompt_seconds,  # for an image of ten tiles and a question
    }


def randomize(module) -> None:
    """Fill a quantized module with random codes of small values, without creating the weights first."""
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    def fill(path: str, tensor: mx.array) -> mx.array:
        if tensor.dtype == mx.uint32:
            return mx.random.randint(0, 2**31 - 1, tensor.shape).astype(mx.uint32)
        kind = path.rpartition(".")[2]
        return mx.full(tensor.shape, {"scales": 0.003, "biases": -0.0225}.get(kind, 1.0), tensor.dtype)

    module.update(tree_map_with_path(fill, module.parameters()))
    mx.eval(module.parameters())


def measure(compute: Callable) -> float:
    """Median time of a computation in seconds, over `SECONDS` and at least three runs, after a warm-up."""
    import mlx.core as mx

    mx.eval(compute())
    times = []
    while len(times) < 3 or sum(times) < SECONDS:
        start = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(figures: dict) -> str:
    """Format the figures as text."""
    m = figures["machine"]
    gb = 1e9
    lines = [
        "This machine",
        f"  {'chip':14}{m['chip']}, {m['cores']} CPU cores",
        f"  {'memory':14}{m['memory_bytes'] / gb:.1f} GB, {m['usable_bytes'] / gb:.1f} GB usable",
        f"  {'disk':14}{m['disk_free_bytes'] / gb:.0f} GB free",
        f"  {'system':14}{m['system']}, Python {m['python']}",
        f"  {'MLX':14}{m['mlx']} on the {m['device'].upper()}, mlx-lm {m['mlx_lm']}, llama3v_mlx {m['llama3v_mlx']}",
        "",
        "Does Llama3-V fit? With one large image and an answer of 1,024 tokens",
        f"  {'bits':6}{'memory':>9}{'--low-memory':>15}   fits",
    ]
    for row in figures["fits"]:
        lines.append(
            f"  {row['bits']:<6}{row['bytes'] / gb:6.1f} GB{row['low_memory_bytes'] / gb:12.1f} GB   {row['fits']}"
        )
    lines += [f"  {figures['advice']}", "", f"Is it correct? The bundled models in {figures['checks'][0]['dtype']}"]
    for check in figures["checks"]:
        measured = f"error {check['error']:.1e}, at most {check['tolerance']:.0e}"
        if not check["tolerance"]:
            measured = f"{check['error']:.1%} differ" if check["error"] else "identical"
        lines.append(f"  {check['stage']:14}{'ok   ' if check['passed'] else 'WRONG'}  {measured}")
    if s := figures.get("speed"):
        many = "a layer" if s["extrapolated_from_layers"] == 1 else f"{s['extrapolated_from_layers']} layers"
        lines += [
            "",
            "How fast is it?",
            f"  {'matrix product':26}{s['matmul_tflops']:9.3g} TFLOP/s in {s['dtype']}, measured",
            f"  Extrapolated from {many} of the real width with random 4-bit weights:",
            f"  {'images of 448 px, tower':26}{s['tiles_per_second']:9.3g} per second",
            f"  {'prompt':26}{s['prompt_tokens_per_second']:9.3g} tokens per second",
            f"  {'answer':26}{s['tokens_per_second']:9.3g} tokens per second",
            f"  {'first token, 10 tiles':26}{s['first_token_seconds']:9.3g} s",
        ]
    return "\n".join(lines)


def advice(rows: list[dict], disk_free: int) -> str:
    """Command that creates the best fitting model: prefer at least 4 bits, then no --low-memory, then more bits."""
    fitting = [row for row in rows if row["fits"] != "no" and row["bits"] < 16]
    if not fitting:
        return "no size fits; SigLIP alone (embed, search) takes 1 GB"
    best = max(fitting, key=lambda row: (row["bits"] >= 4, row["fits"] == "yes", row["bits"]))
    bits = best["bits"]
    text = f"llama3v convert --hf-path {MODEL} --mlx-path llama3v-{bits}bit -q --q-bits {bits}"
    if best["fits"] != "yes":
        text += ", then use --low-memory"
    disk = DOWNLOAD_BYTES + (bits + 0.5) / 8 * 8.03e9 + 1.01e9
    return text if disk < disk_free else f"{text} (needs {disk / 1e9:.0f} GB of disk)"


def doctor(args: argparse.Namespace) -> None:
    """Check, measure, report; exit with 1 if a check fails."""
    note_slow_cpu()
    figures = {"machine": machine(), "fits": fits()}
    figures["advice"] = advice(figures["fits"], figures["machine"]["disk_free_bytes"])
    figures["checks"] = selftest()
    if not args.no_speed:
        figures["speed"] = speed()
    right = all(check["passed"] for check in figures["checks"])
    print(json.dumps({"right": right, **figures}) if args.json else report(figures))
    if not right:
        wrong = ", ".join(check["stage"] for check in figures["checks"] if not check["passed"])
        print(f"error: wrong results on this machine: {wrong}; please report the output of --json", file=sys.stderr)
        sys.exit(1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="llama3v doctor", description="Check this machine: which models fit, correctness, speed."
    )
    parser.add_argument("--no-speed", action="store_true", help="skip the speed measurements")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all figures, for bug reports")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    args = parser.parse_args(argv)
    run(lambda: doctor(args), args.debug)


if __name__ == "__main__":
    main()

"""Time the tower of another package as `embed.py` times ours; `embed.py --peers` runs this, one process for each.

    python benchmarks/peers.py torch float32 '{"hidden_size": 1152, …}' 4 3

prints one JSON object, or `{"missing": reason}` if the package, the device or the dtype is not there. Nothing of this
project is imported, so that every peer runs as its own users get it.
"""

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import fields

import numpy as np

BUDGET = 240.0  # seconds, after which a peer is measured no more


def pixels(side: int, batch: int) -> np.ndarray:
    """Preprocessed pixels: float32 (batch, side, side, 3) from -1 to 1."""
    return np.random.default_rng(0).uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)


def torch_tower(config: dict, dtype: str, batch: int, compiled: bool) -> tuple[Callable[[], None], str]:
    """transformers' SiglipVisionModel with torch's fused attention; pixels are on the device already."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if compiled and device != "cuda":
        raise RuntimeError("torch.compile is compared on CUDA alone")
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = dtype != "float32"
    model = SiglipVisionModel(SiglipVisionConfig(**config, attn_implementation="sdpa")).eval()
    model = model.to(device=device, dtype=getattr(torch, dtype))
    x = torch.from_numpy(pixels(config["image_size"], batch)).permute(0, 3, 1, 2).contiguous().to(device, model.dtype)
    forward = torch.compile(model, mode="max-autotune") if compiled else model

    def run() -> None:
        with torch.inference_mode():
            # Back on the host, as ours is: the clock must see the whole computation.
            forward(pixel_values=x).pooler_output.float().cpu()

    return run, f"torch {torch.__version__}, {device}"


def mlx_tower(package: str, config: dict, dtype: str, batch: int) -> tuple[Callable[[], None], str]:
    """The SigLIP tower of mlx-vlm (PaliGemma's) or mlx-embeddings."""
    import mlx.core as mx

    if package == "mlx-vlm":
        tower = importlib.import_module("mlx_vlm.models.paligemma.vision").VisionModel
        settings = importlib.import_module("mlx_vlm.models.paligemma.config").VisionConfig
    else:
        module = importlib.import_module("mlx_embeddings.models.siglip")
        tower, settings = module.SiglipVisionModel, module.VisionConfig
    wanted = {**config, "model_type": "siglip_vision_model", "vision_use_head": True}
    config = settings(**{field.name: wanted[field.name] for field in fields(settings) if field.name in wanted})
    if not hasattr(config, "model_type"):
        config.model_type = "siglip_vision_model"
    model = tower(config)
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    x = mx.array(pixels(config.image_size, batch)).astype(getattr(mx, dtype))

    def run() -> None:
        mx.eval([y for y in model(x) if y is not None])

    return run, f"{package} on mlx {mx.__version__}, {mx.default_device().type.name}"


def measure(run: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each run after a first one for warming up; of the first alone where it takes the whole budget."""
    times = []
    start = time.perf_counter()
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
        if time.perf_counter() - start + times[-1] > BUDGET:
            break
    return times[1:] or times


def main() -> None:
    name, dtype, config, batch, repeats = sys.argv[1:]
    config, batch = json.loads(config), int(batch)
    try:
        if name.startswith("torch"):
            run, what = torch_tower(config, dtype, batch, name == "torch-compile")
        else:
            run, what = mlx_tower(name, config, dtype, batch)
    except (ImportError, RuntimeError, AttributeError) as e:
        print(json.dumps({"missing": " ".join(str(e).split())}))
        return
    times = measure(run, int(repeats))
    print(
        json.dumps({"peer": what, "dtype": dtype, "batch": batch, "seconds": times, "median": statistics.median(times)})
    )


if __name__ == "__main__":
    main()

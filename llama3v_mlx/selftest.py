"""Compare the bundled models' results on bundled images, stage by stage, with stored float32 results."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from .demo import CHECKPOINT, IMAGES, SIGLIP
from .features.encoder import TextEncoder, load_encoder
from .generation import load, stream_generate

GOLDEN = Path(__file__).parent / "demo" / "golden.safetensors"
# Lossless files only: JPEG decoders differ between machines.
ASKED = (("three-blue-circles.png", "What is this image?"), ("42.png", "What number is written?"))
TEXTS = ("three blue circles on a white background", "the number 42")
# Largest relative L2 error against float32: at least five times that of a correct computation on a CPU.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 1e-2, mx.bfloat16: 8e-2}
EXACT = ("tiles", "tokens")


@dataclass(frozen=True)
class Check:
    """Deviation of one stage from the stored results."""

    stage: str
    error: float  # relative L2, or the fraction of differing values for stages that must be equal
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


def observe(dtype: mx.Dtype | None = None) -> tuple[dict[str, np.ndarray], mx.Dtype]:
    """Run every stage on the default device.

    Args:
        dtype: see `load`.

    Returns:
        Arrays by stage, float32 or integer, and the compute dtype.
    """
    model, processor = load(CHECKPOINT, dtype=dtype)
    dtype = model.vision_tower.post_layernorm.weight.dtype
    digests, features, rows, tokens = [], [], [], []
    for name, question in ASKED:
        image = processor.tile(IMAGES / name)
        digests += hashlib.sha256(b"".join(tile.tobytes() for tile in image.tiles)).digest()
        features.append(model.vision_tower(mx.array(image.tiles[0][None]))[0, ::8].reshape(-1))
        rows.append(model.encode_image([image])[0][::8].reshape(-1))
        responses = stream_generate(model, processor, question, IMAGES / name, temperature=0, max_tokens=32)
        tokens += [response.token for response in responses]
    encoder = load_encoder(SIGLIP, dtype=dtype)
    embeddings = [encoder.encode([encoder.prepare(IMAGES / name)])[0].rows[0] for name, _ in ASKED]
    embeddings += list(TextEncoder(SIGLIP, encoder.model).encode(TEXTS))
    found = {"tiles": mx.array(digests), "tower": mx.concatenate(features), "projector": mx.concatenate(rows)}
    found |= {"tokens": mx.array(tokens), "embeddings": mx.concatenate(embeddings)}
    floating = {name: array.astype(mx.float32) for name, array in found.items() if name not in EXACT}
    return {name: np.array(array) for name, array in (found | floating).items()}, dtype


def compare(found: dict[str, np.ndarray], dtype: mx.Dtype) -> list[Check]:
    """Compare the results of `observe` with the stored ones, stage by stage."""
    checks = []
    for name, array in found.items():
        expected = np.array(mx.load(str(GOLDEN))[name])
        if array.shape != expected.shape:
            error = 1.0
        elif name in EXACT:
            error = float((array != expected).mean())
        else:
            error = float(np.linalg.norm(array - expected) / np.linalg.norm(expected))
        checks.append(Check(name, error, 0.0 if name in EXACT else TOLERANCE[dtype]))
    return checks

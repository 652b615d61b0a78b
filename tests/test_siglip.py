"""Vision tower without a reference implementation: position ids, dtypes, shape of pooling."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from llama3v_mlx.features.encoder import load_encoder
from llama3v_mlx.models import linux_cpu as cpu
from llama3v_mlx.models import siglip
from llama3v_mlx.models.siglip import Embeddings, SigLIP, TextConfig, VisionConfig, VisionTower, siglip_loss

TINY = VisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
)
linux_cpu = pytest.mark.skipif(not cpu.applies(mx.zeros(1)), reason="for float32 on a Linux CPU")


def test_position_ids_are_torchs_at_every_length() -> None:
    """The 12 million ids of torch 2.13 are stored as a digest and by their differences from 70·i // N."""
    stored = json.loads((Path(__file__).parent / "position_ids.json").read_text())
    embeddings, digest = Embeddings(VisionConfig(hidden_size=1)), hashlib.sha256()  # with the released side of 70
    for n in range(1, 4901):
        expected = 70 * np.arange(n) // n
        expected[stored["lower"].get(str(n), [])] -= 1
        ids = np.array(embeddings.position_ids(n))
        assert np.array_equal(ids, expected), f"{n} patches"
        digest.update(ids.astype(np.uint8).tobytes())
    assert digest.hexdigest() == stored["sha256"]
    assert len(stored["lower"]) == 978


def test_position_ids_are_computed_once_for_a_length() -> None:
    embeddings = Embeddings(VisionConfig(hidden_size=1))
    ids = embeddings.position_ids(1036)
    assert ids.tolist()[221:224] == [14, 14, 15]  # 70·222 / 1036 is 15
    assert embeddings.position_ids(1036) is ids


def test_google_tower_numbers_its_patches() -> None:
    config = VisionConfig(model_type="siglip_vision_model", hidden_size=1, image_size=384)
    assert Embeddings(config).position_ids(729).tolist() == list(range(729))


def record_dtypes(monkeypatch: pytest.MonkeyPatch, *classes: type[nn.Module]) -> dict[str, set[mx.Dtype]]:
    """Record the floating-point dtypes of inputs and outputs in all calls of these modules, by class."""
    seen: dict[str, set[mx.Dtype]] = {cls.__name__: set() for cls in classes}

    def recording(cls: type[nn.Module]) -> Callable[..., mx.array]:
        call = cls.__call__

        def wrapper(self: nn.Module, *args: mx.array) -> mx.array:
            y = call(self, *args)
            seen[cls.__name__] |= {x.dtype for x in (*args, y) if mx.issubdtype(x.dtype, mx.floating)}
            return y

        return wrapper

    for cls in classes:
        monkeypatch.setattr(cls, "__call__", recording(cls))
    return seen


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("model_type", ["idefics2", "siglip_vision_model"])
def test_nothing_leaves_the_dtype_of_the_weights(
    monkeypatch: pytest.MonkeyPatch, model_type: str, dtype: mx.Dtype
) -> None:
    tower = VisionTower(VisionConfig(**{**vars(TINY), "model_type": model_type}))
    tower.set_dtype(dtype)
    ours = [cls for cls in vars(siglip).values() if isinstance(cls, type) and issubclass(cls, nn.Module)]
    ours = [cls for cls in ours if not cls.__name__.startswith(("Text", "SigLIP"))]
    if model_type == "idefics2":
        ours = [cls for cls in ours if not cls.__name__.startswith("Pooling")]
    seen = record_dtypes(monkeypatch, *ours, nn.Linear, nn.LayerNorm, nn.Embedding)
    features = tower(mx.zeros((2, 70, 70, 3), dtype=mx.uint8))
    if model_type == "siglip_vision_model":
        assert tower.pool(features).shape == (2, TINY.hidden_size)
    assert seen == {name: {dtype} for name in seen}
    assert len(seen) == len(ours) + 3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_logits_are_float32_of_embeddings_in_any_dtype(dtype: mx.Dtype) -> None:
    """With Google's scale and bias, against float64 on the same embeddings."""
    text = {"vocab_size": 50, "hidden_size": TINY.hidden_size, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SigLIP(VisionConfig(**{**vars(TINY), "model_type": "siglip_vision_model"}), TextConfig(**text))
    scale, bias = 4.7135, -16.5472
    model.logit_scale, model.logit_bias = mx.array([scale]), mx.array([bias])
    model.set_dtype(dtype)
    texts = model.text_tower(mx.arange(3 * 64).reshape(3, 64) % 50)
    images = model.vision_tower.pool(model.vision_tower(mx.arange(2 * 70 * 70 * 3).reshape(2, 70, 70, 3) % 256))
    assert (texts.shape, texts.dtype, images.dtype) == ((3, TINY.hidden_size), dtype, dtype)
    logits = model.logits(images, texts)
    assert (logits.shape, logits.dtype) == ((2, 3), mx.float32)
    unit = [np.array(x.astype(mx.float32), np.float64) for x in (images, texts)]
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in unit]
    np.testing.assert_allclose(logits, unit[0] @ unit[1].T * np.exp(scale) + bias, atol=1e-3)


@pytest.mark.parametrize("stored", [mx.float32, mx.float16])
def test_a_checkpoints_scale_and_bias_are_loaded_in_float32(siglip: Path, tmp_path: Path, stored: mx.Dtype) -> None:
    folder = Path(shutil.copytree(siglip, tmp_path / "siglip"))
    tensors = mx.load(str(folder / "model.safetensors"))
    tensors |= {"logit_scale": mx.array([4.7135], stored), "logit_bias": mx.array([-16.5472], stored)}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    model = load_encoder(folder, dtype=mx.float16).model
    assert model.text_tower.head.weight.dtype == mx.float16
    for name in ("logit_scale", "logit_bias"):
        assert model[name].dtype == mx.float32
        assert mx.array_equal(model[name], tensors[name].astype(mx.float32))


def test_siglip_loss_is_the_papers() -> None:
    """A matching pair contributes log(1 + exp(-logit)), any other log(1 + exp(logit)); the sum is divided by n."""
    logits = np.random.default_rng(0).normal(size=(4, 4))
    signs = 2 * np.eye(4) - 1
    assert abs(siglip_loss(mx.array(logits, mx.float32)).item() - np.log1p(np.exp(-signs * logits)).sum() / 4) < 1e-6


@linux_cpu
def test_the_cpu_has_the_same_functions() -> None:
    """Compare with float64: in float32, a polynomial and four squarings have an error of about 1e-6."""
    x = np.concatenate([np.linspace(-40, 40, 4001), [-1e4, 1e4, 0]])
    exact = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(np.array(cpu.gelu(mx.array(x.astype(np.float32)))), exact, rtol=3e-6, atol=3e-6)

    rng = np.random.default_rng(0)
    for spread in (0.1, 1, 10):
        q, k, v = (spread * rng.normal(size=(2, 6, 37, 24)) for _ in range(3))
        weights = np.exp((scores := q @ k.swapaxes(2, 3) * 0.2) - scores.max(axis=-1, keepdims=True))
        exact = weights @ v / weights.sum(axis=-1, keepdims=True)
        ours = cpu.attention(*(mx.array(a.astype(np.float32)) for a in (q, k, v)), scale=0.2)
        assert np.linalg.norm(np.array(ours) - exact) / np.linalg.norm(exact) < 1e-5


@linux_cpu
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_streams_share_a_batch(size: int) -> None:
    tower = VisionTower(TINY)
    pixels = np.random.default_rng(0).integers(0, 256, (size, 42, 42, 3), dtype=np.uint8)
    together = cpu.in_streams(mx.compile(lambda x: tower(x)), pixels, most=2)
    # Products of other sizes are rounded differently: a few units in the last place of features around 2.
    np.testing.assert_allclose(np.array(together), np.array(tower(mx.array(pixels))), rtol=1e-5, atol=5e-6)

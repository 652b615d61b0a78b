"""Vision tower at full width against transformers: Idefics2 with the released model's inputs, and SigLIP."""

import hashlib
import json
import platform

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from llama3v_mlx.image import tile_image
from llama3v_mlx.models.llama3v import Model
from llama3v_mlx.models.siglip import VisionConfig, VisionTower, strip_ids
from llama3v_mlx.tiling import ImageConfig

from .parity import below, randomize, relative_error, released

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
idefics2 = pytest.importorskip("transformers.models.idefics2.modeling_idefics2")

from .make_position_ids import SIDE, STORED, torch_ids  # noqa: E402  (needs torch)

pytestmark = pytest.mark.reference

# Measured 7e-7 to 9e-7: a different order of float32 sums.
TOLERANCE = 1e-5
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "patch_size": 14,
}


def random_tiles(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def normalized(tiles: np.ndarray) -> torch.Tensor:
    """Convert uint8 (B, H, W, 3) to float32 (B, 3, H, W) in -1…1."""
    return ((torch.from_numpy(tiles).float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)


def strips(tiles: np.ndarray) -> torch.Tensor:
    """Convert tiles to the released model's input (B, 3, 14, 14·L): one row of patches, in row-major order."""
    B, H, W, _ = tiles.shape
    x = normalized(tiles).reshape(B, 3, H // 14, 14, W // 14, 14)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(B, 3, 14, -1)


def load_tower(config: VisionConfig, weights: dict[str, mx.array]) -> VisionTower:
    tower = VisionTower(config)
    tower.load_weights(below(Model.sanitize(weights), "vision_tower"), strict=True)
    return tower


@pytest.fixture(scope="module")
def idefics2_tower() -> torch.nn.Module:
    config = transformers.Idefics2VisionConfig(**SO400M, image_size=980)
    return randomize(idefics2.Idefics2VisionTransformer(config), seed=0)


@pytest.fixture(scope="module")
def tower(idefics2_tower: torch.nn.Module) -> VisionTower:
    return load_tower(VisionConfig(**SO400M, image_size=980), released(idefics2_tower, "vison"))


def stored_ids(num_patches: int) -> np.ndarray:
    """Return torch's position ids as computed on an x86 CPU, on any machine."""
    ids = SIDE * np.arange(num_patches) // num_patches
    ids[json.loads(STORED.read_text())["lower"].get(str(num_patches), [])] -= 1
    return ids


def idefics2_features(reference: torch.nn.Module, tiles: np.ndarray) -> torch.Tensor:
    """Run the reference on tiles of one size with the released model's inputs.

    The ids are those of transformers 4.40; version 5 uses products instead of arange, and differs at ties.
    """
    with torch.no_grad():
        x = reference.embeddings.patch_embedding(strips(tiles)).flatten(2).transpose(1, 2)
        x = x + reference.embeddings.position_embedding(torch.from_numpy(stored_ids(x.shape[1])))
        x = reference.encoder(inputs_embeds=x, attention_mask=None).last_hidden_state
        return reference.post_layernorm(x)


# 1032, 999 and 117 patches: no tie is affected by float32 rounding, and all versions of transformers agree.
@pytest.mark.parametrize("batch, h, w", [(1, 24, 43), (1, 37, 27), (3, 9, 13)])
def test_idefics2(tower: VisionTower, idefics2_tower: torch.nn.Module, batch: int, h: int, w: int) -> None:
    tiles = random_tiles(batch, h * 14, w * 14)
    with torch.no_grad():
        expected = idefics2_tower(strips(tiles)).last_hidden_state
    assert relative_error(tower(mx.array(tiles)), expected) <= TOLERANCE
    torch.testing.assert_close(idefics2_features(idefics2_tower, tiles), expected)


# 50, 980, 1001 and 1035 patches, of which rounding lowers the ids of 2, 16, 2 and 4.
@pytest.mark.parametrize("h, w", [(5, 10), (28, 35), (13, 77), (23, 45)])
def test_idefics2_where_float32_ties(tower: VisionTower, idefics2_tower: torch.nn.Module, h: int, w: int) -> None:
    tiles = random_tiles(1, h * 14, w * 14)
    assert relative_error(tower(mx.array(tiles)), idefics2_features(idefics2_tower, tiles)) <= TOLERANCE


def test_idefics2_on_a_photograph(tower: VisionTower, idefics2_tower: torch.nn.Module) -> None:
    """640x427: an overview of 1014 patches and two slices of 1036."""
    photograph = Image.fromarray(random_tiles(427, 640))
    overview, *slices = tile_image(photograph, ImageConfig()).tiles
    assert [tile.shape[:2] for tile in (overview, *slices)] == [(364, 546), (518, 392), (518, 392)]
    for tiles in (overview[None].copy(), np.stack(slices)):
        assert relative_error(tower(mx.array(tiles)), idefics2_features(idefics2_tower, tiles)) <= TOLERANCE


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="torch rounds differently on other CPUs")
@pytest.mark.parametrize("side", [SIDE, 5, 27, 32])
def test_position_ids_of_every_length(side: int) -> None:
    """Compare with the installed torch and, for the released side, with the stored ids."""
    digest = hashlib.sha256()
    for n in range(1, side**2 + 1):
        expected = torch_ids(n, side)
        assert np.array_equal(strip_ids.__wrapped__(n, side), expected), f"{n} patches"
        digest.update(expected.astype(np.uint8).tobytes())
    if side == SIDE:
        assert digest.hexdigest() == json.loads(STORED.read_text())["sha256"]


def test_google_siglip() -> None:
    reference = randomize(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SO400M, image_size=384)), 1)
    config = VisionConfig(model_type="siglip_vision_model", **SO400M, image_size=384)
    tower = load_tower(config, released(reference, "vision_model"))
    tiles = random_tiles(2, 384, 384)
    with torch.no_grad():
        expected = reference(normalized(tiles))
    features = tower(mx.array(tiles))
    assert features.shape == (2, 729, 1152)
    assert relative_error(features, expected.last_hidden_state) <= TOLERANCE
    assert relative_error(tower.pool(features), expected.pooler_output) <= TOLERANCE


# Twice the measured 1.0e-3 and 8.2e-3 after two layers, which include the rounding of weights.
@pytest.mark.parametrize("dtype, bound", [(mx.float16, 2.5e-3), (mx.bfloat16, 2e-2)])
def test_half_precision(idefics2_tower: torch.nn.Module, tower: VisionTower, dtype: mx.Dtype, bound: float) -> None:
    tiles = mx.array(random_tiles(1, 5 * 14, 9 * 14))
    half = load_tower(tower.config, released(idefics2_tower, "vpm"))
    half.set_dtype(dtype)
    features = half(tiles)
    assert features.dtype == dtype
    assert relative_error(features, tower(tiles)) <= bound

"""The vision tower at full width against transformers: Idefics2's fed as the released model feeds it, and SigLIP's."""

import mlx.core as mx
import numpy as np
import pytest

from llama3v_mlx.model import Model
from llama3v_mlx.siglip import VisionConfig, VisionTower

from .parity import below, randomize, relative_error, released

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
idefics2 = pytest.importorskip("transformers.models.idefics2.modeling_idefics2")

pytestmark = pytest.mark.reference

# Measured 7e-7 to 9e-7: float32 sums in another order.
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
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in -1…1."""
    return ((torch.from_numpy(tiles).float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)


def strips(tiles: np.ndarray) -> torch.Tensor:
    """Tiles as the released model gets them, (B, 3, 14, 14·L): one patch high, patches side by side row by row."""
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


# Patch counts of 1032, 999 and 117: float32 rounds none of their ties away.
@pytest.mark.parametrize("batch, h, w", [(1, 24, 43), (1, 37, 27), (3, 9, 13)])
def test_idefics2(tower: VisionTower, idefics2_tower: torch.nn.Module, batch: int, h: int, w: int) -> None:
    tiles = random_tiles(batch, h * 14, w * 14)
    with torch.no_grad():
        expected = idefics2_tower(strips(tiles)).last_hidden_state
    assert relative_error(tower(mx.array(tiles)), expected) <= TOLERANCE


# 23·45 patches have four ties; at 7·20 every other patch is one.
@pytest.mark.parametrize("h, w", [(23, 45), (7, 20)])
def test_idefics2_with_exact_ids_where_float32_ties(
    tower: VisionTower, idefics2_tower: torch.nn.Module, h: int, w: int
) -> None:
    tiles = random_tiles(1, h * 14, w * 14)
    ids = torch.tensor([70 * i // (h * w) for i in range(h * w)])
    with torch.no_grad():
        x = idefics2_tower.embeddings.patch_embedding(strips(tiles)).flatten(2).transpose(1, 2)
        x = x + idefics2_tower.embeddings.position_embedding(ids)
        x = idefics2_tower.encoder(inputs_embeds=x, attention_mask=None).last_hidden_state
        expected = idefics2_tower.post_layernorm(x)
    assert relative_error(tower(mx.array(tiles)), expected) <= TOLERANCE


def test_position_ids_of_every_practical_tile() -> None:
    config = transformers.Idefics2VisionConfig(hidden_size=8, num_attention_heads=1, image_size=980, patch_size=14)
    reference = idefics2.Idefics2VisionEmbeddings(config)
    seen = []
    reference.position_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].numpy()))
    ours = VisionTower(VisionConfig(**SO400M | {"num_hidden_layers": 0})).embeddings
    for n in range(960, 1081):
        with torch.no_grad():
            reference(torch.zeros(1, 3, 14, 14 * n), torch.ones(1, 1, n, dtype=torch.bool))
        expected, ids = seen.pop(), np.array(ours.position_ids(n))
        tie = 70 * np.arange(n) % n == 0
        assert (ids[~tie] == expected[~tie]).all()
        # On a tie float32 rounds to either side of a bucket's edge.
        assert np.isin(ids[tie] - expected[tie], (0, 1)).all()


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


# Twice the 1.0e-3 and 8.2e-3 measured after two layers, of which the rounding of weights is a part.
@pytest.mark.parametrize("dtype, bound", [(mx.float16, 2.5e-3), (mx.bfloat16, 2e-2)])
def test_half_precision(idefics2_tower: torch.nn.Module, tower: VisionTower, dtype: mx.Dtype, bound: float) -> None:
    tiles = mx.array(random_tiles(1, 5 * 14, 9 * 14))
    half = load_tower(tower.config, released(idefics2_tower, "vpm"))
    half.set_dtype(dtype)
    features = half(tiles)
    assert features.dtype == dtype
    assert relative_error(features, tower(tiles)) <= bound

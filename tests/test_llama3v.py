"""Splicing of images into prompts, and renaming of released tensors."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from llama3v_mlx.models import llama3v as model_module
from llama3v_mlx.models.llama3v import Model, ModelArgs
from llama3v_mlx.models.released import rename
from llama3v_mlx.tiling import TiledImage

UNK, IMAGE_START, IMAGE_END, SLICE_START, SLICE_END, NEWLINE = 90, 91, 92, 93, 94, 10
QUERIES = 4
Grid = tuple[int, int] | None

# Blocks as in training: T is a tile, < and > enclose the slices, / is a newline between their rows.
BLOCKS = {None: "T", (2, 2): "T<TT/TT>", (1, 3): "T<T/T/T>", (3, 1): "T<TTT>", (3, 3): "T<TTT/TTT/TTT>"}
TRAINED = {
    "T": [IMAGE_START, *[UNK] * QUERIES, IMAGE_END],
    "<": [SLICE_START],
    "/": [NEWLINE],
    ">": [SLICE_END],
}


@pytest.fixture(scope="module")
def model() -> Model:
    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama3v",
            text_config={
                "model_type": "llama",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "intermediate_size": 32,
                "num_attention_heads": 2,
                "rms_norm_eps": 1e-5,
                "vocab_size": 100,
                "tie_word_embeddings": False,
            },
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 98,
            },
            projector_config={
                "hidden_size": 32,
                "vision_hidden_size": 16,
                "num_queries": QUERIES,
                "num_attention_heads": 2,
            },
            prompt_tokens={
                "image": UNK,
                "image_start": IMAGE_START,
                "image_end": IMAGE_END,
                "slice_start": SLICE_START,
                "slice_end": SLICE_END,
                "newline": NEWLINE,
            },
        )
    )
    model.projector.query = mx.random.normal(model.projector.query.shape)
    return model


def make_image(grid: Grid, seed: int = 0) -> TiledImage:
    """Draw random tiles: an overview of one size, slices of another."""
    rng = np.random.default_rng(seed)
    slices = grid[0] * grid[1] if grid else 0
    sizes = [(28, 42, 3), *[(42, 14, 3)] * slices]
    return TiledImage(tuple(rng.integers(0, 256, size, dtype=np.uint8) for size in sizes), grid)


def trained_block(grid: Grid) -> list[int]:
    return [id for part in BLOCKS[grid] for id in TRAINED[part]]


def spliced_prompt(grids: list[Grid]) -> list[int]:
    """Return ids with one run of placeholders per image, each followed by a newline as in a message."""
    runs = [[UNK] * len(trained_block(grid)) + [NEWLINE] for grid in grids]
    return [1, 2, 3, *sum(runs, []), 4, 5]


def trained_prompt(grids: list[Grid]) -> list[int]:
    blocks = [[*trained_block(grid), NEWLINE] for grid in grids]
    return [1, 2, 3, *sum(blocks, []), 4, 5]


@pytest.mark.parametrize(
    "grids", [[None], [(2, 2)], [(1, 3)], [(3, 1)], [None, (2, 2)], [(1, 3), (3, 3)], []], ids=repr
)
def test_one_run_per_image_becomes_the_trained_sequence(model: Model, grids: list[Grid]) -> None:
    images = [make_image(grid, seed) for seed, grid in enumerate(grids)]
    ids = np.array(trained_prompt(grids))
    expected = np.array(model.language_model.model.embed_tokens(mx.array(ids)))
    if images:
        expected[ids == UNK] = np.array(mx.concatenate(model.encode_image(images)))
    embeddings = model.embed_inputs(mx.array(spliced_prompt(grids)), pixel_values=images)
    np.testing.assert_array_equal(np.array(embeddings), expected)


def test_encode_image_keeps_the_order_of_tiles(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "TILE_BATCH_SIZE", 3)  # so that batches mix images and split them
    images = [make_image(grid, seed) for seed, grid in enumerate([(2, 2), None, (3, 1)])]
    encoded = model.encode_image(images)
    assert [len(y) for y in encoded] == [QUERIES * len(image.tiles) for image in images]
    for y, image in zip(encoded, images, strict=True):
        alone = mx.concatenate([model.encode_tiles(tile[None])[0] for tile in image.tiles])
        # The batch size only changes the order of float32 sums.
        np.testing.assert_allclose(np.array(y), np.array(alone), atol=1e-5)
        assert np.unique(np.array(alone), axis=0).shape == alone.shape


def test_logits_follow_the_embeddings(model: Model) -> None:
    ids = mx.array(spliced_prompt([]))
    embeddings = model.embed_inputs(ids)
    np.testing.assert_array_equal(
        np.array(model(ids[None], input_embeddings=embeddings[None])), np.array(model(ids[None]))
    )


@pytest.mark.parametrize("places, given", [(1, 0), (0, 1), (2, 1), (1, 2)])
def test_places_and_images_must_agree_in_number(model: Model, places: int, given: int) -> None:
    ids = mx.array(spliced_prompt([None] * places))
    with pytest.raises(ValueError, match=f"placeholders for {places} images, but {given} were given"):
        model.embed_inputs(ids, pixel_values=[make_image(None)] * given)


@pytest.mark.parametrize("place, grid", [((2, 2), (1, 3)), (None, (2, 2)), ((2, 2), None)])
def test_places_and_images_must_agree_in_length(model: Model, place: Grid, grid: Grid) -> None:
    room, need = len(trained_block(place)), len(trained_block(grid))
    with pytest.raises(ValueError, match=f"image of {need} tokens does not fit its run of {room} placeholders"):
        model.embed_inputs(mx.array(spliced_prompt([place])), pixel_values=[make_image(grid)])


@pytest.mark.parametrize(
    "released, ours",
    [
        ("vison.embeddings.patch_embedding.weight", "vision_tower.embeddings.patch_embedding.weight"),
        ("vision.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("vpm.encoder.layers.26.self_attn.out_proj.bias", "vision_tower.encoder.layers.26.self_attn.out_proj.bias"),
        ("vision_model.head.attention.in_proj_weight", "vision_tower.head.attention.in_proj.weight"),
        ("vision_model.head.attention.out_proj.bias", "vision_tower.head.attention.out_proj.bias"),
        ("projection.query", "projector.query"),
        ("resampler.kv_proj.weight", "projector.kv_proj.weight"),
        ("projection.attn.out_proj.weight", "projector.out_proj.weight"),
        ("resampler.attn.in_proj_bias", "projector.in_proj_bias"),
        ("llm.model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("llm.lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_rename(released: str, ours: str) -> None:
    assert rename(released) == ours
    assert rename(ours) == ours


def released_weights(vision: str, projector: str) -> dict[str, mx.array]:
    """Draw random tensors of each kind whose layout changes, and some whose layout does not."""
    shapes = {
        "llm.model.embed_tokens.weight": (100, 32),
        "llm.model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
        f"{vision}.embeddings.patch_embedding.weight": (16, 3, 14, 14),
        f"{vision}.post_layernorm.weight": (16,),
        f"{projector}.proj": (32, 32),
        f"{projector}.attn.in_proj_weight": (96, 32),
        f"{projector}.attn.in_proj_bias": (96,),
        f"{projector}.attn.out_proj.weight": (32, 32),
        f"{projector}.ln_q.weight": (32,),
    }
    return {name: mx.random.normal(shape, key=mx.random.key(i)) for i, (name, shape) in enumerate(shapes.items())}


def test_sanitize_lays_out_what_mlx_wants() -> None:
    weights = released_weights("vpm", "resampler")
    ours = Model.sanitize(weights)
    assert not any("inv_freq" in name for name in ours)
    patches = weights["vpm.embeddings.patch_embedding.weight"]
    assert mx.array_equal(ours["vision_tower.embeddings.patch_embedding.weight"][5, 2, 7], patches[5, :, 2, 7])
    assert mx.array_equal(ours["projector.proj.weight"], weights["resampler.proj"].T)
    for i, part in enumerate("qkv"):
        for kind in ("weight", "bias"):
            packed = weights[f"resampler.attn.in_proj_{kind}"]
            assert mx.array_equal(ours[f"projector.{part}_proj.{kind}"], packed[32 * i : 32 * (i + 1)])


@pytest.mark.parametrize("vision", ["vison", "vision", "vpm"])
@pytest.mark.parametrize("projector", ["projection", "resampler"])
def test_sanitize_takes_every_release_and_its_own_result(vision: str, projector: str, model: Model) -> None:
    once = Model.sanitize(released_weights(vision, projector))
    twice = Model.sanitize(once)
    expected = Model.sanitize(released_weights("vpm", "resampler"))
    for weights in (once, twice):
        assert weights.keys() == expected.keys()
        assert all(mx.array_equal(weights[name], expected[name]) for name in expected)
    parameters = dict(tree_flatten(model.parameters()))
    assert all(parameters[name].shape == tensor.shape for name, tensor in once.items())

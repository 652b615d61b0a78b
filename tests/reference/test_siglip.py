"""Both towers of Google's SigLIP at so400m's width against transformers' SiglipModel, loaded from its folder."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from llama3v_mlx.demo import IMAGES, SIGLIP
from llama3v_mlx.features.encoder import TextEncoder, load_encoder

from .parity import randomize, relative_error

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference

WIDTH = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 2, "num_attention_heads": 16}


def test_both_towers_and_logits(tmp_path: Path) -> None:
    """A different order of float32 sums of thousands of terms costs about 1e-6 per layer: 1e-5 in total."""
    config = transformers.SiglipConfig(
        text_config={**WIDTH, "vocab_size": 1000}, vision_config={**WIDTH, "image_size": 224, "patch_size": 14}
    )
    reference = randomize(transformers.SiglipModel(config), 0)
    with torch.no_grad():
        reference.logit_scale.fill_(4.7)
        reference.logit_bias.fill_(-16.0)
    reference.save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": 224, "width": 224}).save_pretrained(tmp_path)

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in ((640, 480), (100, 300))]
    pixels = transformers.SiglipImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt")["pixel_values"]
    ids = rng.integers(0, 1000, (3, 64))
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), pixel_values=pixels)

    encoder = load_encoder(tmp_path, dtype=mx.float32)
    assert encoder.kind == "pooled"
    tiles = [encoder.prepare(image) for image in images]
    for tile, theirs in zip(tiles, pixels, strict=True):
        np.testing.assert_allclose((tile.tiles[0] / 255 - 0.5) / 0.5, theirs.permute(1, 2, 0), atol=1e-6)
    image_embeddings = mx.concatenate([features.rows for features in encoder.encode(tiles)])
    text_embeddings = encoder.model.text_tower(mx.array(ids))
    logits = encoder.model.logits(image_embeddings, text_embeddings)

    unit = image_embeddings / mx.linalg.norm(image_embeddings, axis=-1, keepdims=True)
    assert relative_error(unit, expected.image_embeds) < 1e-5
    unit = text_embeddings / mx.linalg.norm(text_embeddings, axis=-1, keepdims=True)
    assert relative_error(unit, expected.text_embeds) < 1e-5
    assert relative_error(logits, expected.logits_per_image) < 1e-5


def test_tokens_are_those_of_transformers() -> None:
    """With the bundled sentencepiece model; Google's only has other pieces."""
    theirs = transformers.SiglipTokenizer(str(SIGLIP / "spiece.model"), model_max_length=16)
    ours = TextEncoder(SIGLIP, load_encoder(SIGLIP).model)
    texts = [
        "Three blue circles on a white background.",
        "the number is 427",
        "It's  42!",
        "Zebra – übermäßig",
        "",
        "a " * 40,
    ]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=16)["input_ids"]
    np.testing.assert_array_equal(ours.tokenize(texts), expected)


def test_the_bundled_siglip_is_a_siglip() -> None:
    """transformers loads its folder and computes the same scores, in float32 from the same float16 weights."""
    reference = transformers.SiglipModel.from_pretrained(SIGLIP, dtype=torch.float32).eval()
    encoder = load_encoder(SIGLIP, dtype=mx.float32)
    texts = ["three blue circles on a white background", "the number is 42"]
    ids = TextEncoder(SIGLIP, encoder.model).tokenize(texts)
    images = [Image.open(path) for path in sorted(IMAGES.glob("[!.]*"))]
    pixels = transformers.SiglipImageProcessor.from_pretrained(SIGLIP)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids), pixel_values=pixels).logits_per_image
    features = encoder.encode([encoder.prepare(image) for image in images])
    logits = encoder.model.logits(mx.concatenate([f.rows for f in features]), encoder.model.text_tower(mx.array(ids)))
    assert relative_error(logits, expected) < 1e-5

"""Images found in a feature store give the same tokens without running the tower or decoding."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llama3v_mlx import stream_generate
from llama3v_mlx.checkpoint import name_of
from llama3v_mlx.demo import CHECKPOINT
from llama3v_mlx.embed import main as embed
from llama3v_mlx.features.lookup import FeatureCache
from llama3v_mlx.features.store import FeatureError, FeatureStore

NAME = name_of(CHECKPOINT)


def last(model, processor, image, features: FeatureCache | None):
    text = ""
    for response in stream_generate(model, processor, "What is this image?", image, temperature=0, features=features):
        text += response.text
    return text, response


@pytest.mark.parametrize("kind", ["visual-tokens", "patch"])
def test_second_time_no_tower(demo, picture: Path, tmp_path: Path, monkeypatch, capsys, kind: str) -> None:
    model, processor = demo
    plain, _ = last(model, processor, picture, None)
    if kind == "patch":
        embed([str(picture), "--out", str(tmp_path / "store"), "--model", str(CHECKPOINT), "--kind", "patch"])
        capsys.readouterr()
    else:
        first, response = last(*demo, picture, FeatureCache(tmp_path / "store", model, processor.image_config, NAME))
        assert (first, response.stored_images, response.num_tiles) == (plain, 0, 5)
    assert len(FeatureStore(tmp_path / "store")) == 1

    features = FeatureCache(tmp_path / "store", model, processor.image_config, NAME)
    monkeypatch.setattr(type(model.vision_tower), "__call__", lambda *_: pytest.fail("the tower was run"))
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("the image was decoded"))
    again, response = last(model, processor, picture, features)
    assert (again, response.stored_images, response.num_tiles) == (plain, 1, 5)
    as_bytes, response = last(model, processor, picture.read_bytes(), features)  # no name, the same content
    assert (as_bytes, response.stored_images) == (plain, 1)


def test_visual_tokens_of_new_and_stored_images(demo, tmp_path: Path, rng: np.random.Generator) -> None:
    """New and stored images in one prompt, with one not from a file; float16 rows are within half an ulp."""
    model, processor = demo
    files = []
    for i, size in enumerate(((90, 70), (300, 100), (64, 256))):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(files[-1])
    features = FeatureCache(tmp_path / "store", model, processor.image_config, NAME)
    features.encode([features.tile(files[1])])
    images = [*files, Image.open(files[2])]
    tiled = [features.tile(image) for image in images]
    assert [bool(image.tiles) for image in tiled] == [True, False, True, True]
    expected = model.encode_image([processor.tile(image) for image in images])
    for found, exact in zip(features.encode(tiled), expected, strict=True):
        np.testing.assert_allclose(np.array(found), np.array(exact), rtol=2e-3, atol=2e-3)
    assert len(FeatureStore(tmp_path / "store")) == 3


def test_one_shard_for_all_questions(demo, tmp_path: Path, rng: np.random.Generator) -> None:
    model, processor = demo
    for i in range(6):
        image = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(image)
        features = FeatureCache(tmp_path / "store", model, processor.image_config, NAME)
        features.encode([features.tile(image)])
        assert [path.suffix for path in (tmp_path / "store").glob("shard-*")] == [".safetensors"]
    assert len(FeatureStore(tmp_path / "store")) == 6


def test_stores_that_do_not_fit(demo, picture: Path, tmp_path: Path, siglip: Path, capsys) -> None:
    model, processor = demo
    embed([str(picture), "--out", str(tmp_path / "pooled"), "--model", str(siglip)])
    with pytest.raises(FeatureError, match="holds pooled embeddings; Llama3-V needs"):
        FeatureCache(tmp_path / "pooled", model, processor.image_config, NAME)
    FeatureCache(tmp_path / "store", model, processor.image_config, NAME)
    with pytest.raises(FeatureError, match="made with other weights, compute dtype or preprocessing"):
        FeatureCache(tmp_path / "store", model, processor.image_config.with_max_tiles(2), NAME)


def test_the_command(picture: Path, tmp_path: Path, run_main) -> None:
    command = ["llama3v_mlx.generate", "--image", picture, "--temp", "0", "--features", tmp_path / "store"]
    first, second = run_main(*command), run_main(*command)
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout.split("=" * 10)[1] == second.stdout.split("=" * 10)[1]
    assert "from the feature store" not in first.stdout
    assert "1 from the feature store" in second.stdout
    failed = run_main(*command[:-1], picture)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: ")

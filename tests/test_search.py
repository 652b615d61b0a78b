"""Search of a store by text and by image, with the bundled SigLIP."""

import contextlib
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from llama3v_mlx import search as search_module
from llama3v_mlx.demo import CHECKPOINT, IMAGES, SIGLIP
from llama3v_mlx.embed import main as embed
from llama3v_mlx.features import ranking
from llama3v_mlx.features.encoder import TextEncoder, load_encoder
from llama3v_mlx.features.ranking import nearest
from llama3v_mlx.features.store import StoreInfo
from llama3v_mlx.models.siglip import SigLIP
from llama3v_mlx.search import main


@pytest.fixture(scope="module")
def texts() -> TextEncoder:
    return TextEncoder(SIGLIP, load_encoder(SIGLIP).model)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """Store of the bundled images and of a red square in a tar archive."""
    folder = tmp_path_factory.mktemp("search")
    image = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(image).rectangle((100, 50, 180, 130), fill=(225, 20, 20))
    image.save(folder / "red.png")
    with tarfile.open(folder / "more.tar", "w") as archive:
        archive.add(folder / "red.png", "red.png")
    embed([str(IMAGES), str(folder / "more.tar"), "--out", str(folder / "store"), "--batch-size", "4"])
    return folder / "store"


def found(capsys, *args: str | Path) -> list[dict]:
    main([*map(str, args), "--json"])
    return json.loads(capsys.readouterr().out)["hits"]


def test_tokens(texts: TextEncoder) -> None:
    ids = texts.tokenize(["Three blue circles, on a WHITE  background!", "", "a " * 40])
    assert ids.shape == (3, 16)
    np.testing.assert_array_equal(ids[0], texts.tokenize(["three blue circles on a white background"])[0])
    assert (ids[1] == TextEncoder.EOS).all()
    assert ids[2, -1] == TextEncoder.EOS and (ids[2, :-1] != TextEncoder.EOS).all()
    assert texts.canonicalize(" It's  a\tTest. ") == "its a test"


@pytest.mark.parametrize("name", sorted(path.stem for path in IMAGES.glob("[!.]*") if "-" in path.stem))
def test_words_find_their_image(store: Path, capsys, name: str) -> None:
    hits = found(capsys, store, name.replace("-", " ") + " background" * ("background" not in name), "--top", "2")
    assert Path(hits[0]["path"]).stem == name
    assert hits[0]["cosine"] > hits[1]["cosine"] and 0 <= hits[1]["probability"] < hits[0]["probability"] <= 1


def test_an_image_finds_itself(store: Path, capsys) -> None:
    path = IMAGES / "two-red-stars.jpg"
    hits = found(capsys, store, "--image", path)
    assert Path(hits[0]["path"]) == path and len(hits) == len(list(IMAGES.glob("[!.]*"))) + 1
    assert hits[0]["cosine"] == pytest.approx(1, abs=1e-3)  # the store's rows are float16
    assert [hit["probability"] for hit in hits] == [None] * len(hits)


def test_nearest_is_the_order_of_all_cosines(store: Path, rng: np.random.Generator) -> None:
    from llama3v_mlx.features.store import Features, FeatureStore, StoreInfo
    from llama3v_mlx.features.writer import FeatureWriter

    matrix = rng.normal(size=(500, 8)).astype(np.float32)
    made = FeatureStore.create(store.parent / "random", StoreInfo("m", "pooled", "0", 8, "float32"))
    with FeatureWriter(made, shard_bytes=4000) as writer:
        for start in range(0, 500, 10):
            block = enumerate(matrix[start : start + 10], start)
            writer.add([(i.to_bytes(32, "big"), Features(mx.array(row[None]), (1, 1))) for i, row in block])
    query = rng.normal(size=8)
    cosines = matrix @ query / np.linalg.norm(matrix, axis=1) / np.linalg.norm(query)
    hits = nearest(made, query, 20)
    assert [int.from_bytes(key, "big") for key, _ in hits] == np.argsort(-cosines)[:20].tolist()
    np.testing.assert_allclose([score for _, score in hits], np.sort(cosines)[::-1][:20], rtol=1e-5)
    assert len(nearest(made, query, 1000)) == 500


class Rows:
    """What near-duplicates need of a store, in blocks of `size` rows."""

    def __init__(self, rows: np.ndarray, size: int):
        self.rows, self.size = rows.astype(np.float32), size
        self.info = StoreInfo("m", "pooled", "f0", rows.shape[1], "float32")

    def matrix(self) -> Iterator[np.ndarray]:
        return iter(np.split(self.rows, range(self.size, len(self.rows), self.size)))

    def keys(self) -> np.ndarray:
        return np.array([b"%032d" % i for i in range(len(self.rows))], "V32")


def groups_of(rows: np.ndarray, least: float, size: int) -> list[list[int]]:
    return [[int(key) for key in group] for group in ranking.near_duplicates(Rows(rows, size), least)]


@pytest.mark.parametrize("least", [0.5, 0.9, 0.99])
def test_near_duplicates_are_connected_by_any_chain(rng: np.random.Generator, least: float, monkeypatch) -> None:
    """As a search of the graph finds them, over blocks of other sizes than the store's."""
    monkeypatch.setattr(ranking, "_BLOCK", 3)
    walk = np.cumsum(0.3 * rng.normal(size=(40, 6)), axis=0)
    rows = np.concatenate([walk, rng.normal(size=(40, 6)), walk[::4] * 2])[rng.permutation(90)]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    near = unit @ unit.T >= least
    reached = np.eye(len(rows), dtype=bool)
    for _ in rows:
        reached = reached @ near
    expected = {tuple(np.flatnonzero(row).tolist()) for row in reached if row.sum() > 1}
    assert expected and {tuple(group) for group in groups_of(rows, least, 5)} == expected


def test_near_duplicates_of_many_equal_pictures_are_quick() -> None:
    """By the lines that Python executes: a time-lapse has millions of pairs."""
    lines = 0

    def count(*_):
        nonlocal lines
        lines += 1
        return count

    sys.settrace(count)
    try:
        (group,) = groups_of(np.ones((400, 4)), 0.97, 200)
    finally:
        sys.settrace(None)
    assert len(group) == 400 and lines < 10_000


def test_sheet(store: Path, tmp_path: Path, capsys) -> None:
    """The best hit is read from its archive."""
    main([str(store), "a red square", "--top", "4", "--sheet", str(tmp_path / "sheet.png")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "red" in lines[0]
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    assert sheet.shape[:2] == (2 * (240 + 34 + 12) + 12, 2 * 252 + 12)
    first = sheet[12:252, 12:252]
    assert ((first[..., 0] > 180) & (first[..., 1] < 90)).mean() > 0.02
    assert not list(tmp_path.glob("*.partial"))


def test_images_that_are_gone(tmp_path: Path, capsys) -> None:
    shutil.copy(IMAGES / "two-red-stars.jpg", tmp_path / "gone.jpg")
    embed([str(tmp_path / "gone.jpg"), "--out", str(tmp_path / "store")])
    (tmp_path / "gone.jpg").unlink()
    main([str(tmp_path / "store"), "stars", "--sheet", str(tmp_path / "sheet.png")])
    assert "gone.jpg" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").exists()


def test_errors(store: Path, tmp_path: Path, siglip: Path, picture: Path, capsys) -> None:
    def error(*args: str | Path) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, args)])
        assert stop.value.code == 1
        return capsys.readouterr().err

    for args in ((store,), (store, "words", "--image", picture), (store, " "), (store, "words", "--top", "0")):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, args)])
        assert stop.value.code == 2
    capsys.readouterr()
    assert "no such folder" in error(tmp_path / "nowhere", "words")
    assert "no such file" in error(store, "--image", tmp_path / "no.jpg")
    embed([str(picture), "--out", str(tmp_path / "patch"), "--model", str(CHECKPOINT)])
    assert "embed with --kind pooled" in error(tmp_path / "patch", "words")
    embed([str(picture), "--out", str(tmp_path / "other"), "--model", str(siglip)])
    assert "has no spiece.model" in error(tmp_path / "other", "words")
    copy = shutil.copytree(siglip, tmp_path / "copy")
    embed([str(picture), "--out", str(tmp_path / "third"), "--model", str(copy)])
    (copy / "preprocessor_config.json").write_text('{"resample": 2}')
    assert "has changed since the store was made" in error(tmp_path / "third", "--image", picture)
    shutil.rmtree(copy)
    assert "no such folder" in error(tmp_path / "third", "--image", picture)


def test_a_vision_tower_alone_has_no_words(siglip: Path, tmp_path: Path) -> None:
    model = load_encoder(siglip).model
    with pytest.raises(ValueError, match="has no text tower"):
        TextEncoder(tmp_path, SigLIP(model.vision_tower.config, None))


def test_names_are_printed_harmlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "store.json").touch()
    hits = [search_module.Hit("a\x1b]0;title\x07\n\u202eb.png", "00", 0.5, None)]
    monkeypatch.setattr(search_module, "search", lambda *_: hits)
    with contextlib.suppress(SystemExit):
        main([str(tmp_path), "words"])
    assert capsys.readouterr().out == " 0.500  a\\x1b]0;title\\x07\\n\\u202eb.png\n"

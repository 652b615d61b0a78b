"""Judging images with Llama3-V by their stored visual tokens."""

import dataclasses
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from llama3v_mlx.demo import IMAGES
from llama3v_mlx.features.encoder import ImageEncoder
from llama3v_mlx.features.lookup import FeatureCache
from llama3v_mlx.generation import generate
from llama3v_mlx.models.siglip import VisionTower
from llama3v_mlx.rerank import CAPTION, NO, YES, YES_NO, Judge, judge_all
from llama3v_mlx.search import main as search

STARS = "two red stars on a yellow background"
COLOR = "What color is the background?"


@pytest.fixture(scope="module")
def judge(demo, tmp_path_factory) -> Judge:
    model, processor = demo
    features = FeatureCache(tmp_path_factory.mktemp("rerank") / "tokens", model, processor.image_config, "demo")
    return Judge(model, processor, features, CAPTION)


def test_the_image_that_shows_the_text_comes_first(judge: Judge) -> None:
    names = [str(path) for path in sorted(IMAGES.glob("[!.]*"))]
    (best, match), (_, second), *others = judge_all(judge, names, STARS).items()
    assert Path(best).stem == "two-red-stars" and match > 0.5 > 2 * second and len(others) == len(names) - 2
    assert judge.answer(best, COLOR) == "The background is yellow."


def test_an_image_is_encoded_once(judge: Judge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = shutil.copy(IMAGES / "one-purple-cross.jpg", tmp_path)
    first = judge.match(path, STARS)
    monkeypatch.setattr(ImageEncoder, "encode", lambda self, images: pytest.fail("the tower ran") if images else [])
    assert judge.match(path, STARS) == pytest.approx(first, rel=0.05)  # the store's rows are float16
    assert judge.answer(path, COLOR) == generate(judge.model, judge.processor, COLOR, path, temperature=0)


def test_the_match_of_a_description_is_its_tokens_mean_probability(judge: Judge) -> None:
    path, text = str(IMAGES / "two-red-stars.jpg"), "Two red stars"
    prompt = judge._prompt(path, "What is this image?")
    ids = judge.processor.tokenizer.encode(text, add_special_tokens=False)
    embeddings = judge.model.splice(
        mx.array([*prompt.ids, *ids]), [prompt.images[0].grid], judge.features.encode(prompt.images)
    )
    logits = judge.model(mx.zeros((1, len(embeddings)), mx.int32), None, embeddings[None])[0]
    probabilities = mx.softmax(logits, axis=-1)[len(prompt.ids) - 1 : -1]
    expected = 1.0
    for row, token in zip(probabilities, ids, strict=True):
        expected *= row[token].item()
    assert judge.match(path, "two red stars") == pytest.approx(expected ** (1 / len(ids)), rel=1e-3)


def test_yes_against_no(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever a model says, only its first token counts, in any of the ways it may write yes and no."""
    both = dataclasses.replace(judge, by=YES_NO)
    assert 0 <= both.match(str(IMAGES / "42.png"), STARS) <= 1
    logprobs = mx.full((1, judge.model.language_model.args.vocab_size), -50.0)
    yes, no = judge._first_tokens(YES), judge._first_tokens(NO)
    logprobs[0, mx.array(sorted(yes))] = -1.0
    monkeypatch.setattr(Judge, "_logprobs", lambda *_: logprobs)
    assert both.match(str(IMAGES / "42.png"), STARS) > 0.9
    logprobs[0, mx.array(sorted(no))] = 4.0
    assert both.match(str(IMAGES / "42.png"), STARS) < 0.1


def test_deleted_and_damaged_images_are_skipped(judge: Judge, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    names = [str(tmp_path / "gone.png"), str(IMAGES / "42.png"), str(tmp_path / "bad.png"), str(tmp_path / "a.tar/b")]
    assert [*judge_all(judge, names, STARS)] == names[1:2]


def test_too_long_a_text(judge: Judge) -> None:
    with pytest.raises(ValueError, match="the context has 2048"):
        judge.match(str(IMAGES / "42.png"), "red " * 3000)


def test_a_summary_is_asked_without_an_image(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("llama3v_mlx.rerank.generate", lambda *args, **_: asked.append(args[2]) or "It is 4 [1].")
    assert judge.summarize(["4", "5"], "How much?") == "It is 4 [1]."
    assert "[1] 4\n[2] 5\n\nHow much?" in asked[0]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> list[str]:
    """Arguments to search the bundled images, with an index and visual tokens of this module's own."""
    index = tmp_path_factory.mktemp("library")
    return [str(IMAGES), "--index", str(index / "index")]


def asked(capsys, *args: str) -> dict:
    search([*args, "--json"])
    return json.loads(capsys.readouterr().out)


def test_rerank(library: list[str], capsys) -> None:
    hits = asked(capsys, *library, "two red stars on a yellow background", "--rerank", "--top", "2")["hits"]
    assert len(hits) == 2 and Path(hits[0]["path"]).stem == "two-red-stars"
    assert hits[0]["match"] > 0.5 > hits[1]["match"] and hits[0]["answer"] is None


def test_ask(library: list[str], capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    said = asked(capsys, *library, STARS, "--ask", COLOR)
    assert said["answer"] == said["hits"][0]["answer"] == "The background is yellow."
    assert [hit["answer"] for hit in said["hits"][1:]] == [None] * (len(said["hits"]) - 1)
    monkeypatch.setattr(VisionTower, "__call__", lambda *_: pytest.fail("the tower ran"))
    search([*library, STARS, "--ask", "How many stars are there?", "--no-update"])
    out = capsys.readouterr().out
    assert out.startswith("There are two red stars. [1]\n\n[1]  ") and "two-red-stars.jpg" in out.splitlines()[2]


def test_what_is_not_found_is_said(library: list[str], capsys) -> None:
    search([*library, "four orange diamonds on a blue background", "--ask", COLOR])
    assert capsys.readouterr().out.startswith("Not found: none of the 6 images looked at shows it.")


def test_an_image_is_no_text_to_judge_by(library: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        search([*library, "--image", str(IMAGES / "42.png"), "--ask", COLOR])
    assert stopped.value.code == 2 and "need a text" in capsys.readouterr().err

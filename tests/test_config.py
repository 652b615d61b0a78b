"""Configs written by transformers 4 and 5, and generation configs: read as equal, or rejected in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from llama3v_mlx import load, stream_generate
from llama3v_mlx.checkpoint import CheckpointError, read_config, read_tensors
from llama3v_mlx.config import older_rope, sampling_config
from llama3v_mlx.convert import convert
from llama3v_mlx.demo import SIGLIP
from llama3v_mlx.features.encoder import load_encoder
from llama3v_mlx.sampling import Sampling
from llama3v_mlx.synthesize import LocalTeacher

THETA = 500000.0
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
# Rope types and their parameters in a config.
KINDS = {"default": {}, "linear": {"factor": 2.0}, "llama3": LLAMA3, "yarn": YARN}


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of a small checkpoint, to be changed."""
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


@pytest.fixture
def llama(llama: Path, tmp_path: Path) -> Path:
    """Modifiable copy of the published Llama."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def older(kind: str) -> dict:
    return {"rope_theta": THETA, "rope_scaling": {"type": kind, **KINDS[kind]} if kind != "default" else None}


def newer(kind: str) -> dict:
    return {"rope_parameters": {"rope_theta": THETA, "rope_type": kind, **KINDS[kind]}}


def write(path: Path, *drop: str, **changes) -> None:
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}), encoding="utf-8")


def logits(folder: Path) -> np.ndarray:
    model, _ = load(folder, dtype=mx.float32)
    return np.array(model(mx.arange(300)[None] % 97))


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_are_the_same_model(folder: Path, kind: str) -> None:
    """For an unconverted checkpoint; the demo's own rope_theta of 10000 yields other logits than 500000."""
    config = folder / "config.json"
    before = logits(folder)
    write(config, **older(kind))
    expected, args = logits(folder), load(folder)[0].language_model.args
    assert (args.rope_theta, (args.rope_scaling or {}).get("rope_type", "default")) == (THETA, kind)
    assert np.abs(expected - before).max() > 0.01
    write(config, **newer(kind))  # both in one file
    np.testing.assert_allclose(logits(folder), expected, atol=1e-4)
    write(config, "rope_theta", "rope_scaling")
    assert load(folder)[0].language_model.args == args
    np.testing.assert_allclose(logits(folder), expected, atol=1e-4)


def test_conversions_of_both_forms_are_the_same(folder: Path, tmp_path: Path) -> None:
    """They have mlx-lm's form, and the dtype of the config, in either form."""
    config = folder / "config.json"
    write(config, **older("llama3"), torch_dtype="bfloat16")
    convert(folder, tmp_path / "older")
    write(config, "rope_theta", "rope_scaling", "torch_dtype", **newer("llama3"), dtype="bfloat16")
    convert(folder, tmp_path / "newer")
    made = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("older", "newer")]
    assert made[0] == made[1]
    assert made[1]["dtype"] == "bfloat16"
    assert made[1]["text_config"]["rope_theta"] == THETA
    assert made[1]["text_config"]["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "newer").values()} == {mx.bfloat16}


def test_a_conversion_in_the_newer_form(folder: Path, tmp_path: Path) -> None:
    """Nested configs of a converted folder, rewritten by a tool that only knows transformers 5."""
    write(folder / "config.json", **older("yarn"))
    convert(folder, tmp_path / "older")
    shutil.copytree(tmp_path / "older", tmp_path / "newer")
    config = json.loads((tmp_path / "newer" / "config.json").read_text())
    text = config["text_config"] | newer("yarn") | {"dtype": config.pop("dtype")}
    for key in ("rope_theta", "rope_scaling", "tie_word_embeddings"):  # mlx-lm defaults the last to true
        del text[key]
    (tmp_path / "newer" / "config.json").write_text(json.dumps({**config, "text_config": text}))
    assert read_config(tmp_path / "newer") == read_config(tmp_path / "older")
    np.testing.assert_allclose(logits(tmp_path / "newer"), logits(tmp_path / "older"), atol=1e-4)
    convert(tmp_path / "newer", tmp_path / "again")
    assert read_config(tmp_path / "again") == read_config(tmp_path / "older")


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_a_new_model_of_a_llama_in_either_form(llama: Path, tmp_path: Path, kind: str) -> None:
    made = {}
    for form in (older, newer):
        write(llama / "config.json", "rope_theta", "rope_scaling", "rope_parameters", "torch_dtype", "dtype")
        write(llama / "config.json", **form(kind), **{"torch_dtype" if form is older else "dtype": "bfloat16"})
        convert(mlx_path=tmp_path / form.__name__, vision=SIGLIP, llm=llama)
        made[form] = read_config(tmp_path / form.__name__)
    assert made[older] == made[newer]
    assert (made[newer]["text_config"]["rope_theta"], made[newer]["dtype"]) == (THETA, "bfloat16")
    assert made[newer]["text_config"]["rope_scaling"] == ({"rope_type": kind, **LLAMA3} if KINDS[kind] else None)


def test_a_teacher_in_the_newer_form(llama: Path) -> None:
    """mlx-lm's own `load` would assume a rope_theta of 10000."""
    write(llama / "config.json", "rope_theta", "rope_scaling", **newer("llama3"))
    (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    args = LocalTeacher(str(llama), 1, 0.0).model.args
    assert args.rope_theta == THETA
    assert args.rope_scaling == {"rope_type": "llama3", **LLAMA3}


def test_what_is_given_to_mlx_lms_load() -> None:
    assert older_rope({"rope_theta": 1e6}) == {}
    assert older_rope({"rope_parameters": None}) == {}
    assert older_rope({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}) == {}
    assert older_rope({"rope_theta": 1e6} | newer("default")) == {"rope_scaling": None}
    partial = {"rope_theta": THETA, "rope_type": "default", "partial_rotary_factor": 0.5}
    expected = {"rope_theta": THETA, "partial_rotary_factor": 0.5, "rope_scaling": None}
    assert older_rope({"rope_parameters": partial}) == expected


def test_an_absent_flag_is_false(folder: Path) -> None:
    """mlx-lm's Llama would tie the embeddings; flags may be missing or null."""
    write(folder / "config.json", "tie_word_embeddings", attention_bias=None, mlp_bias=None)
    assert read_config(folder)["text_config"]["tie_word_embeddings"] is False
    load(folder)


def test_ids_may_be_lists_or_null(folder: Path) -> None:
    write(folder / "config.json", bos_token_id=None, eos_token_id=[491, 492])
    config = read_config(folder)
    assert (config["bos_token_id"], config["eos_token_id"][:2]) == (128000, [491, 492])


def rope(**changes) -> dict:
    return {"rope_parameters": {**newer("llama3")["rope_parameters"], **changes}, "rope_theta": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'; it must be a number over 1"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        (
            {"rope_parameters": {"rope_theta": THETA}},
            "rope_theta is 10000.0, but rope_parameters.rope_theta is 500000.0",
        ),
        ({"rope_parameters": "default"}, "rope_parameters is 'default'; it must be an object"),
        ({"rope_scaling": ["linear", 2]}, r"rope_scaling is \['linear', 2\]; it must be an object"),
        (
            rope(rope_type="longrope"),
            "rope_parameters.rope_type is 'longrope'; it must be one of default, linear, llama3",
        ),
        (rope(rope_type=["linear"]), r"rope_parameters.rope_type is \['linear'\]"),
        (rope(type="linear"), "rope_type is 'llama3', but type is 'linear'"),
        (rope(factor=None), "rope_parameters of type llama3 lacks factor"),
        (rope(factor="8"), "rope_parameters.factor is '8'"),
        (rope(factor=0), "rope_parameters.factor is 0; it must be a number over 0"),
        (rope(original_max_position_embeddings=64.5), "original_max_position_embeddings is 64.5; it must be a whole"),
        (rope(high_freq_factor=1.0), "high_freq_factor must be greater than low_freq_factor"),
        (rope(attention_factor=1.2), "rope_parameters.attention_factor is not supported for rope type llama3"),
        (rope(partial_rotary_factor=0.5), "rope_parameters.partial_rotary_factor is 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"rope_scaling": {"type": "linear", "factor": 2}} | rope(), "rope_parameters is .*, but rope_scaling is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": THETA}}}, "full_attention is not supported"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16', but torch_dtype is 'float16'; they must be equal"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not Llama's silu"),
        ({"hidden_size": "256"}, "hidden_size is '256'; it must be a whole number of 1 or more"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"rms_norm_eps": None}, "lacks rms_norm_eps"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_what_is_not_understood_is_refused(
    folder: Path, llama: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    """By `load`, by `convert`, and when a Llama becomes part of a new model."""

    def refused(checkpoint: Path, command: Callable[[], object]) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            command()
        assert str(caught.value).startswith(f"{checkpoint / 'config.json'}: ") and "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    for checkpoint in (folder, llama):
        write(checkpoint / "config.json", **changes)
    refused(folder, lambda: load(folder))
    refused(folder, lambda: convert(folder, tmp_path / "out"))
    if "eos_token_id" not in changes:  # a new model takes it from its tokenizer
        refused(llama, lambda: convert(mlx_path=tmp_path / "out", vision=SIGLIP, llm=llama))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": None}, "text_config lacks rope_theta"),
        (newer("default"), "text_config.rope_theta is 10000.0, but rope_parameters.rope_theta is 500000.0"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "text_config.rope_scaling.rope_type is 'dynamic'"),
    ],
)
def test_nested_configs_are_named(folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    convert(folder, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    write(path, text_config=json.loads(path.read_text())["text_config"] | changes)
    with pytest.raises(CheckpointError, match=f"^{path}: {message}"):
        load(tmp_path / "out")


def test_a_siglip_whose_image_settings_are_in_processor_config(siglip: Path, tmp_path: Path) -> None:
    """transformers 5 saves a whole processor in one file."""
    folder = Path(shutil.copytree(siglip, tmp_path / "siglip"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"image_processor": {**settings, "resample": 2}, "processor_class": "SiglipProcessor"}))
    assert load_encoder(folder).resample == Image.Resampling.BILINEAR
    path.write_text(json.dumps({"image_processor": {**settings, "image_mean": [0.4] * 3}}))
    with pytest.raises(CheckpointError, match="processor_config.json: image_mean and image_std are not"):
        load_encoder(folder)


def sampling(folder: Path, text: str) -> Sampling:
    (folder / "generation_config.json").write_text(text)
    return load(folder)[1].sampling


def test_do_sample_false_is_greedy(folder: Path, circles: Image.Image, tmp_path: Path) -> None:
    """Whatever else is set. The penalty is independent, with Hugging Face's default. Conversions keep this."""
    hot = '"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0'
    assert sampling(folder, f'{{"do_sample": true, {hot}}}').temperature == 50
    assert sampling(folder, f'{{"do_sample": false, {hot}}}') == Sampling(0, 1, 0, 0, repetition_penalty=1)
    convert(folder, tmp_path / "out")
    for checkpoint in (folder, tmp_path / "out"):
        model, processor = load(checkpoint)
        for seed in range(3):
            mx.random.seed(seed)
            response = next(stream_generate(model, processor, "What is this image?", circles))
            assert response.token == response.logprobs.argmax().item()
    assert sampling(folder, '{"do_sample": false, "repetition_penalty": 1.2}').repetition_penalty == 1.2
    # An explicit temperature samples, with the reference's defaults for what the file leaves open.
    model, processor = load(folder)
    tokens = set()
    for seed in range(20):
        mx.random.seed(seed)
        tokens.add(next(stream_generate(model, processor, "What is this image?", circles, temperature=50.0)).token)
    assert len(tokens) > 3


def test_null_and_absent_are_the_defaults(folder: Path) -> None:
    """Unlike Hugging Face, the reference samples by default, and the released file does not disable it."""
    nulls = dict.fromkeys(("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"))
    for config in ({}, nulls, {"bos_token_id": 1, "_from_model_config": True}):
        assert sampling(folder, json.dumps(config)) == Sampling()
    (folder / "generation_config.json").unlink()
    assert load(folder)[1].sampling == Sampling()


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("do_sample", ["false", 0, 1.0, []]),
        ("temperature", ["0.7", True, -0.1, float("nan"), float("inf"), [0.7], {}, 10**400]),
        ("top_p", [0, -1, 1.01, float("nan"), "1", False]),
        ("top_k", [-1, 50.0, 2.5, "50", True, float("inf")]),
        ("min_p", [-0.1, 1.5, float("nan"), "0"]),
        ("repetition_penalty", [0, -1, float("-inf"), float("nan"), "1.05", True]),
    ],
)
def test_wrong_values_are_refused(folder: Path, key: str, values: list) -> None:
    path = folder / "generation_config.json"
    for value in values:
        with pytest.raises(CheckpointError, match=f"^{path}: {key} is .*; it must be ") as caught:
            sampling(folder, json.dumps({key: value}))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_good_values_are_taken() -> None:
    good = {"temperature": 0, "top_p": 1, "top_k": 10**30, "min_p": 1.0, "repetition_penalty": 0.5}
    assert sampling_config(Path("x"), good) == {"do_sample": True, **good}

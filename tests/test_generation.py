"""The Python interface with the bundled model."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import sample_utils
from mlx_lm.tuner.utils import linear_to_lora_layers
from PIL import Image

import llama3v_mlx
from llama3v_mlx import Llama3V, generate, load, sampling, stream_generate
from llama3v_mlx.checkpoint import CheckpointError
from llama3v_mlx.demo import CHECKPOINT
from llama3v_mlx.sampling import Sampling


def test_public_names() -> None:
    for name in llama3v_mlx.__all__:
        assert getattr(llama3v_mlx, name) is not None
    with pytest.raises(AttributeError):
        _ = llama3v_mlx.nothing
    assert set(llama3v_mlx.__all__) == set(dir(llama3v_mlx))


def test_answers_about_an_image(demo, circles: Image.Image) -> None:
    assert generate(*demo, "What is this image?", image=circles, temperature=0) == (
        "Three blue circles on a white background."
    )


def test_every_way_to_give_the_image(demo, circles: Image.Image, picture: Path) -> None:
    expected = generate(*demo, "How many circles are there?", image=circles, temperature=0)
    for image in (str(picture), picture, picture.read_bytes(), np.asarray(circles), [circles]):
        assert generate(*demo, "How many circles are there?", image=image, temperature=0) == expected
    for source in (circles, str(picture)):
        parts = [{"type": "image", "image": source}, {"type": "text", "text": "How many circles are there?"}]
        assert generate(*demo, [{"role": "user", "content": parts}], temperature=0) == expected


def test_stream_is_the_answer_in_pieces(demo, circles: Image.Image) -> None:
    responses = list(stream_generate(*demo, "What is this image?", image=circles, temperature=0))
    text = "".join(response.text for response in responses)
    assert text == generate(*demo, "What is this image?", image=circles, temperature=0)
    last = responses[-1]
    assert (last.num_tiles, last.visual_tokens, last.finish_reason) == (5, 5 * demo[1].num_queries, "stop")
    assert min(last.preprocess_seconds, last.vision_seconds, last.prefill_seconds) > 0


def test_original_interface(circles: Image.Image) -> None:
    model = Llama3V.from_pretrained(CHECKPOINT)
    tokenizer = model.tokenizer._tokenizer  # as from transformers' AutoTokenizer
    answer = model.generate(image=circles, message="What is this image?", temperature=0.1, tokenizer=tokenizer)
    assert answer == "Three blue circles on a white background."


def test_text_alone_and_several_images(demo, circles: Image.Image) -> None:
    assert generate(*demo, "Hello", temperature=0)
    assert generate(*demo, "What is this image?", image=[circles, circles], temperature=0)


def test_a_system_prompt_wants_a_question_or_messages(demo, circles: Image.Image) -> None:
    """A system prompt cannot be added to ids or to a text that already contains template tokens."""
    model, processor = demo
    text = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    encoded = processor.encode("What is this image?", [circles])
    for prompt in (encoded.ids, np.array(encoded.ids), mx.array(encoded.ids), text, encoded):
        with pytest.raises(ValueError, match="a system prompt goes before a question or messages"):
            generate(model, processor, prompt, image=circles, system_prompt="Answer briefly.")
    messages = [{"role": "user", "content": [circles, "What is this image?"]}]
    expected = processor.encode([{"role": "system", "content": "Answer briefly."}, *messages])
    assert processor.encode("What is this image?", [circles], "Answer briefly.").ids == expected.ids
    assert processor.encode(messages, (), "Answer briefly.").ids == expected.ids


def test_ids_are_a_whole_prompt(demo, circles: Image.Image) -> None:
    """Ids may be a list or an array, as in mlx-lm's own functions."""
    model, processor = demo
    ids = processor.encode("What is this image?", [circles]).ids
    for prompt in (ids, np.array(ids), mx.array(ids)):
        answer = generate(model, processor, prompt, image=circles, temperature=0)
        assert answer == "Three blue circles on a white background."


def test_an_exclamation_mark_is_kept(demo) -> None:
    """The reference implementation drops id 0, which is "!"."""
    assert generate(*demo, "Hello", temperature=0).startswith("Hello!")


def test_seed_repeats_an_answer(demo, circles: Image.Image) -> None:
    answers = []
    for _ in range(2):
        mx.random.seed(7)
        answers.append(generate(*demo, "What is this image?", image=circles, temperature=5.0, top_p=1, max_tokens=12))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_cache(demo, circles: Image.Image, bits: int) -> None:
    options = {"temperature": 0, "kv_bits": bits, "kv_group_size": 64, "quantized_kv_start": 0}
    assert generate(*demo, "What is this image?", image=circles, **options).endswith("background.")


def test_max_tokens_ends_an_answer(demo, circles: Image.Image) -> None:
    *_, last = stream_generate(*demo, "What is this image?", image=circles, temperature=0, max_tokens=3)
    assert (last.generation_tokens, last.finish_reason) == (3, "length")


def test_too_long_a_prompt_names_both_lengths(demo, capsys) -> None:
    model, processor = demo
    limit = model.language_model.args.max_position_embeddings
    with pytest.raises(ValueError, match=rf"prompt of \d+ tokens is too long for the context of {limit}"):
        generate(model, processor, "red " * limit, verbose=True)
    assert capsys.readouterr().out == ""


def test_sampling_comes_from_the_checkpoint(folder: Path) -> None:
    assert load(CHECKPOINT)[1].sampling == Sampling(0.7, 0.8, 100, 0.0, 1.0)
    (folder / "generation_config.json").write_text('{"temperature": 0.2, "top_k": 5}')
    assert load(folder)[1].sampling == Sampling(0.2, 0.8, 5, 0.0, 1.05)


def test_sampler_keeps_hugging_face_order() -> None:
    """Temperature is applied before top-p, so a high temperature lets more tokens through."""
    logprobs = mx.log(mx.array([[0.85, 0.1, 0.05]]))
    hot, cold = (Sampling(temperature=t, top_p=0.8, top_k=0).sampler() for t in (3.0, 1.0))
    mx.random.seed(0)
    assert {cold(logprobs).item() for _ in range(50)} == {0}
    assert {hot(logprobs).item() for _ in range(100)} > {0}
    assert Sampling(temperature=0).sampler()(logprobs).item() == 0
    assert {Sampling(temperature=9.0, top_p=1, top_k=2).sampler()(logprobs).item() for _ in range(100)} == {0, 1}


def test_repetition_penalty_spares_the_prompt() -> None:
    (penalize,) = Sampling(repetition_penalty=2.0).logits_processors(num_prompt_tokens=2)
    logits = mx.array([[4.0, 4.0, 4.0, -4.0]])
    assert penalize(mx.array([0, 1, 2, 3]), logits).tolist() == [[4.0, 4.0, 2.0, -8.0]]
    assert Sampling(repetition_penalty=1.0).logits_processors(2) == []


def test_float16_is_kept_when_asked_for(circles: Image.Image) -> None:
    model, processor = load(CHECKPOINT, dtype=mx.float16)
    assert model.language_model.model.norm.weight.dtype == mx.float16
    assert generate(model, processor, "What is this image?", image=circles, temperature=0).endswith("background.")


def test_fewer_tiles(circles: Image.Image) -> None:
    model, processor = load(CHECKPOINT, max_image_tiles=1)
    *_, last = stream_generate(model, processor, "What is this image?", image=circles, temperature=0)
    assert last.num_tiles == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1}, ValueError, "temperature is -1; it must be a number of 0 or more"),
        ({"temperature": "0"}, ValueError, "temperature is '0'"),
        ({"top_p": 2}, ValueError, "top_p is 2; it must be a number of 0 or more and at most 1"),
        ({"max_tokens": 0}, ValueError, "max_tokens is 0; it must be 1 or more"),
        ({"temp": 0}, TypeError, r"stream_generate\(\) got an unexpected keyword argument 'temp'"),
        ({"image": io.BytesIO(b"x")}, TypeError, "an image must be a path, .*, not BytesIO"),
        ({"image": [None]}, TypeError, "an image must be a path, .*, not NoneType"),
    ],
)
def test_wrong_arguments(demo, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        generate(*demo, "What is this image?", **options)


@pytest.mark.parametrize("prompt", [None, 5])
def test_what_is_no_prompt(demo, prompt) -> None:
    with pytest.raises(TypeError, match=f"a prompt must be a text, messages or ids, not {type(prompt).__name__}"):
        generate(*demo, prompt)


def test_visual_tokens_do_not_depend_on_neighbours(demo, circles: Image.Image) -> None:
    """A tile gives the same result alone and in a batch, up to float32 rounding in matmuls of other shapes."""
    model, processor = demo
    tiled = processor.encode("?", [circles]).images[0]
    together = model.encode_image([tiled, dataclasses.replace(tiled, tiles=tiled.tiles[::-1])])
    alone = mx.concatenate([model.encode_tiles(tile[None])[0] for tile in tiled.tiles])
    assert mx.abs(together[0] - alone).max().item() < 1e-4 * mx.abs(alone).max().item()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "qwen3"}'), "model_type is 'qwen3'"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama3v"}'), "lacks hidden_size"),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "1 missing shard: model-00001"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: damaged"),
        (lambda f: next(f.glob("*.safetensors")).write_bytes(b"x" * 100), "not a safetensors file"),
        (lambda f: _cut(next(f.glob("*.safetensors"))), "cut short"),
    ],
)
def test_damaged_checkpoint(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_no_such_checkpoint(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", "nobody", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such folder, and not a Hub repository"):
            load(name)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        load("nobody/nothing")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(CHECKPOINT / "tokenizer.json", folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors weights are read"):
        load(folder)


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def all_of_the_vocabulary(sampling: Sampling, key: mx.array):
    """`Sampling.sampler` built from mlx-lm's filters, over the whole vocabulary at each step."""

    def sample(logprobs: mx.array) -> mx.array:
        logits = logprobs.astype(mx.float32) / sampling.temperature
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        if sampling.top_k:
            logprobs = sample_utils.apply_top_k(logprobs, sampling.top_k)
        if sampling.top_p < 1:
            logprobs = sample_utils.apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p:
            logprobs = sample_utils.apply_min_p(logprobs, sampling.min_p)
        return mx.argmax(logprobs + mx.random.gumbel(logprobs.shape, key=mx.random.split(key)[1]), axis=-1)

    return sample


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])  # half precision has many equal logits
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.1}, {"top_k": 1000, "temperature": 5.0}]
)
def test_sampling_the_top_k_equals_sampling_the_vocabulary(options: dict, dtype: mx.Dtype) -> None:
    sampling = Sampling(**options)
    drawn = []
    for seed in range(8):
        mx.random.seed(seed)
        logits = (3 * mx.random.normal((1, 32_000))).astype(dtype)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        key = mx.random.key(seed)
        expected = all_of_the_vocabulary(sampling, key)(logprobs)
        token = sampling.sampler(key)(logprobs)
        assert (token.tolist(), token.dtype, token.shape) == (expected.tolist(), expected.dtype, expected.shape)
        drawn += token.tolist()
    assert len(set(drawn)) > 1


def test_the_vocabulary_is_not_sorted_after_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_sizes = []
    monkeypatch.setattr(sampling, "apply_top_p", lambda logprobs, p: sorted_sizes.append(logprobs.shape) or logprobs)
    Sampling(top_k=100).sampler()(mx.zeros((1, 32_000)))
    assert sorted_sizes == [(1, 100)]


@pytest.fixture
def adapters(tiny: Path, tmp_path: Path) -> Path:
    """Adapters of rank 2 for the last layer of the small checkpoint."""
    model, _ = load(tiny)
    model.freeze()
    linear_to_lora_layers(model, 1, LORA)
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": LORA}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    load(tiny, adapter_path=tmp_path)
    return tmp_path


LORA = {"rank": 2, "scale": 1.0, "dropout": 0.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": None},
        {"num_layers": "1"},
        {"lora_parameters": [2]},
        {"lora_parameters": {**LORA, "rank": 0}},
        {"lora_parameters": {"rank": 2}},
        {"fine_tune_type": "x"},
    ],
)
def test_a_malformed_adapter_config(tiny: Path, adapters: Path, changes: dict) -> None:
    path = adapters / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=f"^{path}"):
        load(tiny, adapter_path=adapters)


@pytest.mark.parametrize("damage", ["cut", "shape", "name", "link"])
def test_damaged_adapters(tiny: Path, adapters: Path, damage: str) -> None:
    path = adapters / "adapters.safetensors"
    tensors = mx.load(str(path))
    name, tensor = next(iter(tensors.items()))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "link":
        (adapters / "there").mkdir()
        path.rename(adapters / "there" / path.name)
        path.symlink_to(adapters / "there" / path.name)
    else:
        changed = {name: tensor[:1]} if damage == "shape" else {"\x1b[2J": tensor}
        mx.save_safetensors(str(path), tensors | changed)
    with pytest.raises(CheckpointError, match=f"^{adapters}"):
        load(tiny, adapter_path=adapters)

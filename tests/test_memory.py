"""Memory is checked before a checkpoint is loaded, and low-memory mode gives the same answers."""

import dataclasses
import importlib.util
import json
import re
import struct
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from PIL import Image

from llama3v_mlx import check_memory, load, memory, stream_generate
from llama3v_mlx import device as device_module
from llama3v_mlx.checkpoint import read_config
from llama3v_mlx.demo import CHECKPOINT, IMAGES
from llama3v_mlx.features.lookup import FeatureCache
from llama3v_mlx.loading import build_model, load_model
from llama3v_mlx.memory import MemoryLimitError, footprint, num_answers
from llama3v_mlx.models import llama3v
from llama3v_mlx.models.llama3v import Model
from llama3v_mlx.prompt_tokens import PromptTokens

ROOT = Path(__file__).parents[1]
STORED = {mx.float16: "F16", mx.uint32: "U32"}
SMALL_MAC, MIDDLE_MAC, LARGE_MAC = 5_730_000_000, 11_450_000_000, 28_600_000_000  # working sets at 8, 16 and 36 GB


def write_hollow(folder: Path, bits: int | None, **changes) -> Path:
    """Write a checkpoint of the released size with all-zero weights in a sparse file."""
    folder.mkdir()
    spec = importlib.util.spec_from_file_location("convert_memory", ROOT / "benchmarks" / "convert_memory.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.write_config(folder, 32)
    config = read_config(folder)
    for part, change in changes.items():
        config[part] |= change
    model = build_model(config)  # never evaluated
    model.set_dtype(mx.float16)
    if bits:
        config["quantization"] = {"group_size": 64, "bits": bits}
        nn.quantize(
            model, 64, bits, class_predicate=lambda p, m: hasattr(m, "to_quantized") and Model.quant_predicate(p, m)
        )
    return save_hollow(folder, config, model)


def save_hollow(folder: Path, config: dict, model: nn.Module) -> Path:
    header, end = {}, 0
    for name, tensor in tree_flatten(model.parameters()):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": STORED[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama_1b(tmp_path_factory) -> Path:
    """A hollow Llama-3.2-1B."""
    config = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256}
    config |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 5e5, "tie_word_embeddings": True}
    model = llama.Model(llama.ModelArgs.from_dict(config))  # never evaluated
    model.set_dtype(mx.float16)
    return save_hollow(tmp_path_factory.mktemp("llama-1b"), config, model)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("full-size")
    return {bits: write_hollow(folder / f"llama3v-{bits}", bits if bits < 16 else None) for bits in (4, 16)}


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch):
    """Pretend to be a Mac whose GPU may use `limit` bytes."""

    def pretend(limit: int) -> None:
        monkeypatch.setenv(device_module.PRETEND, "1")
        for module in (memory, llama3v):
            monkeypatch.setattr(module, "memory_limit", lambda: limit)

    return pretend


def test_the_released_size(full_size: dict[int, Path], mac) -> None:
    mac(LARGE_MAC)
    need = footprint(full_size[4])
    assert need.vision + need.language == 5_531_066_848
    assert need.vision == 1_013_662_176
    assert need.parameters == 8_030_261_248
    assert need.cache == 2 * 32 * 1024 * 2 * 8192  # layers, key or value width, bytes, context
    assert 3e8 < max(need.tiles, need.prefill) < 1e9
    assert need.total == need.vision + need.language + need.cache + max(need.tiles, need.prefill)
    short = footprint(full_size[4], images=1, text_tokens=40)
    assert short.cache == 2 * 32 * 1024 * 2 * (10 * 98 + 2 + 40)
    assert footprint(full_size[4], kv_bits=8).cache < 0.54 * need.cache
    assert footprint(full_size[4], images=1, max_image_tiles=1).cache < short.cache / 5
    assert footprint(full_size[16]).language == 2 * need.parameters
    assert need.quantized(4).language == pytest.approx(need.language, rel=1e-3)


def test_a_draft_model_takes_memory_too(full_size: dict[int, Path], llama_1b: Path, mac) -> None:
    mac(LARGE_MAC)
    alone, need = footprint(full_size[4]), footprint(full_size[4], draft_model=llama_1b)
    weights, cache = 2 * 1_235_814_400, 2 * 16 * 512 * 2  # layers, key or value width, bytes
    assert need.draft == weights + cache * 8192  # no longer than the model's context
    assert need.total == alone.total + need.draft
    assert str(need).endswith("draft model 2.74 GB)")
    assert footprint(full_size[4], images=1, text_tokens=40, draft_model=llama_1b).draft == weights + cache * 40
    low = dataclasses.replace(need, low_memory=True)
    assert low.total == dataclasses.replace(low, draft=0).total + need.draft
    mac(8 * 10**9)
    alone = footprint(full_size[4])
    with pytest.raises(MemoryLimitError) as caught:
        check_memory(full_size[4], draft_model=llama_1b)
    assert f"what fits: leaving out --draft-model {llama_1b} ({alone.total / 1e9:.2f} GB)" in str(caught.value)


@pytest.mark.parametrize("module", ["generate", "chat"])
def test_commands_count_the_draft_model(module: str, run_main, monkeypatch, llama: Path) -> None:
    def check(model, **options):
        raise MemoryLimitError(f"with {options['draft_model']}")

    monkeypatch.setattr(memory, "check_memory", check)
    done = run_main(f"llama3v_mlx.{module}", *["-p", "Hello"][: 2 * (module == "generate")], "--draft-model", llama)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith(f"error: with {llama}\n")


def test_answers_at_once(full_size: dict[int, Path], mac) -> None:
    """As many as have room for their caches twice, which joining a batch takes; one at least."""
    mac(LARGE_MAC)
    need = footprint(full_size[4], images=1, text_tokens=1100)
    assert num_answers(need, 16) == 16
    for count in (1, 3, 9):
        mac(need.total - need.cache + 2 * count * need.cache)
        assert num_answers(need, 16) == count
    mac(need.total)
    assert num_answers(need, 16) == 1


def test_a_cpu_computes_in_float32(full_size: dict[int, Path], monkeypatch) -> None:
    monkeypatch.setattr(memory, "on_gpu", lambda: False)
    assert footprint(full_size[16]).language == 4 * 8_030_261_248
    assert footprint(full_size[4]).vision == 2 * 1_013_662_176


@pytest.mark.parametrize(
    ("bits", "limit", "options", "ways"),
    [
        (4, LARGE_MAC, {}, None),
        (4, MIDDLE_MAC, {}, None),
        (16, LARGE_MAC, {}, None),
        (16, MIDDLE_MAC, {}, ["llama3v convert -q --q-bits 8 on the original checkpoint ("]),
        (
            4,
            SMALL_MAC,
            {"images": 1, "text_tokens": 1064},
            ["--low-memory (", "llama3v convert -q --q-bits 3 on the original"],
        ),
        (4, SMALL_MAC, {"images": 1, "text_tokens": 1064, "low_memory": True}, None),
        (16, SMALL_MAC, {"low_memory": True}, ["llama3v convert -q --q-bits 3 on the original checkpoint ("]),
        (
            4,
            4_750_000_000,
            {"images": 1, "text_tokens": 200, "low_memory": True},
            ["--max-image-tiles 1 (", "-q --q-bits 3"],
        ),
        (4, 10**9, {}, ["no option makes it fit"]),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(full_size, mac, bits, limit, options, ways) -> None:
    mac(limit)
    if ways is None:
        assert check_memory(full_size[bits], **options).total <= limit
        return
    with pytest.raises(MemoryLimitError) as caught:
        check_memory(full_size[bits], **options)
    message = str(caught.value)
    assert message.startswith(f"{full_size[bits]} needs ") and "\n" not in message
    assert f"only {limit / 1e9:.2f} GB is usable here" in message and message.endswith("--force loads it anyway")
    for way in ways:
        assert way in message
    for size in re.findall(r"\((\d+\.\d\d) GB\)", message):
        assert float(size) <= limit / 1e9 + 0.005


@pytest.mark.parametrize("module", ["generate", "chat", "server"])
def test_commands_look_before_they_load(module: str, mac, run_main, monkeypatch) -> None:
    mac(2_000_000)
    loaded = []

    def fail(*args, **kwargs):
        loaded.append(kwargs)
        raise ValueError("loaded")

    monkeypatch.setattr("llama3v_mlx.generation.load", fail)
    options = ["--prompt", "Hello"] if module == "generate" else []
    done = run_main(f"llama3v_mlx.{module}", *options)
    assert (done.returncode, done.stdout, loaded) == (1, "", [])
    assert re.search(r"^error: .*checkpoint needs 0\.\d\d GB .*--force loads it anyway\n\Z", done.stderr, re.M)


@pytest.mark.parametrize(("size", "low_memory"), [(8 << 30, True), (16 << 30, False)])
def test_force_and_low_memory(size: int, low_memory: bool, mac, run_main, monkeypatch) -> None:
    """`--force` loads a model that does not fit; low-memory mode is the default on 8 GB."""
    mac(2_000_000)
    monkeypatch.setattr(memory, "memory", lambda: size)
    loaded = []
    monkeypatch.setattr("llama3v_mlx.generation.load", lambda *args, **kwargs: loaded.append(kwargs) or load(*args))
    done = run_main("llama3v_mlx.generate", "--image", IMAGES / "42.png", "--force", "--temp", 0, "--no-verbose")
    assert (done.returncode, done.stdout) == (0, "The number is 42.\n")
    assert loaded[0]["low_memory"] is low_memory


def answers(model: Model, processor, images: list, features: FeatureCache | None = None) -> list:
    """Tokens and log-probabilities of greedy answers about each image in turn."""
    said = []
    for image in images:
        responses = stream_generate(model, processor, "What is this image?", image, temperature=0, features=features)
        said += [(r.token, np.array(r.logprobs)) for r in responses]
    return said


def in_memory(model: Model) -> int:
    """Memory allocated by MLX in bytes."""
    mx.clear_cache()
    return mx.get_active_memory()


def test_low_memory_answers_the_same(demo, circles: Image.Image) -> None:
    images = [circles, IMAGES / "42.png", circles]
    model, processor = load(CHECKPOINT, low_memory=True)
    for ours, theirs in zip(answers(model, processor, images), answers(*demo, images), strict=True):
        assert ours[0] == theirs[0]
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_low_memory_drops_the_tower_between_images(circles: Image.Image) -> None:
    start = in_memory(None)
    model, processor = load(CHECKPOINT, low_memory=True)
    size = sum(t.nbytes for part in (model.vision_tower, model.projector) for _, t in tree_flatten(part.parameters()))
    language = sum(t.nbytes for _, t in tree_flatten(model.language_model.parameters()))
    assert in_memory(model) - start < 0.01 * size  # no weights have been read
    tiled = processor.tile(circles)
    rows = model.encode_image([tiled])
    assert in_memory(model) - start < rows[0].nbytes + 0.05 * size
    del rows
    for _ in range(2):
        answers(model, processor, [circles])
        assert in_memory(model) - start < language + 0.5 * size


def test_low_memory_with_a_feature_store(circles: Image.Image, demo, tmp_path: Path) -> None:
    start = in_memory(None)
    model, processor = load(CHECKPOINT, low_memory=True)
    features = FeatureCache(tmp_path / "store", model, processor.image_config, "demo")
    language = sum(t.nbytes for _, t in tree_flatten(model.language_model.parameters()))
    expected = [token for token, _ in answers(*demo, [circles])]
    for _ in range(2):  # encoded, then found in the store
        assert [token for token, _ in answers(model, processor, [circles], features)] == expected
        assert in_memory(model) - start < 1.5 * language


def test_low_memory_keeps_a_trained_projector(circles: Image.Image, tmp_path: Path) -> None:
    model, processor = load(CHECKPOINT)
    weight = model.projector.proj.weight * 1.5
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"projector.proj.weight": weight})
    config = {"fine_tune_type": "full", "num_layers": 0, "lora_parameters": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model, processor = load(CHECKPOINT, low_memory=True, adapter_path=tmp_path)
    tiled = processor.tile(circles)
    first, second = (model.encode_image([tiled])[0] for _ in range(2))
    assert mx.array_equal(first, second)
    assert mx.array_equal(model.projector.proj.weight, weight.astype(first.dtype))


def test_encoding_leaves_no_buffers(demo, circles: Image.Image) -> None:
    model, processor = demo
    mx.clear_cache()
    rows = model.encode_image([processor.tile(circles)])
    assert mx.get_cache_memory() == 0
    assert model.encode_image([]) == [] and len(rows) == 1


def test_batches_of_tiles_fit_the_memory(full_size: dict[int, Path], mac) -> None:
    args = llama3v.ModelArgs.from_dict(read_config(full_size[4]))
    sizes = {}
    for limit in (10**6, SMALL_MAC, MIDDLE_MAC, LARGE_MAC):
        mac(limit)
        sizes[limit] = llama3v.tile_batch_size(args, 32 * 32, 2)
        assert sizes[limit] == 1 or sizes[limit] * llama3v.tile_bytes(args, 32 * 32, 2) <= limit / 16
    assert sizes[10**6] == 1 < sizes[SMALL_MAC] < sizes[MIDDLE_MAC] < sizes[LARGE_MAC] == 16


@pytest.mark.parametrize("dtype", [None, mx.float32])
def test_loading_never_holds_the_weights_twice(tmp_path: Path, dtype: mx.Dtype | None) -> None:
    """Peak memory is the loaded weights plus a few tensors being cast."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4096}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    projector = {"hidden_size": 512, "vision_hidden_size": 64, "num_attention_heads": 4}
    parts = {"text_config": text, "vision_config": vision | {"image_size": 112}, "projector_config": projector}
    folder = write_hollow(tmp_path / "model", 4, **parts, prompt_tokens=dict.fromkeys(PromptTokens.TEXTS, 0))
    start = in_memory(None)
    mx.reset_peak_memory()
    model = load_model(folder, read_config(folder), dtype)
    tensors = [tensor.nbytes for _, tensor in tree_flatten(model.parameters())]
    assert sum(tensors) > 15_000_000
    assert mx.get_peak_memory() - start < 1.2 * sum(tensors)


def test_a_warning_of_mlx_lm_is_not_an_answer(demo, monkeypatch, capsys) -> None:
    """mlx-lm warns on stdout that a model is large for the GPU; the warning is moved to stderr."""
    module = sys.modules["mlx_lm.generate"]
    monkeypatch.setattr(module, "maybe_set_recommended_wired_limit", lambda: 0)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: None)
    print("".join(response.text for response in stream_generate(*demo, "Hello", temperature=0, max_tokens=3)))
    printed = capsys.readouterr()
    assert "[WARNING]" in printed.err and "[WARNING]" not in printed.out


def test_footprints_are_for_people(mac, full_size: dict[int, Path]) -> None:
    mac(LARGE_MAC)
    need = dataclasses.replace(footprint(full_size[4]), tiles=0, prefill=5 * 10**8)
    assert str(need) == "7.10 GB (weights 5.53 GB, cache 1.07 GB, activations 0.50 GB)"

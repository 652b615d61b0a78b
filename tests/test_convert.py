"""The converter: what it writes, what it refuses, what is left when it is stopped; and `--verify`."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import tolerance
from huggingface_hub.errors import HTTPError
from mlx.utils import tree_flatten
from PIL import Image
from tokenizers import Tokenizer

import llama3v_mlx
from llama3v_mlx import load
from llama3v_mlx.checkpoint import INDEX, CheckpointError, read_config
from llama3v_mlx.conversion import shard_writer as streaming
from llama3v_mlx.conversion.options import check_quantization
from llama3v_mlx.conversion.verify import first_token_logprobs, verify
from llama3v_mlx.convert import convert, main
from llama3v_mlx.demo import CHECKPOINT
from llama3v_mlx.loading import load_model
from llama3v_mlx.models.llama3v import Model
from tools.demo.make import build_model, save

ROOT = Path(__file__).parents[1]
QUESTION = "What is this image?"
SHARD = "model-00001-of-00001.safetensors"
WRITTEN = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
Tensors = dict[str, mx.array]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The demo's architecture with random weights, in the released layout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    mx.random.seed(0)
    save(build_model(Tokenizer.from_file(str(folder / "tokenizer.json"))), folder)
    return folder


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> Path:
    """A copy of the source, to be changed."""
    return Path(shutil.copytree(source, tmp_path / "damaged"))


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory) -> dict[str, Path]:
    """Conversions by name."""
    folder = tmp_path_factory.mktemp("converted")
    options = {
        "float16": {},
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "4-bit": {"quantize": True},
        "8-bit": {"quantize": True, "q_bits": 8, "q_group_size": 32},
        "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
        "mixed": {"quantize": True, "quant_predicate": "mixed_3_6"},
    }
    for name, own in options.items():
        convert(source, folder / name, **own)
    return {name: folder / name for name in options}


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """Wide enough to be sliced."""
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def tensors_of(folder: Path) -> Tensors:
    weights: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= mx.load(str(path))
    return weights


def rewrite(folder: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Change the tensors of a source that has one shard, and its index with them."""
    tensors = mx.load(str(folder / SHARD))
    tensors = change(tensors) or tensors
    mx.eval(tensors)
    mx.save_safetensors(str(folder / SHARD), tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SHARD)}))


def without(tensors: Tensors, prefix: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def assert_equal(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert mx.array_equal(a[name], b[name]), name


def tokens(folder: Path, picture: Path) -> list[int]:
    model, processor = load(folder)
    stream = llama3v_mlx.stream_generate(model, processor, QUESTION, image=picture, temperature=0, max_tokens=6)
    return [response.token for response in stream]


def failure(capsys, *argv: str | Path) -> str:
    """The one line with which a command fails."""
    with pytest.raises(SystemExit) as exited:
        main([str(arg) for arg in argv])
    output = capsys.readouterr()
    assert exited.value.code == 1
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


# What is written


@pytest.mark.parametrize("vision, projector", [("vison", "projection"), ("vision", "projection"), ("vpm", "resampler")])
def test_every_release_gives_the_same(
    damaged: Path, converted: dict[str, Path], tmp_path: Path, vision: str, projector: str
) -> None:
    names = {"llm": "llm", "vison": vision, "projection": projector}
    rewrite(damaged, lambda ts: {re.sub(r"^\w+", lambda m: names[m[0]], name): t for name, t in ts.items()})
    if vision == "vpm":
        edit_json(damaged / "config.json", model_type="minicpmv", architectures=["MiniCPMV"], version="2.5")
    convert(damaged, tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), tensors_of(converted["float16"]))
    assert read_config(tmp_path / "out") == read_config(converted["float16"])


def test_shards_of_any_order_and_number(damaged: Path, converted: dict[str, Path], tmp_path: Path) -> None:
    tensors = mx.load(str(damaged / SHARD))
    mx.eval(tensors)
    names = sorted(tensors, key=lambda name: hash(name[::-1]))
    weight_map = {}
    for i in range(3):
        shard = f"model-{i + 1:05d}-of-00003.safetensors"
        mx.save_safetensors(str(damaged / shard), {name: tensors[name] for name in names[i::3]})
        weight_map |= dict.fromkeys(names[i::3], shard)
    (damaged / SHARD).unlink()
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(damaged, tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), tensors_of(converted["float16"]))


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_answers_as_the_source_does(source: Path, converted: dict[str, Path], picture: Path, name: str) -> None:
    assert tokens(converted[name], picture) == tokens(source, picture)


@pytest.mark.parametrize("name", ["4-bit", "8-bit", "mxfp4", "mixed"])
def test_quantized_as_mlx_lm_would(source: Path, converted: dict[str, Path], picture: Path, name: str) -> None:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    config = read_config(source)
    model = load_model(source, config)
    if name == "mixed":
        recipe = mixed_quant_predicate_builder("mixed_3_6", model, 64)
        how = {"bits": 3, "quant_predicate": lambda p, m: Model.quant_predicate(p, m) and recipe(p, m)}
    else:
        how = {"8-bit": {"bits": 8}, "mxfp4": {"mode": "mxfp4"}}.get(name, {})
    group_size = {"4-bit": 64, "mixed": 64}.get(name, 32)
    model, theirs = quantize_model(model, config, group_size, how.pop("bits", None), **how)
    assert_equal(tensors_of(converted[name]), dict(tree_flatten(model.parameters())))
    ours = read_config(converted[name])
    # The recipe names every module; those that have the common bits need no entry of their own.
    common = {key: value for key, value in theirs["quantization"].items() if not isinstance(value, dict)}
    assert ours["quantization"] == {k: v for k, v in theirs["quantization"].items() if v != common}
    assert ours["quantization_config"] == ours["quantization"]
    assert len(tokens(converted[name], picture)) > 0


def test_mlx_lm_loads_it(converted: dict[str, Path]) -> None:
    import mlx_lm

    llama3v_mlx.register()
    for name in ("float32", "4-bit", "mxfp4", "mixed"):
        model, tokenizer = mlx_lm.load(str(converted[name]))
        quantized = {path for path, module in model.named_modules() if hasattr(module, "bits")}
        assert all(path.startswith("language_model.") for path in quantized)
        assert len(quantized) == (0 if name == "float32" else 2 + 7 * len(model.layers))
        assert type(model.vision_tower.encoder.layers[0].mlp.fc1) is nn.Linear
        assert mlx_lm.generate(model, tokenizer, "How many?", max_tokens=2) is not None


def test_widths_that_groups_do_not_divide_are_left_alone(damaged: Path, tmp_path: Path) -> None:
    edit_json(damaged / "config.json", intermediate_size=448)

    def narrow(tensors: Tensors) -> None:
        for name in tensors:
            if re.search("(gate|up)_proj", name):
                tensors[name] = tensors[name][:448]
            if "down_proj" in name:
                tensors[name] = tensors[name][:, :448]

    rewrite(damaged, narrow)
    convert(damaged, tmp_path / "out", quantize=True, q_group_size=128)
    model, _ = load(tmp_path / "out")
    mlp = model.layers[0].mlp
    assert (type(mlp.down_proj), type(mlp.up_proj)) == (nn.Linear, nn.QuantizedLinear)


def test_files(source: Path, damaged: Path, tmp_path: Path) -> None:
    """All that is needed, and nothing that could be run."""
    edit_json(damaged / "config.json", auto_map={"AutoModel": "modeling_llama3v.Llama3v"})
    edit_json(damaged / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}, tokenizer_class="x.Y")
    for name in ("pytorch_model.bin", "modeling_llama3v.py", "model.pt", "training_args.bin"):
        (damaged / name).write_bytes(b"not to be read")
    out = tmp_path / "out"
    convert(damaged, out, quantize=True)
    shards = {path.name for path in out.glob("*.safetensors")}
    assert {path.name for path in out.iterdir()} == WRITTEN | shards
    assert not (tmp_path / "out.partial").exists()
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    for path in out.glob("*.json"):
        assert "auto_map" not in path.read_text(encoding="utf-8")
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|start_header_id|>" in (out / "chat_template.jinja").read_text(encoding="utf-8")
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["temperature"], generation["repetition_penalty"]) == (0.7, 1.0)  # the demo's own
    assert generation["eos_token_id"] == read_config(out)["eos_token_id"]
    config = read_config(out)
    assert (config["model_type"], config["processor_type"], config["dtype"]) == ("llama3v", "llama3v", "float16")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "library_name: mlx\npipeline_tag: image-text-to-text\n" in card
    assert "base_model" not in card
    assert 'load("out")' in card
    assert "licence" in card
    assert "Language model: 4-bit affine, groups of 64, 4.51 bits per weight." in card and "Calibrated" not in card


def test_index_and_shards(source: Path, converted: dict[str, Path], tmp_path: Path, monkeypatch) -> None:
    """Small shards and small chunks give the same tensors, in memory far below their size."""
    monkeypatch.setattr(streaming, "SHARD_BYTES", 500_000)
    monkeypatch.setattr(streaming, "WORKING_BYTES", 1_500_000)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 10_000)
    out = tmp_path / "out"
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    convert(source, out, quantize=True)
    assert mx.get_peak_memory() - active < 3_000_000 < (source / SHARD).stat().st_size / 2
    assert_equal(tensors_of(out), tensors_of(converted["4-bit"]))

    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 5
    for shard in shards:
        weights, metadata = mx.load(str(out / shard), return_metadata=True)
        assert metadata == {"format": "mlx"}
        assert {name for name, file in index["weight_map"].items() if file == shard} == weights.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(out).values())
    assert index["metadata"]["total_parameters"] == sum(t.size for t in tensors_of(converted["float16"]).values())


def test_a_conversion_can_be_converted_again(converted: dict[str, Path], tmp_path: Path) -> None:
    convert(converted["float16"], tmp_path / "out", quantize=True)
    assert_equal(tensors_of(tmp_path / "out"), tensors_of(converted["4-bit"]))
    assert read_config(tmp_path / "out") == read_config(converted["4-bit"])


def test_dtypes(source: Path, converted: dict[str, Path], tmp_path: Path) -> None:
    convert(source, tmp_path / "out", quantize=True, dtype="bfloat16")
    for folder, dtype in (
        (converted["float32"], mx.float32),
        (converted["bfloat16"], mx.bfloat16),
        (tmp_path / "out", mx.bfloat16),
    ):
        assert {t.dtype for t in tensors_of(folder).values()} - {mx.uint32} == {dtype}
        assert read_config(folder)["dtype"] == str(dtype).removeprefix("mlx.core.")


def test_values_beyond_float16(damaged: Path, tmp_path: Path, capsys) -> None:
    def grow(tensors: Tensors) -> Tensors:
        tensors = {name: tensor.astype(mx.float32) for name, tensor in tensors.items()}
        tensors["llm.lm_head.weight"][3, 4] = -70000
        return tensors

    rewrite(damaged, grow)
    error = failure(capsys, "--hf-path", damaged, "--mlx-path", tmp_path / "out", "-q")
    assert "language_model.lm_head.weight has values up to 7e+04" in error
    assert not list(tmp_path.glob("out*"))
    convert(damaged, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(damaged: Path, tmp_path: Path, capsys, value: float) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["llm.model.embed_tokens.weight"][3, 4] = value

    rewrite(damaged, spoil)
    error = failure(capsys, "--hf-path", damaged, "--mlx-path", tmp_path / "out", "-q")
    assert f"{damaged}: language_model.model.embed_tokens.weight has values that are not finite" in error
    assert not list(tmp_path.glob("out*"))


def test_full_size_plan(tmp_path: Path) -> None:
    """The released 741 tensors, by name and shape alone: all have their place, and 4 bits make 5.5 GB of them."""
    spec = importlib.util.spec_from_file_location("convert_memory", ROOT / "benchmarks" / "convert_memory.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    shapes = benchmark.released_tensors(32)
    assert len(shapes) == 741
    benchmark.write_config(tmp_path, 32)
    tensors = {name: mx.zeros(shape, mx.float16) for name, shape in shapes.items()}  # never evaluated
    config = read_config(tmp_path)
    assert config["prompt_tokens"] == {
        "image": 128002,
        "image_start": 128010,
        "image_end": 128011,
        "slice_start": 128020,
        "slice_end": 128021,
        "newline": 198,
    }
    plan = streaming.make_plan(tmp_path, config, tensors, check_quantization(True, None, None, "affine", None))
    assert plan.num_parameters == 8_537_092_336
    assert len(plan.quantized) == 2 + 7 * 32
    assert plan.num_bytes == 8_030_261_248 * 4.5 / 8 + 65 * 4096 * (2 - 4.5 / 8) + 1_013_662_176


# What is refused


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda ts: without(ts, "llm.lm_head."), r"1 wrong tensor: language_model\.lm_head\.weight missing"),
        (lambda ts: ts | {"llm.extra": mx.zeros(3)}, r"1 wrong tensor: language_model\.extra unknown"),
        (
            lambda ts: ts | {"vison.post_layernorm.bias": mx.zeros(3)},
            r"vision_tower\.post_layernorm\.bias \[3\] instead of \[\d+\]",
        ),
        (
            lambda ts: ts | {"projection.attn.in_proj_bias": mx.zeros(7)},
            r"4 wrong tensors: .*projector\.k_proj\.bias missing.*projector\.in_proj_bias unknown",
        ),
        (
            lambda ts: ts | {"vison.embeddings.patch_embedding.weight": mx.zeros((5, 6))},
            r"patch_embedding\.weight \[5, 6\] instead of \[\d+, (\d+), \1, 3\]",
        ),
        (
            lambda ts: without(ts, "vison.encoder.layers.1."),
            r"16 wrong tensors: (?:[^,]+ missing, ){9}[^,]+ missing and 6 more; is this",
        ),
        (
            lambda ts: ts | {"vpm.post_layernorm.bias": ts["vison.post_layernorm.bias"]},
            r"vision_tower\.post_layernorm\.bias appears twice",
        ),
    ],
    ids=["missing", "unknown", "shape", "in_proj", "patch", "sixteen", "twice"],
)
def test_tensors_that_do_not_fit(damaged: Path, tmp_path: Path, capsys, change: Callable, message: str) -> None:
    rewrite(damaged, change)
    error = failure(capsys, "--hf-path", damaged, "--mlx-path", tmp_path / "out")
    assert re.search(message, error), error
    assert not list(tmp_path.glob("out*"))


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f), "no such folder, and not a Hub repository"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda f: edit_json(f / "config.json", model_type="llava"), "model_type is 'llava'"),
        (
            lambda f: edit_json(f / "config.json", model_type="minicpmv", version="2.6"),
            "MiniCPM-V 2.6 is not supported",
        ),
        (lambda f: edit_json(f / "config.json", torch_dtype="int8"), "its dtype is 'int8'; give --dtype"),
        (lambda f: edit_json(f / "config.json", hidden_size=100), r"\d\d wrong tensors: "),
        (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "is quantized already"),
        (lambda f: (f / SHARD).unlink(), f"1 missing shard: {SHARD}"),
        (lambda f: truncate(f / SHARD, 1_000_000), r"damaged or cut short \(.*not fully covered\)"),
        (lambda f: truncate(f / SHARD, 1000), "not a safetensors file, damaged or cut short"),
        (lambda f: (f / SHARD).write_bytes(b""), "not a safetensors file, damaged or cut short"),
        (
            lambda f: [path.unlink() for path in f.glob("model*")] and (f / "pytorch_model.bin").touch(),
            "only safetensors weights are read",
        ),
        (
            lambda f: (f / INDEX).unlink() or shutil.copy(f / SHARD, f / "other.safetensors"),
            "other.safetensors: .* tensors: .* of another file",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: damaged"),
    ],
    ids=[
        *("folder", "config", "json", "type", "version", "dtype", "width", "quantized"),
        *("shard", "truncated", "header", "empty", "pickle", "twice", "tokenizer", "tokens"),
    ],
)
def test_sources_that_cannot_be_used(damaged: Path, tmp_path: Path, capsys, damage: Callable, message: str) -> None:
    damage(damaged)
    error = failure(capsys, "--hf-path", damaged, "--mlx-path", tmp_path / "deep" / "out")
    assert re.search(message, error), error
    assert not (tmp_path / "deep").exists()


def test_a_quantized_conversion_is_not_converted(converted: dict[str, Path], tmp_path: Path, capsys) -> None:
    error = failure(capsys, "--hf-path", converted["4-bit"], "--mlx-path", tmp_path / "out", "-q")
    assert "is quantized already" in error


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_never_overwrites(source: Path, tmp_path: Path, capsys, kind: str) -> None:
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "link": lambda: out.symlink_to("nowhere")}[kind]()
    assert "exists already" in failure(capsys, "--hf-path", source, "--mlx-path", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_before_the_work(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000_000))
    error = failure(capsys, "--hf-path", source, "--mlx-path", tmp_path / "deep" / "out")
    assert "needs 0.11 GB, but only 0.05 GB are free" in error
    assert not (tmp_path / "deep").exists()


def test_a_failure_in_the_middle_leaves_nothing(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "SHARD_BYTES", 500_000)

    def fail(*args, **kwargs) -> None:
        assert (tmp_path / "out.partial" / "model-00002.safetensors").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streaming.os, "rename", fail)
    assert "No space left" in failure(capsys, "--hf-path", source, "--mlx-path", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_somebody_elses_folder_is_kept(source: Path, tmp_path: Path, capsys) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").touch()
    assert "is in the way" in failure(capsys, "--hf-path", source, "--mlx-path", tmp_path / "out")
    assert (partial / "thesis.txt").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--q-bits", "4"], "--q-bits without -q"),
        (["--quant-predicate", "mixed_2_6", "--q-mode", "mxfp4"], "--quant-predicate, --q-mode without -q"),
        (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "--q-bits 8 does not work with mxfp4, which takes 4"),
        (["-q", "--q-group-size", "16"], "--q-group-size 16 does not work with affine, which takes 32, 64 or 128"),
        (["-q", "--quant-predicate", "mixed_2_6", "--q-bits", "4"], "mixed_2_6 is affine and sets the bits itself"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_flags_that_do_not_go_together(capsys, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--hf-path", "x", *flags])
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_options_that_do_not_go_together() -> None:
    for options in ({"dtype": "int8"}, {"quantize": True, "q_mode": "x"}, {"quantize": True, "quant_predicate": "x"}):
        with pytest.raises(ValueError, match="must be one of"):
            convert("x", **options)


def test_help_loads_nothing(run_python) -> None:
    done = run_python("-X", "importtime", "convert.py", "--help")
    assert done.returncode == 0
    assert "--quant-predicate" in done.stdout
    assert not re.search(r"\b(mlx|numpy|transformers|huggingface_hub)\b", done.stderr)


# Stopped on the way


@pytest.fixture
def slow_run(source: Path, tmp_path: Path) -> subprocess.Popen:
    """A conversion in another process that has written a shard and stops there."""
    code = """
import os, sys
import llama3v_mlx.conversion.shard_writer as streaming
from llama3v_mlx.convert import main
streaming.SHARD_BYTES, convert = 300_000, streaming._convert
def wait(*args):
    if os.path.exists(sys.argv[-1] + ".partial/model-00001.safetensors"):
        print("waiting", flush=True)
        sys.stdin.read()
    return convert(*args)
streaming._convert = wait
main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, "--hf-path", str(source), "--mlx-path", str(tmp_path / "out")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "waiting\n", process.communicate()
    yield process
    process.kill()
    process.communicate()


def test_killed(slow_run: subprocess.Popen, source: Path, tmp_path: Path, capsys) -> None:
    """Nothing that looks finished is left, and the next run clears up; one that runs is not disturbed."""
    assert "being written by another process" in failure(capsys, "--hf-path", source, "--mlx-path", tmp_path / "out")
    assert slow_run.poll() is None
    os.kill(slow_run.pid, signal.SIGKILL)
    slow_run.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with pytest.raises(CheckpointError, match="has no config.json"):
        load(tmp_path / "out.partial")
    convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load(tmp_path / "out")


def test_interrupted(slow_run: subprocess.Popen, tmp_path: Path) -> None:
    os.kill(slow_run.pid, signal.SIGINT)
    output = slow_run.communicate(timeout=60)
    assert slow_run.returncode == 130
    assert output == ("", "\n")
    assert not list(tmp_path.iterdir())


# From and to the Hub


def test_from_the_hub_and_to_it(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import huggingface_hub

    calls = []

    class Api:
        def whoami(self) -> None:
            calls.append("whoami")

        def create_repo(self, repo: str, exist_ok: bool) -> str:
            assert (tmp_path / "out" / "config.json").exists()
            calls.append("create_repo")
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, repo_id: str, folder_path: Path, repo_type: str) -> None:
            calls.append((repo_id, folder_path, repo_type))

    def download(repo_id: str, revision: str, allow_patterns: list[str], dry_run: bool = False, **kwargs):
        assert (repo_id, revision) == ("owner/llama3v", "abc")
        if dry_run:
            return []
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    out = tmp_path / "out"
    convert("owner/llama3v", out, quantize=True, revision="abc", upload_repo="me/llama3v-4bit")
    assert calls == ["whoami", "create_repo", ("me/llama3v-4bit", out, "model")]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "base_model: owner/llama3v\n" in card
    assert "base_model_relation: quantized\n" in card
    assert 'load("me/llama3v-4bit")' in card
    assert "https://huggingface.co/me/llama3v-4bit" in capsys.readouterr().out


def test_an_upload_without_a_token(source: Path, tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import HfApi, errors

    def whoami(_: HfApi) -> None:
        raise errors.LocalTokenNotFoundError("Token is required to call the /whoami-v2 endpoint")

    monkeypatch.setattr(HfApi, "whoami", whoami)
    with pytest.raises(OSError, match="^--upload-repo me/mine: not logged in to the Hub; run hf auth login"):
        convert(source, tmp_path / "out", upload_repo="me/mine")
    assert not (tmp_path / "out").exists()


def test_an_upload_that_cannot_succeed_is_told_before_the_work(source: Path, tmp_path: Path, capsys) -> None:
    """No token, or, as in these tests, no network."""
    failure(capsys, "--hf-path", source, "--mlx-path", tmp_path / "out", "--upload-repo", "me/llama3v")
    assert "repo" in failure(capsys, "--hf-path", source, "--mlx-path", tmp_path / "out", "--upload-repo", "a/b/c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["whoami", "upload_folder"])
def test_a_connection_lost_in_an_upload(source: Path, tmp_path: Path, monkeypatch, capsys, when: str) -> None:
    def answer(self, *args, **kwargs) -> str:
        return "https://huggingface.co/me/x"

    def fail(self, *args, **kwargs) -> None:
        raise HTTPError("connection refused")

    methods = {name: fail if name == when else answer for name in ("whoami", "create_repo", "upload_folder")}
    monkeypatch.setattr("huggingface_hub.HfApi", type("Api", (), methods))
    with pytest.raises(SystemExit):
        main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "--upload-repo", "me/x"])
    error = capsys.readouterr().err
    complete = when == "upload_folder"
    assert ("is complete, but was not uploaded to me/x: connection refused" in error) == complete
    assert "Error" not in error and (tmp_path / "out").exists() == complete


def test_an_empty_name_to_upload_to(source: Path, tmp_path: Path, capsys) -> None:
    assert "epo" in failure(capsys, "--hf-path", source, "--mlx-path", tmp_path / "out", "--upload-repo", "")


# Verified


@pytest.mark.parametrize("name", ["source", "4-bit", "mixed", "mxfp4"])
def test_layer_by_layer_is_the_model(source: Path, converted: dict[str, Path], picture: Path, name: str) -> None:
    folder = {"source": source, **converted}[name]
    model, processor = load(folder)
    prompt = processor.encode(QUESTION, [picture])
    ids = mx.array(prompt.ids)
    logits = model(ids[None], input_embeddings=model.embed_inputs(ids, prompt.images)[None])[0, -1]
    expected = (logits - mx.logsumexp(logits)).astype(mx.float32)
    # MLX looks embeddings in its floating modes up in bfloat16, and so does the loaded model.
    allowed = max(tolerance(logits.dtype, mx.abs(expected).max().item()), 1e-2 if name == "mxfp4" else 0)
    assert mx.abs(first_token_logprobs(folder, picture, QUESTION) - expected).max().item() <= allowed


def test_verify_measures_the_loss(source: Path, converted: dict[str, Path], picture: Path) -> None:
    reports = {name: verify(source, converted[name], picture) for name in ("float32", "8-bit", "4-bit", "mixed")}
    config = read_config(source)
    layers, vision_layers = (config[part]["num_hidden_layers"] for part in ("text_config", "vision_config"))
    counts = {kind: loss.count for kind, loss in reports["4-bit"].tensors.items()}
    assert counts == {
        **{"embed_tokens": 1, "self_attn": 4 * layers, "mlp": 3 * layers, "norms": 2 * layers + 1, "lm_head": 1},
        **{"vision_tower": 5 + 16 * vision_layers, "projector": 17},
    }
    assert all(loss.relative_error == 0 for loss in reports["float32"].tensors.values())
    assert abs(reports["float32"].kl) < 1e-9 and reports["float32"].agrees
    for kind in ("embed_tokens", "self_attn", "mlp"):
        errors = [reports[name].tensors[kind].relative_error for name in ("8-bit", "4-bit", "mixed")]
        assert 0 < errors[0] < 0.01 < errors[1] < 0.1 < errors[2]
        assert errors[1] <= reports["4-bit"].tensors[kind].largest
    for kind in ("norms", "vision_tower", "projector"):
        assert reports["4-bit"].tensors[kind].relative_error == 0
    assert 0 < reports["8-bit"].kl < reports["4-bit"].kl < reports["mixed"].kl


def test_verify_agrees_with_numpy(source: Path, converted: dict[str, Path], picture: Path) -> None:
    before = np.array(mx.load(str(source / SHARD))["llm.lm_head.weight"]).astype(np.float64)
    after, _ = load(converted["4-bit"])
    head = after.language_model.lm_head
    after = np.array(mx.dequantize(head.weight, head.scales, head.biases, 64, 4)).astype(np.float64)
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert verify(source, converted["4-bit"], picture).tensors["lm_head"].relative_error == pytest.approx(
        expected, 1e-4
    )


def test_verify_on_the_command_line(
    source: Path, converted: dict[str, Path], picture: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """After a conversion, or of one that exists; on the first of the bundled images."""
    monkeypatch.setattr("llama3v_mlx.demo.IMAGES", picture.parent)
    flags = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "\x1b[2J" / "out"), "--verify"]
    main([*flags, "-q"])
    first = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r".*/\\x1b\[2J/out: 0\.00\d GB in 1 shard, [\d.]+ bits per weight, [\d.]+ s, peak memory [\d.]+ GB", first[0]
    )
    assert re.fullmatch(r"first token after 'What is this image\?' about noise\.png: KL 0\.0\d+ nats, .*", first[-2])
    assert re.fullmatch(r"verified in [\d.]+ s, peak memory [\d.]+ GB", first[-1])
    main(flags)
    second = capsys.readouterr().out.splitlines()
    assert second[:-1] == first[1:-1]
    assert "or --verify alone" in failure(capsys, *flags, "-q")


def test_verify_refuses_what_was_not_converted_from_the_source(
    converted: dict[str, Path], damaged: Path, tmp_path: Path, picture: Path
) -> None:
    layers = read_config(damaged)["text_config"]["num_hidden_layers"] - 1
    edit_json(damaged / "config.json", num_hidden_layers=layers)
    rewrite(damaged, lambda ts: without(ts, f"llm.model.layers.{layers}."))
    with pytest.raises(CheckpointError, match="was not converted from"):
        verify(damaged, converted["4-bit"], picture)

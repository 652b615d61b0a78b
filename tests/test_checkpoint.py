"""Damaged and hostile checkpoints: one line that names the file, and nothing outside the folder is opened."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from llama3v_mlx.checkpoint import CheckpointError, read_config, read_tensors
from llama3v_mlx.config import sampling_config
from llama3v_mlx.convert import convert
from llama3v_mlx.demo import SIGLIP
from llama3v_mlx.features.encoder import TextEncoder, load_encoder
from llama3v_mlx.loading import load_model
from llama3v_mlx.tokenizer import load_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def converted(tiny: Path, tmp_path_factory) -> Path:
    convert(tiny, tmp_path_factory.mktemp("converted") / "4bit", quantize=True)
    return next(tmp_path_factory.getbasetemp().glob("converted*/4bit"))


def change(path: Path, *keys: str, value: Any = None) -> None:
    """Set a value in a JSON file; None removes its key."""
    whole = here = json.loads(path.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        here = here[key]
    if value is None:
        del here[keys[-1]]
    else:
        here[keys[-1]] = value
    path.write_text(json.dumps(whole), encoding="utf-8")


def refused(path: Path, action: Callable[[], object], saying: str) -> None:
    with pytest.raises(CheckpointError) as error:
        action()
    assert str(path) in str(error.value) and saying in str(error.value)


def tensor_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("value", "saying"),
    [
        ([], "weight_map is []"),
        ({"a": 1}, "1 for a"),
        ({"a": "b.safetensors", "c": None}, "None for c"),
        ({"a": ["x"]}, "['x'] for a"),
        ({"a": "../outside/model.safetensors"}, "name of a file"),
        ({"a": "sub/model.safetensors"}, "name of a file"),
        ({"a": ".."}, "missing shard"),
    ],
)
def test_an_index_names_files_of_the_folder(folder: Path, value: Any, saying: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    shutil.copy(tensor_file(folder), outside / "model.safetensors")
    change(folder / INDEX, "weight_map", value=value)
    refused(folder, lambda: read_tensors(folder), saying)


def test_an_index_with_an_absolute_path(folder: Path) -> None:
    elsewhere = shutil.copy(tensor_file(folder), folder.parent)
    change(folder / INDEX, "weight_map", value={"a": str(elsewhere)})
    refused(folder, lambda: read_tensors(folder), "name of a file")


def read_all(folder: Path) -> None:
    config = read_config(folder)
    load_model(folder, config)
    load_tokenizer(folder, config)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX, "*.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_files_outside_the_folder_are_not_read(folder: Path, name: str, kind: str) -> None:
    path = next(folder.glob(name))
    shutil.move(path, folder.parent / path.name)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(folder.parent / path.name if kind == "link" else "/dev/zero")
    says = "outside its folder" if kind == "link" else "missing shard" if name[0] == "*" else "not a regular file"
    refused(folder, lambda: read_all(folder), says)


def test_links_of_the_hub_cache_are_read(folder: Path) -> None:
    """They lead from snapshots/REVISION to blobs/DIGEST; links inside a folder and to a folder are read as well."""
    cache = folder.parent / "models--owner--name"
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(folder, snapshot)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(cache / "blobs" / str(i))
        path.symlink_to(f"../../blobs/{i}")
    read_all(snapshot)
    (folder / "config.json").rename(folder / "other.json")
    (folder / "config.json").symlink_to("other.json")
    (folder.parent / "linked").symlink_to(folder)
    read_all(folder.parent / "linked")


@pytest.mark.parametrize(
    ("keys", "value", "saying"),
    [
        (("query_num",), "4", "query_num is '4'"),
        (("query_num",), 2**31, "query_num"),
        (("patch_size",), 0, "patch_size is 0"),
        (("patch_size",), 2.5, "patch_size is 2.5"),
        (("slice_config",), [1], "slice_config is [1]"),
        (("slice_config", "max_slice_nums"), -1, "slice_config.max_slice_nums is -1"),
        (("vision_config",), "text", "vision_config is 'text'"),
        (("vision_config", "hidden_size"), [32], "vision_config.hidden_size is [32]"),
        (("vision_config", "num_attention_heads"), 0, "vision_config.num_attention_heads is 0"),
        (("vision_config", "num_attention_heads"), 3, "which 3 heads do not divide"),
        (("vision_config", "num_hidden_layers"), 10**9, "vision_config.num_hidden_layers"),
        (("vision_config", "layer_norm_eps"), "1e-6", "vision_config.layer_norm_eps"),
        (("num_hidden_layers",), 10**9, "num_hidden_layers"),
        (("max_position_embeddings",), None, "lacks max_position_embeddings"),
        (("slice_mode",), "no", "slice_mode is 'no'; it must be true or false"),
        (("rms_norm_eps",), 2**63, "rms_norm_eps"),
    ],
)
def test_values_of_a_released_config(folder: Path, keys: tuple[str, ...], value: Any, saying: str) -> None:
    change(folder / "config.json", *keys, value=value)
    refused(folder / "config.json", lambda: read_config(folder), saying)


@pytest.mark.parametrize(
    ("keys", "value", "saying"),
    [
        (("vision_config",), [], "vision_config is []"),
        (("vision_config", "patch_size"), 7, "they must be equal"),
        (("projector_config", "num_queries"), None, "projector_config lacks num_queries"),
        (("projector_config", "hidden_size"), 32, "they must be equal"),
        (("projector_config", "projector_type"), ["resampler"], "projector_type"),
        (("projector_config", "num_attention_heads"), -2, "num_attention_heads is -2"),
        (("image_config", "scale_resolution"), 10**9, "image_config.scale_resolution"),
        (("image_config", "square"), "yes", "image_config.square"),
        (("prompt_tokens", "image"), 10**6, "prompt_tokens.image is 1000000"),
        (("prompt_tokens", "newline"), None, "prompt_tokens lacks newline"),
        (("bos_token_id",), "text", "bos_token_id is 'text'"),
        (("quantization", "bits"), "4", "quantization.bits is '4'"),
        (("quantization", "group_size"), 0, "quantization.group_size is 0"),
        (("quantization", "language_model.lm_head"), 5, "quantization.language_model.lm_head is 5"),
    ],
)
def test_values_of_our_config(converted: Path, tmp_path, keys: tuple[str, ...], value: Any, saying: str) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "checkpoint"))
    change(folder / "config.json", *keys, value=value)
    refused(folder / "config.json", lambda: read_config(folder), saying)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantized_by_another_program(folder: Path, method: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(CheckpointError, match="is quantized already, by another program"):
        read_config(folder)


def test_a_tensor_of_another_type(folder: Path) -> None:
    path = tensor_file(folder)
    tensors = mx.load(str(path))
    name = next(name for name in tensors if "down_proj" in name)
    mx.save_safetensors(str(path), {**tensors, name: mx.zeros(tensors[name].shape, mx.int32)})
    refused(folder, lambda: load_model(folder, read_config(folder)), "int32 instead of")


def test_a_header_that_only_mlx_rejects(folder: Path) -> None:
    path = tensor_file(folder)
    header = json.dumps({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(path, lambda: read_tensors(folder), "F64")


def test_ids_beyond_the_vocabulary(folder: Path) -> None:
    """MLX would read beyond the embeddings."""
    config, tokenizer = read_config(folder), json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    last = {**tokenizer["added_tokens"][-1], "id": config["text_config"]["vocab_size"], "content": "<more>"}
    tokenizer["added_tokens"].append(last)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(folder / "tokenizer.json", lambda: load_tokenizer(folder, config), "<more>")


def test_a_tokenizer_saved_with_padding_and_truncation(folder: Path) -> None:
    expected = read_config(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "padding": padding, "truncation": truncation}))
    assert read_config(folder) == expected
    ids = load_tokenizer(folder, expected).encode("one two three four five", add_special_tokens=False)
    assert len(ids) > 4 and ids[-1] != 0


def test_special_tokens(folder: Path) -> None:
    change(folder / "tokenizer_config.json", "bos_token", value={"type": "AddedToken"})
    refused(folder / "tokenizer_config.json", lambda: load_tokenizer(folder, read_config(folder)), "bos_token is None")


def test_a_tokenizer_without_the_prompt_format(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|start_header_id|>", "<|start|>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    refused(folder / "tokenizer.json", lambda: load_tokenizer(folder, read_config(folder)), "<|start_header_id|>")


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("config.json", ("vision_config",), [1]),
        ("config.json", ("vision_config", "hidden_size"), "32"),
        ("config.json", ("vision_config", "num_attention_heads"), 0),
        ("config.json", ("text_config", "vocab_size"), 2**40),
        ("config.json", ("text_config", "num_attention_heads"), 0),
        ("preprocessor_config.json", ("resample",), 99),
        ("preprocessor_config.json", ("resample",), "bicubic"),
    ],
)
def test_values_of_a_siglip(siglip: Path, tmp_path: Path, file: str, keys: tuple[str, ...], value: Any) -> None:
    folder = Path(shutil.copytree(siglip, tmp_path / "siglip"))
    change(folder / file, *keys, value=value)
    refused(folder / file, lambda: load_encoder(folder), keys[-1])


def test_words_beyond_the_text_tower(siglip: Path, tmp_path: Path) -> None:
    """The bundled tokenizer has more pieces than the small tower has rows."""
    folder = Path(shutil.copytree(siglip, tmp_path / "siglip"))
    change(folder / "config.json", "text_config", "vocab_size", value=9)
    tensors = mx.load(str(folder / "model.safetensors"))
    name = "text_model.embeddings.token_embedding.weight"
    mx.save_safetensors(str(folder / "model.safetensors"), {**tensors, name: tensors[name][:9]})
    shutil.copy(SIGLIP / "spiece.model", folder)
    refused(folder / "spiece.model", lambda: TextEncoder(folder, load_encoder(folder).model), "pieces")


def test_sampling_that_mlx_cannot_compute() -> None:
    refused(Path("x"), lambda: sampling_config(Path("x"), {"repetition_penalty": 2**63}), "repetition_penalty")

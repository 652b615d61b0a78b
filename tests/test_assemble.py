"""A new model of two published ones, and the article's projector in it."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from llama3v_mlx import load, stream_generate
from llama3v_mlx.checkpoint import read_tensors
from llama3v_mlx.convert import main
from llama3v_mlx.demo import CHECKPOINT, SIGLIP


def join(llama: Path, out: Path, *args: str) -> Path:
    main(["--vision", str(SIGLIP), "--llm", str(llama), "--mlx-path", str(out), *args])
    return out


@pytest.mark.parametrize("projector, tokens, marks", [("resampler", 96, 2), ("self-attention", 64, 0)])
def test_both_projectors_answer(llama: Path, tmp_path: Path, projector: str, tokens: int, marks: int) -> None:
    model, processor = load(join(llama, tmp_path / "new", "--projector", projector))
    image = Image.new("RGB", (300, 90), "red")
    bare = processor.encode("What is this image?").ids
    prompt = processor.encode("What is this image?", [image])
    assert len(prompt.ids) == len(bare) + tokens + marks + 1  # and a newline
    assert [tile.shape for tile in prompt.images[0].tiles] == [(112, 112, 3)]
    response = list(stream_generate(model, processor, "What is this image?", image, temperature=0, max_tokens=3))[-1]
    assert (response.num_tiles, response.visual_tokens) == (1, tokens)
    again, processor = load(tmp_path / "new")
    other = list(stream_generate(again, processor, "What is this image?", image, temperature=0, max_tokens=3))[-1]
    assert other.token == response.token

    assert np.array(model.encode_image(prompt.images)[0]).std() > 0.01
    rows = np.array(model.embed_inputs(mx.array(prompt.ids), prompt.images))
    start = prompt.ids.index(processor.prompt_tokens.image)
    visual = rows[start + marks // 2 :][:tokens]
    np.testing.assert_allclose(visual, np.array(model.encode_image(prompt.images)[0]), rtol=1e-5, atol=1e-6)


def test_the_parts_are_untouched(llama: Path, tmp_path: Path) -> None:
    new = read_tensors(join(llama, tmp_path / "new"))
    assert not any("head." in name and "vision" in name for name in new)
    for name, tensor in read_tensors(llama).items():
        assert mx.array_equal(new[f"language_model.{name}"], tensor), name
    for name, tensor in read_tensors(SIGLIP).items():
        if name.startswith("vision_model.encoder"):
            assert mx.array_equal(new[name.replace("vision_model", "vision_tower")], tensor), name
    same, other = (
        read_tensors(join(llama, tmp_path / name, "--seed", seed)) for name, seed in (("same", "0"), ("other", "1"))
    )
    assert mx.array_equal(new["projector.query"], same["projector.query"])
    assert not mx.array_equal(new["projector.query"], other["projector.query"])


def test_the_llama_of_a_llama3v(llama: Path, tmp_path: Path) -> None:
    """The bundled demo's, in the released layout, and a conversion's are the same as Meta's."""
    main(["--hf-path", str(CHECKPOINT), "--mlx-path", str(tmp_path / "converted")])
    expected = read_tensors(join(llama, tmp_path / "new"))
    for source in (CHECKPOINT, tmp_path / "converted"):
        found = read_tensors(join(source, tmp_path / f"of-{source.name}"))
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(found[name], tensor) for name, tensor in expected.items())


def test_quantized_at_once(llama: Path, tmp_path: Path) -> None:
    model, _ = load(join(llama, tmp_path / "new", "-q", "--q-group-size", "32", "--projector", "self-attention"))
    assert "scales" in model.language_model.model.layers[0].mlp.up_proj
    assert "scales" not in model.projector.linear


def test_errors(llama: Path, tmp_path: Path, capsys) -> None:
    def error(code: int, *args: str | Path) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, args), "--mlx-path", str(tmp_path / "new")])
        assert stop.value.code == code and not (tmp_path / "new").exists()
        return capsys.readouterr().err

    assert "give --hf-path, or both" in error(2, "--vision", SIGLIP)
    assert "give --hf-path, or both" in error(2, "--hf-path", CHECKPOINT, "--vision", SIGLIP, "--llm", llama)
    assert "which a new model does not have" in error(2, "--vision", SIGLIP, "--llm", llama, "--verify")
    assert "not SigLIP's" in error(1, "--vision", llama, "--llm", llama)
    assert "--llm takes a Llama 3" in error(1, "--vision", SIGLIP, "--llm", SIGLIP)
    tokenizer = json.loads((llama / "tokenizer.json").read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("reserved_special_token_110", "python_tag")
    copy = tmp_path / "llama"
    copy.mkdir()
    for path in llama.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "<image> needs the reserved id" in error(1, "--vision", SIGLIP, "--llm", copy)

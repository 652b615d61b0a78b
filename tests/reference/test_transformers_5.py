"""Llamas saved by transformers 5, with each rope type: logits match torch's after conversion and assembly."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from llama3v_mlx import load
from llama3v_mlx.checkpoint import CONFIG, INDEX, read_config, read_tensors
from llama3v_mlx.convert import convert
from llama3v_mlx.demo import CHECKPOINT, SIGLIP
from llama3v_mlx.tokenizer import TOKENIZER

from .parity import relative_error

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference

LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32.0, "beta_slow": 1.0},
}


@pytest.mark.parametrize("kind, head_dim", [*((kind, 64) for kind in ROPES), ("default", 32)])
def test_logits_of_a_saved_llama(tmp_path: Path, llama: Path, kind: str, head_dim: int) -> None:
    """Measured 6e-7, a different order of float32 sums; mlx-lm's default rope_theta of 10000 differs by 0.03."""
    torch.manual_seed(0)
    rope = {"rope_type": kind, "rope_theta": 500000.0, **ROPES[kind]}
    config = transformers.LlamaConfig(**LLAMA, head_dim=head_dim, rope_parameters=rope)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.randint(0, 480, (1, 900))
    with torch.no_grad():
        expected = reference(ids).logits

    shutil.copyfile(llama / TOKENIZER, tmp_path / "saved" / TOKENIZER)
    convert(mlx_path=tmp_path / "joined", vision=SIGLIP, llm=tmp_path / "saved")
    write_released(tmp_path / "saved", tmp_path / "released")
    convert(tmp_path / "released", tmp_path / "converted")
    assert read_config(tmp_path / "joined")["dtype"] == read_config(tmp_path / "converted")["dtype"] == "bfloat16"
    for name in ("joined", "released", "converted"):
        model, _ = load(tmp_path / name, dtype=mx.float32)
        assert relative_error(model(mx.array(ids.numpy())), expected) < 1e-5, name
    args = model.language_model.args
    for layer in model.layers:
        layer.self_attn.rope = initialize_rope(
            head_dim, 10000.0, False, args.rope_scaling, args.max_position_embeddings
        )
    assert relative_error(model(mx.array(ids.numpy())), expected) > 0.01


def write_released(saved: Path, folder: Path) -> None:
    """Write a released checkpoint as transformers 5 would: the demo with the saved Llama instead of its own."""
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / CONFIG).read_text())
    ours = {key: config[key] for key in ("vision_config", "slice_config", "query_num", "image_size", "patch_size")}
    ours |= {"model_type": "llama3v", "slice_mode": True}
    (folder / CONFIG).write_text(json.dumps({**json.loads((saved / CONFIG).read_text()), **ours}))
    tensors = {n: t for n, t in read_tensors(CHECKPOINT).items() if not n.startswith("llm.")}
    tensors |= {f"llm.{name}": tensor for name, tensor in read_tensors(saved).items()}
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)

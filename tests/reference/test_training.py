"""Loss and gradients of a training step from stored patch features, against torch and transformers."""

import hashlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from llama3v_mlx.features.store import Features, FeatureStore, StoreInfo
from llama3v_mlx.features.writer import FeatureWriter
from llama3v_mlx.models.llama3v import Model, ModelArgs
from llama3v_mlx.training.batch import collate
from llama3v_mlx.training.data import Dialogue
from llama3v_mlx.training.trainer import answer_loss

from .parity import below, relative_error, released
from .test_projectors import LAYOUT, draw, named_as_ours, resample, sanitized, self_attention

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference

D, VISION, VOCAB, IMAGE = 256, 48, 300, 299
GRID = (3, 4)  # rows and columns of patches
LLAMA = {
    "hidden_size": D,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def make_projector(kind: str):
    """Return torch's parameters by name, the projector as a function, and the conversion of tensors to ours."""
    if kind == "self-attention":
        module = self_attention(VISION, D)
        return dict(module.named_parameters()), module, named_as_ours
    sizes = {4096: D, 3 * 4096: 3 * D, 1152: VISION, 96: 5}
    generator = torch.Generator().manual_seed(0)
    weights = {n: draw(n, tuple(sizes[k] for k in shape), generator) for n, shape in LAYOUT.items()}
    for tensor in weights.values():
        tensor.requires_grad_()
    ours = lambda tensors: dict(below(sanitized(tensors, "resampler"), "projector"))  # noqa: E731
    return weights, lambda features: resample(weights, features, *GRID), ours


@pytest.mark.parametrize("kind", ["resampler", "self-attention"])
def test_loss_and_gradients(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, rope_parameters=rope))
    weights, project, as_ours = make_projector(kind)
    queries = 5 if kind == "resampler" else GRID[0] * GRID[1]

    rng = np.random.default_rng(0)
    features = [rng.standard_normal((GRID[0] * GRID[1], VISION), dtype=np.float32) for _ in range(3)]
    keys = [hashlib.sha256(x.tobytes()).digest() for x in features]
    store = FeatureStore.create(tmp_path, StoreInfo("", "patch", "", VISION, "float32"))
    with FeatureWriter(store) as writer:
        writer.add([(key, Features(mx.array(x), GRID[::-1])) for key, x in zip(keys, features, strict=True)])
    images = [(0,), (2, 1), ()]  # images of three rows of different lengths
    dialogues, total = [], 0.0
    tokens = project(torch.from_numpy(np.stack(features)))
    for shown in images:
        text = rng.integers(0, IMAGE, (4, 7))
        ids = np.concatenate([np.r_[text[i], [IMAGE] * queries] if i < len(shown) else text[i] for i in range(4)])
        answers = np.arange(len(ids)) >= len(ids) - rng.integers(3, 12)
        dialogues.append(Dialogue(ids.astype(np.int32), answers, tuple(keys[i] for i in shown)))
        rows = llama.get_input_embeddings()(torch.from_numpy(ids)).clone()
        if shown:
            rows[torch.from_numpy(ids == IMAGE)] = torch.cat([tokens[i] for i in shown])
        logits = llama(inputs_embeds=rows[None]).logits[0]
        places = torch.from_numpy(np.flatnonzero(answers))
        total += torch.nn.functional.cross_entropy(logits[places - 1], torch.from_numpy(ids)[places], reduction="sum")
    total.backward()

    model = Model(
        ModelArgs(
            model_type="llama3v",
            text_config=LLAMA | {"model_type": "llama", "rope_theta": 10000.0},
            vision_config={"num_hidden_layers": 1},
            projector_config={
                "hidden_size": D,
                "vision_hidden_size": VISION,
                "num_queries": queries,
                "num_attention_heads": D // 128,
                "projector_type": kind,
            },
            prompt_tokens={"image": IMAGE},
        )
    )
    model.pop("vision_tower")
    mine = as_ours({name: tensor.detach() for name, tensor in weights.items()})
    model.projector.load_weights(list(mine.items()), strict=True)
    with torch.no_grad():
        tensors = Model.sanitize(released(llama, "llm"))
    model.language_model.load_weights(below(tensors, "language_model"), strict=True)

    batch = collate(dialogues, store, IMAGE, queries)
    loss, grads = nn.value_and_grad(model, lambda: answer_loss(model, batch))()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    found = dict(tree_flatten(grads["projector"]))
    expected = as_ours({name: tensor.grad for name, tensor in weights.items()})
    assert found.keys() == expected.keys()
    # The keys' biases do not affect softmax: their gradients are zero up to rounding.
    for name in found.keys() - {name for name in found if name.endswith("k_proj.bias")}:
        assert relative_error(found[name], expected[name]) <= 1e-4, name
    theirs = {f"language_model.{name}": p.grad for name, p in llama.named_parameters()}
    for name, grad in tree_flatten({"language_model": grads["language_model"]}):
        assert relative_error(grad, theirs[name]) <= 1e-4, name

"""Llama-3 at the released width, with visual tokens in its input embeddings, against transformers' Llama."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from llama3v_mlx.models.llama3v import Model, ModelArgs

from .parity import below, relative_error, released

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference

D, VOCAB, QUERIES, STEPS = 4096, 2048, 96, 64
UNK, IMAGE_START, IMAGE_END = 2000, 2001, 2002
LLAMA = {
    "hidden_size": D,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, rope_parameters=rope)).eval()
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return llama


@pytest.fixture(scope="module")
def model(reference: torch.nn.Module) -> Model:
    """Our model with only Llama's weights loaded; tower and projector are lazy and never evaluated."""
    model = Model(
        ModelArgs(
            model_type="llama3v",
            text_config=LLAMA | {"model_type": "llama", "rope_theta": 500000.0},
            vision_config={"num_hidden_layers": 1},
            projector_config={"hidden_size": D, "num_queries": QUERIES},
            prompt_tokens={
                "image": UNK,
                "image_start": IMAGE_START,
                "image_end": IMAGE_END,
                "slice_start": 2003,
                "slice_end": 2004,
                "newline": 198,
            },
        )
    )
    weights = Model.sanitize(released(reference, "llm"))
    model.language_model.load_weights(below(weights, "language_model"), strict=True)
    return model


@pytest.fixture(scope="module")
def prompt() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Text ids before and after an image, and the image's visual tokens (QUERIES, D)."""
    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 2000, 5), rng.integers(0, 2000, 24)
    # On the scale of the embedding table.
    return before, after, 0.02 * rng.standard_normal((QUERIES, D), dtype=np.float32)


def splice_torch(reference: torch.nn.Module, prompt: tuple[np.ndarray, ...]) -> torch.Tensor:
    before, after, visual = prompt
    ids = torch.tensor([*before, IMAGE_START, *[UNK] * QUERIES, IMAGE_END, *after])
    embeddings = reference.get_input_embeddings()(ids)
    embeddings[ids == UNK] = torch.from_numpy(visual)
    return embeddings[None]


def splice_mlx(model: Model, prompt: tuple[np.ndarray, ...]) -> tuple[mx.array, mx.array]:
    before, after, visual = prompt
    ids = mx.array([*before.tolist(), *[UNK] * (QUERIES + 2), *after.tolist()])
    return ids, model.splice(ids, [None], [mx.array(visual)])


def greedy_torch(reference: torch.nn.Module, embeddings: torch.Tensor) -> Iterator[tuple[int, float]]:
    """Yield greedy tokens and the margin of their logits over the second best."""
    step = reference(inputs_embeds=embeddings, use_cache=True)
    while True:
        best = step.logits[0, -1].topk(2)
        token = best.indices[:1]
        yield token.item(), (best.values[0] - best.values[1]).item()
        step = reference(input_ids=token[None], past_key_values=step.past_key_values, use_cache=True)


def test_logits(reference: torch.nn.Module, model: Model, prompt: tuple[np.ndarray, ...]) -> None:
    with torch.no_grad():
        expected = reference(inputs_embeds=splice_torch(reference, prompt)).logits
    ids, embeddings = splice_mlx(model, prompt)
    logits = model(ids[None], input_embeddings=embeddings[None])
    # Measured 4e-6: a different order of float32 sums.
    assert relative_error(logits, expected) <= 1e-4


def test_greedy_tokens(reference: torch.nn.Module, model: Model, prompt: tuple[np.ndarray, ...]) -> None:
    with torch.no_grad():
        steps = greedy_torch(reference, splice_torch(reference, prompt))
        expected, leads = zip(*(next(steps) for _ in range(STEPS)), strict=True)
    # Logits differ by at most 3e-5, so a margin of 1e-3 is safe; and the tokens must not be a short loop.
    assert min(leads) > 1e-3
    assert len(set(expected)) > STEPS // 2
    ids, embeddings = splice_mlx(model, prompt)
    tokens = [token for token, _ in generate_step(ids, model, max_tokens=STEPS, input_embeddings=embeddings)]
    assert tokens == list(expected)

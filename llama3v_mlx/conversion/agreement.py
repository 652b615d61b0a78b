"""Compare a converted checkpoint with its source on prompts: KL divergence and top-1 agreement at answers' tokens.

Both are run one layer at a time, dequantized and in float32, as in `verify`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask
from tqdm import tqdm

from ..loading import build_model
from .rows import Row, embed_rows
from .shard_writer import row_slices
from .verify import Loss, Tensor, Weights, compare_tensors, table

POSITIONS = 256  # whose logits are in memory at once


@dataclass(frozen=True)
class Agreement:
    """Comparison of a conversion with its source on prompts."""

    tensors: dict[str, Loss]  # by kind
    prompts: int
    tokens: int  # predicted ones that were compared
    kl: float  # mean KL(source || result) of a token, in nats
    top1: float  # share of tokens with the same most likely one

    @property
    def summary(self) -> str:
        some = f"{self.prompts} held-out prompt{'s' if self.prompts > 1 else ''}"
        return f"{some}, {self.tokens} tokens: KL {self.kl:.6f} nats, top-1 {self.top1:.2%}"

    def __str__(self) -> str:
        return f"{table(self.tensors)}\n{self.summary}"


def verify_rows(source: Path, result: Path, rows: Sequence[Row]) -> Agreement:
    """Compare a converted checkpoint with its source on prompts, with the answers given.

    Args:
        source: folder of the source checkpoint.
        result: folder of the conversion, quantized or not.
        rows: prompts with images, and answers or not.

    Raises:
        CheckpointError: if one is unusable, or is not a conversion of the other.
    """
    total = 2 * sum(Weights(folder).num_bytes for folder in (source, result))
    with tqdm(total=total, desc="Verifying", unit="B", unit_scale=True, disable=None) as bar:
        tensors = compare_tensors(source, result, bar.update)
        (x, x_head), (y, y_head) = (_final_states(folder, rows, bar.update) for folder in (source, result))
    kl = agreeing = 0.0
    for start in range(0, len(x), POSITIONS):
        part = slice(start, start + POSITIONS)
        before, after = _logprobs(x[part], x_head), _logprobs(y[part], y_head)
        kl += (mx.exp(before) * (before - after)).sum().item()
        agreeing += (before.argmax(axis=-1) == after.argmax(axis=-1)).sum().item()
    return Agreement(tensors, len(rows), len(x), max(kl / len(x), 0.0), agreeing / len(x))


def _final_states(folder: Path, rows: Sequence[Row], progress: Callable[[int], object]) -> tuple[mx.array, Tensor]:
    """Inputs (positions, hidden_size) of the head at the rows' positions, and the head."""
    weights = Weights(folder, progress)
    model = build_model(weights.config)  # lazy: what is not filled below takes no memory
    layers, norm = model.layers, model.language_model.model.norm
    embedding = weights.take("language_model.model.embed_tokens.weight")
    (xs,) = embed_rows(weights, model, rows, [embedding.rows])
    del model
    path = "language_model.model.layers"
    for i in range(len(layers)):
        weights.fill(layers[0], f"{path}.{i}")
        for j, x in enumerate(xs):
            xs[j] = layers[0](x, create_attention_mask(x, None))
            mx.eval(xs[j])
    weights.fill(norm, "language_model.model.norm")
    states = mx.concatenate([norm(x[0, mx.array(row.positions)]) for x, row in zip(xs, rows, strict=True)])
    mx.eval(states)
    is_tied = "language_model.lm_head.weight" not in weights
    return states, embedding if is_tied else weights.take("language_model.lm_head.weight")


def _logprobs(states: mx.array, head: Tensor) -> mx.array:
    """Log-probabilities (positions, vocab_size)."""
    logits = []
    for rows in row_slices(head.shape, mx.float32.size):
        logits.append(states @ head.rows(rows).T)
        mx.eval(logits)
    logits = mx.concatenate(logits, axis=-1)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

"""A training step: the loss of a batch, its gradients, and an update that is skipped if they are not finite.

Neither tower nor images are needed: the projector is trained on patch features, Llama on visual tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..models.llama3v import Model
from .batch import Batch

MAX_GRAD_NORM = 1.0


def _project(projector: nn.Module, features: mx.array, grid: tuple[int, int]) -> mx.array:
    """Patch features (tiles, h·w, width) to visual tokens (tiles·num_queries, hidden_size)."""
    _, weight = tree_flatten(projector.parameters())[0]
    tokens = projector(features.astype(weight.dtype), grid)
    return tokens.reshape(-1, tokens.shape[-1])


def answer_logits(
    llama: nn.Module, ids: mx.array, visual: list, source: mx.array | None, positions: mx.array
) -> mx.array:
    """Logits at answer positions.

    Args:
        llama: mlx-lm's model.
        ids: int32 (B, L).
        visual: visual tokens, (M, hidden_size) in all.
        source: int32 (B·L,): index of the token's embedding, or B·L + visual token; None: no images.
        positions: int32 (n,): positions to predict from, in B·L.

    Returns:
        Logits (n, vocab_size).
    """
    h = llama.model.embed_tokens(ids)
    if source is not None:
        B, L, D = h.shape
        h = mx.concatenate([h.reshape(B * L, D), *(x.astype(h.dtype) for x in visual)])
        h = h[source].reshape(B, L, D)
    h = llama.model(ids, input_embeddings=h)
    h = h.reshape(-1, h.shape[-1])[positions]
    return llama.model.embed_tokens.as_linear(h) if llama.args.tie_word_embeddings else llama.lm_head(h)


def answer_loss(model: Model, batch: Batch) -> mx.array:
    """Cross-entropy of the answers' tokens, summed, in nats."""
    visual = batch.visual
    if batch.grids:
        visual = [_project(model.projector, x, grid) for x, grid in zip(visual, batch.grids, strict=True)]
    logits = answer_logits(model.language_model, batch.ids, visual, batch.source, batch.positions)
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch.targets)
    return (losses * batch.weights).sum()


class TrainingError(ValueError):
    """Raised when training cannot continue."""


class Trainer:
    """Update a model's trainable parameters.

    Args:
        model: everything but the trained parameters is frozen.
        optimizer: initialized with the trained parameters, or with the state of an earlier run.
    """

    MOST_BAD_STEPS = 3  # in a row

    def __init__(self, model: Model, optimizer: optim.Optimizer):
        self.model, self.optimizer = model, optimizer
        self.group = mx.distributed.init()
        self.skipped = 0  # steps whose loss or gradients were not finite
        self.bad = 0  # of them, the latest in a row
        self._gradients: dict[tuple, Callable] = {}
        state = [model.state, optimizer.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def update(grads: dict) -> None:
            optimizer.update(model, grads)

        self._clip, self._update, self._state = mx.compile(_clip), update, state

    def step(self, batches: Sequence[Batch], total: int) -> float | None:
        """Update once, from the gradients of all ranks' batches together.

        Args:
            batches: this rank's share, accumulated one after another.
            total: answer tokens in all ranks' batches, over which the loss is averaged.

        Returns:
            The loss per answer token, in nats; None if it or the gradients are not finite, and nothing was updated.

        Raises:
            TrainingError: if that happens three times in a row.
        """
        scale = mx.array(self.group.size() / total)
        loss, grads = mx.array(0.0), None
        for batch in batches:
            part, new = self._gradient(batch.grids)(batch.arrays(), scale)
            loss, grads = loss + part, new if grads is None else tree_map(mx.add, grads, new)
            mx.eval(loss, grads)
        loss, grads = mx.distributed.all_sum(loss) / self.group.size(), nn.average_gradients(grads)
        for _, array in [("loss", loss), *tree_flatten(grads)]:
            mx.eval(array)  # one collective at a time: after a lost peer, MLX's ring never ends the next one
        grads, norm = self._clip(grads)
        if not np.isfinite(loss.item()) or not np.isfinite(norm.item()):
            self.skipped, self.bad = self.skipped + 1, self.bad + 1
            if self.bad == self.MOST_BAD_STEPS:
                raise TrainingError(
                    f"{self.bad} steps in a row had no finite loss; start again in another --out with a lower "
                    "--learning-rate"
                )
            return None
        self.bad = 0
        self._update(grads)
        mx.eval(self._state)
        return loss.item()

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """Summed loss and number of answer tokens of batches."""
        self.model.eval()
        loss = tokens = 0.0
        for batch in batches:
            loss += answer_loss(self.model, batch).item()
            tokens += batch.weights.sum().item()
        self.model.train()
        return loss, tokens

    def _gradient(self, grids: tuple) -> Callable:
        if grids not in self._gradients:
            state = [self.model.state, mx.random.state]

            @partial(mx.compile, inputs=state, outputs=state)
            def gradient(arrays: list, scale: mx.array) -> tuple[mx.array, dict]:
                batch = Batch(*arrays, grids)
                return nn.value_and_grad(self.model, lambda: scale * answer_loss(self.model, batch))()

            self._gradients[grids] = gradient
        return self._gradients[grids]


def _clip(grads: dict) -> tuple[dict, mx.array]:
    return optim.clip_grad_norm(grads, MAX_GRAD_NORM)

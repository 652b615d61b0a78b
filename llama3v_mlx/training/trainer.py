"""A training step: a batch of dialogues and stored features, its loss and gradients, and an update that may be refused.

Tower and images are never needed here: the projector learns from patch features, Llama from visual tokens.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..features.store import Features, FeatureStore
from ..models.llama3v import Model
from .data import Dialogue

LENGTH_STEP = 32  # lengths are rounded up to it, so that few shapes are compiled
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Batch:
    """B dialogues of at most L tokens with M visual tokens; n places where an answer's next token is to be foretold."""

    ids: mx.array  # int32 (B, L)
    source: mx.array | None  # int32 (B·L,): a token's own embedding, or visual token `source - B·L`; None: no images
    places: mx.array  # int32 (n,)
    targets: mx.array  # int32 (n,)
    weights: mx.array  # float32 (n,): 0 for those that only fill up
    visual: list[mx.array]  # (M, hidden_size) visual tokens, or (tiles, h·w, width) patch features, size by size
    grids: tuple[tuple[int, int], ...]  # the (h, w) of each of the patch features; none for visual tokens

    def arrays(self) -> list:
        """What a compiled function takes; `grids` is in the shape of things, for which it is compiled anew."""
        return [self.ids, self.source, self.places, self.targets, self.weights, self.visual]


def count_answers(dialogues: Sequence[Dialogue]) -> int:
    """Tokens that are learnt: of answers, with their end-of-turn tokens."""
    return sum(int(d.answers[1:].sum()) for d in dialogues)


def collate(
    dialogues: Sequence[Dialogue],
    store: FeatureStore,
    image_token: int,
    num_queries: int,
    length_step: int = LENGTH_STEP,
) -> Batch:
    """Dialogues as one batch, with their images' features from the store; lengths are rounded up to `length_step`."""
    B, L = len(dialogues), _round_up(max(len(d.ids) for d in dialogues), length_step)
    ids, wanted = np.zeros((B, L), np.int32), np.zeros((B, L), bool)
    is_image = np.zeros((B, L), bool)
    for i, d in enumerate(dialogues):
        ids[i, : len(d.ids)], wanted[i, : len(d.ids)] = d.ids, d.answers
        is_image[i, : len(d.ids)] = d.ids == image_token
    images = [store.get(sha256) for d in dialogues for sha256 in d.images]
    if store.info.kind == "visual-tokens":
        order, visual, grids = np.arange(is_image.sum()), [image.rows for image in images], ()
        visual = [mx.concatenate(visual)] if visual else []
    else:
        order, visual, grids = _patches_by_size(images, num_queries)
    source = None
    if images:
        source = np.arange(B * L, dtype=np.int32)
        source[is_image.reshape(-1)] = B * L + order
        source = mx.array(source)
    targets = np.flatnonzero(wanted[:, 1:].reshape(-1))
    rows, columns = np.divmod(targets, L - 1)
    places = rows * L + columns
    fill = _round_up(len(places), 2 * length_step) - len(places)
    weights = np.pad(np.ones(len(places), np.float32), (0, fill))
    places = np.pad(places, (0, fill)).astype(np.int32)
    targets = ids.reshape(-1)[places + 1]
    return Batch(mx.array(ids), source, mx.array(places), mx.array(targets), mx.array(weights), visual, grids)


def _patches_by_size(images: Sequence[Features], num_queries: int) -> tuple[np.ndarray, list[mx.array], tuple]:
    """Patch features stacked by tile size, and where each visual token, in the prompts' order, is among theirs."""
    tiles: dict[tuple[int, int], list[mx.array]] = {}
    places: list[tuple[tuple[int, int], int]] = []  # of every tile: its size, and its number among those
    for image in images:
        start = 0
        cells = [image.overview] + [image.cell] * (image.grid[0] * image.grid[1] if image.grid else 0)
        for w, h in cells:
            of_size = tiles.setdefault((h, w), [])
            places.append(((h, w), len(of_size)))
            of_size.append(image.rows[start : start + w * h])
            start += w * h
    first, total = {}, 0
    for size, of_size in tiles.items():
        first[size] = total
        total += len(of_size)
    numbers = np.array([first[size] + number for size, number in places], np.int64)
    order = (numbers[:, None] * num_queries + np.arange(num_queries)).reshape(-1)
    return order, [mx.stack(of_size) for of_size in tiles.values()], tuple(tiles)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _project(projector: nn.Module, features: mx.array, grid: tuple[int, int]) -> mx.array:
    """Patch features (tiles, h·w, width) to visual tokens (tiles·num_queries, hidden_size)."""
    _, weight = tree_flatten(projector.parameters())[0]
    tokens = projector(features.astype(weight.dtype), grid)
    return tokens.reshape(-1, tokens.shape[-1])


def answer_logits(llama: nn.Module, ids: mx.array, visual: list, source: mx.array | None, places: mx.array) -> mx.array:
    """What Llama foretells of the answers.

    Args:
        llama: mlx-lm's model.
        ids: int32 (B, L).
        visual: visual tokens, (M, hidden_size) in all.
        source: int32 (B·L,): a token's own embedding, or visual token `source - B·L`; None: no images.
        places: int32 (n,): whose next tokens are to be foretold.

    Returns:
        Logits (n, vocab_size).
    """
    h = llama.model.embed_tokens(ids)
    if source is not None:
        B, L, D = h.shape
        h = mx.concatenate([h.reshape(B * L, D), *(x.astype(h.dtype) for x in visual)])
        h = h[source].reshape(B, L, D)
    h = llama.model(ids, input_embeddings=h)
    h = h.reshape(-1, h.shape[-1])[places]
    return llama.model.embed_tokens.as_linear(h) if llama.args.tie_word_embeddings else llama.lm_head(h)


def answer_loss(model: Model, batch: Batch) -> mx.array:
    """The cross-entropy of the answers' tokens, summed, in nats."""
    visual = batch.visual
    if batch.grids:
        visual = [_project(model.projector, x, grid) for x, grid in zip(visual, batch.grids, strict=True)]
    logits = answer_logits(model.language_model, batch.ids, visual, batch.source, batch.places)
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), batch.targets)
    return (losses * batch.weights).sum()


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Trainer:
    """Takes the steps that change a model's trainable parameters.

    Args:
        model: what is trained is not frozen in it.
        optimizer: initialised with those parameters, or with the state of an earlier run.
    """

    MOST_BAD_STEPS = 3  # in a row

    def __init__(self, model: Model, optimizer: optim.Optimizer):
        self.model, self.optimizer = model, optimizer
        self.group = mx.distributed.init()
        self.skipped = 0  # steps whose loss or gradients were no finite numbers
        self._bad = 0
        self._gradients: dict[tuple, Callable] = {}
        state = [model.state, optimizer.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def update(grads: dict) -> None:
            optimizer.update(model, grads)

        self._clip, self._update, self._state = mx.compile(_clip), update, state

    def step(self, batches: Sequence[Batch], total: int) -> float | None:
        """One update from the gradients of all the ranks' batches together.

        Args:
            batches: this rank's share, one after the other.
            total: answer tokens in all ranks' batches, over which the loss is averaged.

        Returns:
            The loss per answer token, in nats; None if the step was not finite, and nothing was changed.

        Raises:
            TrainingError: if that happens three times in a row.
        """
        scale = mx.array(self.group.size() / total)
        loss, grads = mx.array(0.0), None
        for batch in batches:
            part, new = self._gradient(batch.grids)(batch.arrays(), scale)
            loss, grads = loss + part, new if grads is None else tree_map(mx.add, grads, new)
            mx.eval(loss, grads)
        grads, norm = self._clip(nn.average_gradients(grads))
        loss = mx.distributed.all_sum(loss) / self.group.size()
        mx.eval(loss, norm)
        if not np.isfinite(loss.item()) or not np.isfinite(norm.item()):
            self.skipped, self._bad = self.skipped + 1, self._bad + 1
            if self._bad == self.MOST_BAD_STEPS:
                raise TrainingError(f"{self._bad} steps in a row had no finite loss; lower --learning-rate")
            return None
        self._bad = 0
        self._update(grads)
        mx.eval(self._state)
        return loss.item()

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """The summed loss of batches, and how many answer tokens they have."""
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


class Loop:
    """The steps of a run, with what is said, evaluated and kept in between."""

    def __init__(self, args, trainer, sets, store, processor, run_folder, adapter, state):
        self.args, self.trainer, self.store, self.processor = args, trainer, store, processor
        self.data, self.val = sets[0], sets[1] if len(sets) > 1 else None
        self.run_folder, self.adapter, self.state = run_folder, adapter, state
        self._clear()

    def run(self, done: int, steps: int, per_epoch: int) -> None:
        args, group = self.args, self.trainer.group
        epoch, plan = None, []
        for step in range(done + 1, steps + 1):
            if epoch != (step - 1) // per_epoch:
                epoch = (step - 1) // per_epoch
                plan = self.data.batches(args.batch_size, args.seed, epoch)
            first = (step - 1) % per_epoch * args.grad_accumulation_steps
            mx.random.seed((args.seed * 1_000_003 + step) * 1009 + group.rank())  # so it needs no keeping
            self._step(plan[first : first + args.grad_accumulation_steps])
            if step % args.report_every == 0 or step == steps:
                self._report(step, steps)
            if self.val and (step % args.eval_every == 0 or step == steps):
                self._validate(step)
            if step % args.save_every == 0 or step == steps or self.state["best_step"] == step:
                self.state["skipped"] = self.trainer.skipped
                self.run_folder.save(step, self.trainer.model, self.trainer.optimizer, self.state, self.adapter)
        self.run_folder.finish()

    def _step(self, plan) -> None:
        rank, size = self.trainer.group.rank(), self.trainer.group.size()
        dialogues = [[self.data.encode(i, self.processor) for i in batch] for batch in plan]
        total = sum(map(count_answers, dialogues))
        batches = [self._collate(batch[rank::size]) for batch in dialogues]
        loss = self.trainer.step(batches, total)
        if loss is not None:
            self.loss, self.answers = self.loss + loss * total, self.answers + total
        self.tokens += sum(len(d.ids) for batch in dialogues for d in batch)
        self.padded += sum(batch.ids.size for batch in batches) * size
        self.images += sum(len(d.images) for batch in dialogues for d in batch)
        self.steps += 1

    def _collate(self, dialogues):
        return collate(dialogues, self.store, self.processor.prompt_tokens.image, self.processor.num_queries)

    def _validate(self, step: int) -> None:
        group, size = self.trainer.group, self.args.batch_size
        order = self.val.lengths.argsort(kind="stable")
        mine = range(group.rank() * size, len(order), group.size() * size)
        dialogues = ([self.val.encode(i, self.processor) for i in order[start : start + size]] for start in mine)
        sums = mx.distributed.all_sum(mx.array(self.trainer.evaluate(map(self._collate, dialogues))), stream=mx.cpu)
        loss = (sums[0] / sums[1]).item()
        if self.state["best_loss"] is None or loss < self.state["best_loss"]:
            self.state |= {"best_loss": loss, "best_step": step}
        self.run_folder.log({"step": step, "validation_loss": loss})
        if group.rank() == 0:
            print(f"step {step}: validation loss {loss:.4f}", file=sys.stderr)
        self.started = time.perf_counter()

    def _report(self, step: int, steps: int) -> None:
        seconds = time.perf_counter() - self.started
        figures = {
            "step": step,
            "loss": self.loss / max(self.answers, 1),
            "learning_rate": self.trainer.optimizer.learning_rate.item(),
            "tokens_per_second": self.tokens / seconds,
            "images_per_second": self.images / seconds,
            "real_tokens": self.tokens / self.padded,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "skipped_steps": self.trainer.skipped,
        }
        self.run_folder.log(figures)
        if self.trainer.group.rank() == 0:
            left = round(seconds / self.steps * (steps - step))
            skipped = f", {self.trainer.skipped} steps skipped" if self.trainer.skipped else ""
            print(
                f"step {step}/{steps}: loss {figures['loss']:.4f}, learning rate {figures['learning_rate']:.2e}, "
                f"{figures['tokens_per_second']:.0f} tokens/s ({figures['real_tokens']:.0%} of them real), "
                f"{figures['images_per_second']:.1f} images/s, {figures['peak_memory_gb']:.2f} GB, "
                f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left{skipped}",
                file=sys.stderr,
            )
        self._clear()

    def _clear(self) -> None:
        self.loss = self.answers = self.tokens = self.padded = self.images = self.steps = 0
        self.started = time.perf_counter()

"""The training loop: steps, and what is reported, validated and saved in between."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..features.store import FeatureStore
from .batch import Batch, collate, count_answers
from .data import Dialogue, Dialogues
from .run import RunFolder
from .trainer import Trainer


@dataclass(frozen=True)
class LoopSettings:
    """How long a run is, and how often it reports, validates and saves."""

    steps: int
    steps_per_epoch: int
    batch_size: int  # rows per batch, in all ranks together
    grad_accumulation_steps: int = 1  # batches per step
    seed: int = 0  # of the order of rows and of dropout
    report_every: int = 10  # steps
    eval_every: int = 200
    save_every: int = 100


@dataclass
class _Interval:
    """Sums since the last report."""

    loss: float = 0.0  # nats, over `answers`
    answers: int = 0  # tokens in the loss
    tokens: int = 0
    padded: int = 0  # tokens with padding
    images: int = 0
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)


class Loop:
    """Run the steps of a training run.

    Args:
        settings: length and intervals.
        trainer: takes the steps.
        data: rows to train on.
        validation: rows to validate with, if any.
        store: features of the images in both.
        run_folder: destination of metrics and checkpoints.
        adapter: config of the adapter, saved with every checkpoint.
        state: best loss and step so far and number of skipped steps, saved with every checkpoint.
    """

    def __init__(
        self,
        settings: LoopSettings,
        trainer: Trainer,
        *,
        data: Dialogues,
        validation: Dialogues | None,
        store: FeatureStore,
        run_folder: RunFolder,
        adapter: dict,
        state: dict,
    ):
        self._settings, self._trainer = settings, trainer
        self._data, self._validation, self._store = data, validation, store
        self._run_folder, self._adapter, self._state = run_folder, adapter, state
        self._interval = _Interval()

    def run(self, done: int) -> None:
        """Run the steps after step `done`, to the last."""
        s, rank = self._settings, self._trainer.group.rank()
        epoch, plan = None, []
        for step in range(done + 1, s.steps + 1):
            if epoch != (step - 1) // s.steps_per_epoch:
                epoch = (step - 1) // s.steps_per_epoch
                plan = self._data.batches(s.batch_size, s.seed, epoch)
            first = (step - 1) % s.steps_per_epoch * s.grad_accumulation_steps
            # Seeded at every step, so that a resumed run needs no saved random state.
            mx.random.seed(((s.seed * 1_000_003 + step) * 1009 + rank) % 2**64)
            self._step(plan[first : first + s.grad_accumulation_steps])
            is_last = step == s.steps
            if step % s.report_every == 0 or is_last:
                self._report(step)
            if self._validation is not None and (step % s.eval_every == 0 or is_last):
                self._validate(step)
            # Weights that gave no finite loss do not replace those of an older checkpoint.
            due = step % s.save_every == 0 and not self._trainer.bad
            if due or is_last or self._state["best_step"] == step:
                self._state["skipped"] = self._trainer.skipped
                model, optimizer = self._trainer.model, self._trainer.optimizer
                self._run_folder.save(step, model, optimizer, self._state, self._adapter)
        self._run_folder.finish()

    def _step(self, plan: Sequence[np.ndarray]) -> None:
        rank, size = self._trainer.group.rank(), self._trainer.group.size()
        dialogues = [[self._data[i] for i in batch] for batch in plan]
        total = sum(map(count_answers, dialogues))
        batches = [self._collate(batch[rank::size], self._data) for batch in dialogues]
        loss = self._trainer.step(batches, total)
        now = self._interval
        if loss is not None:
            now.loss += loss * total
            now.answers += total
        now.tokens += sum(len(d.ids) for batch in dialogues for d in batch)
        now.padded += sum(batch.ids.size for batch in batches) * size
        now.images += sum(len(d.images) for batch in dialogues for d in batch)
        now.steps += 1

    def _collate(self, dialogues: Sequence[Dialogue], rows: Dialogues) -> Batch:
        return collate(dialogues, self._store, rows.image_token, rows.num_queries)

    def _validate(self, step: int) -> None:
        rows, group, size = self._validation, self._trainer.group, self._settings.batch_size
        order = rows.lengths.argsort(kind="stable")
        mine = range(group.rank() * size, len(order), group.size() * size)
        batches = (self._collate([rows[i] for i in order[start : start + size]], rows) for start in mine)
        sums = mx.distributed.all_sum(mx.array(self._trainer.evaluate(batches)), stream=mx.cpu)
        loss = (sums[0] / sums[1]).item()
        best = self._state["best_loss"]
        if math.isfinite(loss) and (best is None or loss < best):
            self._state |= {"best_loss": loss, "best_step": step}
        self._run_folder.log({"step": step, "validation_loss": _finite(loss)})
        if group.rank() == 0:
            print(f"step {step}: validation loss {loss:.4f}", file=sys.stderr)
        self._interval.started = time.perf_counter()

    def _report(self, step: int) -> None:
        now, trainer, steps = self._interval, self._trainer, self._settings.steps
        seconds, loss = time.perf_counter() - now.started, now.loss / now.answers if now.answers else math.nan
        figures = {
            "step": step,
            "loss": _finite(loss),
            "learning_rate": trainer.optimizer.learning_rate.item(),
            "tokens_per_second": now.tokens / seconds,
            "images_per_second": now.images / seconds,
            "real_tokens": now.tokens / now.padded,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "skipped_steps": trainer.skipped,
        }
        self._run_folder.log(figures)
        if trainer.group.rank() == 0:
            left = round(seconds / now.steps * (steps - step))
            skipped = f", {trainer.skipped} steps skipped" if trainer.skipped else ""
            print(
                f"step {step}/{steps}: loss {loss:.4f}, learning rate {figures['learning_rate']:.2e}, "
                f"{figures['tokens_per_second']:.0f} tokens/s ({figures['real_tokens']:.0%} without padding), "
                f"{figures['images_per_second']:.1f} images/s, {figures['peak_memory_gb']:.2f} GB, "
                f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left{skipped}",
                file=sys.stderr,
            )
        self._interval = _Interval()


def _finite(value: float) -> float | None:
    """The value, or None, which is null in JSON, where NaN and infinity are not allowed."""
    return value if math.isfinite(value) else None

"""The folder of a training run: options, metrics, and checkpoints to resume from.

`run.json` has the options, `metrics.jsonl` the metrics, `checkpoints/step-N` the newest two checkpoints and the best,
which the link `best` points to (a copy of its adapters where links are not supported). Checkpoints, and at the end the
folder itself, are adapters in mlx-lm's form.
"""

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint import CONFIG, check_tensors, find_checkpoint, read_json, read_shard
from ..fields import CheckpointError, Number, check_fields
from ..files import beside, check_file, check_name, flush, list_folder, new_folder, write_beside, writing
from ..loading import ADAPTER_CONFIG, ADAPTERS
from ..locks import hold

RUN, STATE, OPTIMIZER, BEST = "run.json", "state.json", "optimizer.safetensors", "best"
NEWEST = 2  # checkpoints kept, besides the best
COUNT = Number(0, 2**53, whole=True)
PROGRESS = {"step": COUNT, "best_step": COUNT, "skipped": COUNT, "best_loss": Number(-math.inf, math.inf)}


class RunFolder:
    """Folder of a run, written by one rank.

    Args:
        folder: created by the writing rank if it does not exist.
        options: everything the steps depend on, as JSON.
        resume: continue the run in the folder.
        writes: whether this process writes.
        notes: saved with the options for information; they may differ when a run is resumed.

    Raises:
        ValueError: if the folder has a run and `resume` is not set, or a run with other options.
        OSError: if another process writes to it.
    """

    def __init__(self, folder: str | Path, options: dict, resume: bool, writes: bool, notes: dict | None = None):
        self.folder, self.writes = Path(folder), writes
        if not writes:
            return  # the writing rank may have started already
        path = self.folder / RUN
        check_name(path)
        if self.folder.is_file():
            raise ValueError(f"{folder}: is a file; use another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        weakref.finalize(self, os.close, hold(self.folder))
        if path.exists():
            if not resume:
                raise ValueError(f"{folder}: contains a run; continue it with --resume, or use another --out")
            old = read_json(path)
            changed = [key for key in options if old.get(key) != options[key]]
            if changed:
                what = ", ".join(_change(key, old.get(key), options[key]) for key in changed)
                raise ValueError(f"{folder}: --resume needs the same data and options; {what}")
        elif any(not path.name.startswith(RUN) for path in list_folder(self.folder)):
            raise ValueError(f"{folder}: is not empty and contains no run; use another --out")
        else:
            write_beside(path, (json.dumps({**(notes or {}), **options}, indent=2) + "\n").encode())

    def newest_step(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        steps = self._steps()
        return int(steps[-1].name[5:]) if steps else 0

    def save(self, step: int, model: nn.Module, optimizer: optim.Optimizer, state: dict, adapter: dict) -> None:
        """Save a checkpoint; remove old ones."""
        if not self.writes:
            return
        weights = dict(tree_flatten(model.trainable_parameters()))
        moments = dict(tree_flatten(optimizer.state))
        path = self.folder / "checkpoints" / f"step-{step:07}"
        if self.metrics.exists():
            flush(self.metrics)  # a run that is resumed keeps the lines of the steps before
        num_bytes = sum(x.nbytes for x in (*weights.values(), *moments.values()))
        with new_folder(path, num_bytes) as partial, writing(path):
            mx.save_safetensors(str(partial / ADAPTERS), weights, metadata={"format": "mlx"})
            mx.save_safetensors(str(partial / OPTIMIZER), moments)
            (partial / ADAPTER_CONFIG).write_text(json.dumps(adapter, indent=2) + "\n")
            (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        best = self._point_to_best(state)
        for old in self._steps()[:-NEWEST]:
            if old != best:
                shutil.rmtree(old)

    def _point_to_best(self, state: dict) -> Path:
        """Point the link `best` to the best checkpoint and return that; repairs a link left by an interruption."""
        best = self.folder / "checkpoints" / f"step-{state.get('best_step') or 0:07}"
        link = self.folder / BEST
        if best.exists() and not _is_same(link, best):
            partial = self.folder / f"{BEST}.partial"
            partial.unlink(missing_ok=True)
            try:
                partial.symlink_to(best.relative_to(self.folder))
                os.replace(partial, link)
            except OSError:  # a file system without links
                shutil.rmtree(link, ignore_errors=True)
                with new_folder(link, 0) as copy:
                    for name in (ADAPTERS, ADAPTER_CONFIG, STATE):
                        shutil.copyfile(best / name, copy / name)
        return best

    def restore(self, model: nn.Module, optimizer: optim.Optimizer) -> dict:
        """Load the newest checkpoint into model and optimizer, and drop the metrics of steps that will be repeated.

        Returns:
            The state saved with it, including "step"; empty if there is no checkpoint.
        """
        state = {}
        if steps := self._steps():
            state = check_fields(str(steps[-1] / STATE), read_json(steps[-1] / STATE), PROGRESS, ("step",))
            if state["step"] != self.newest_step():
                raise CheckpointError(f"{steps[-1] / STATE}: is of step {state['step']}; remove {steps[-1]} to go back")
            model.load_weights(_read_whole(steps[-1] / ADAPTERS, model.trainable_parameters()), strict=False)
            optimizer.state = tree_unflatten(_read_whole(steps[-1] / OPTIMIZER, optimizer.state))
            self._point_to_best(state)
        self._forget_after(state.get("step", 0))
        return state

    def finish(self) -> None:
        """Copy the newest checkpoint's adapters to the run's folder."""
        if self.writes:
            for name in (ADAPTERS, ADAPTER_CONFIG):
                with beside(self.folder / name) as partial:
                    shutil.copyfile(self._steps()[-1] / name, partial)

    def log(self, figures: dict) -> None:
        """Append a line to the metrics, all of it or nothing."""
        if not self.writes:
            return
        line = (json.dumps(figures) + "\n").encode()
        with self.metrics.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as e:
                file.truncate(end)
                raise OSError(f"{self.metrics}: {e.strerror}; make room, then continue with --resume") from e

    def _forget_after(self, step: int) -> None:
        if os.path.lexists(self.metrics):
            self._check_metrics()
            lines = self.metrics.read_bytes().splitlines(keepends=True)
            write_beside(self.metrics, b"".join(line for line in lines if _step_of(line) <= step))

    def _check_metrics(self) -> None:
        try:
            check_file(self.metrics)
        except OSError as e:
            raise OSError(f"{self.metrics}: {e.strerror or e}") from e

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _steps(self) -> list[Path]:
        return sorted(p for p in (self.folder / "checkpoints").glob("step-*") if p.name[5:].isdigit())


def _change(key: str, old: object, new: object) -> str:
    """Describe a changed option; a digest would tell nothing."""
    is_digest = key in ("data", "val", "weights", "features", "examples")
    return f"{key} changed" if is_digest else f"{key} was {old!r} and is {new!r}"


def _read_whole(path: Path, expected: dict) -> list[tuple[str, mx.array]]:
    """Read the tensors of a file of a checkpoint, which must be those of the tree `expected` in names and shapes."""
    tensors = read_shard(path)
    check_tensors(path, expected, tensors)
    return list(tensors.items())


def _is_same(link: Path, best: Path) -> bool:
    """Whether `link` points to the checkpoint `best`, or is a copy of it."""
    if link.resolve() == best.resolve():
        return True
    return (link / STATE).is_file() and (link / STATE).read_bytes() == (best / STATE).read_bytes()


def _step_of(line: bytes) -> float:
    """Step of a line of the metrics; infinity if the line is damaged."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def weights_digest(path_or_hf_repo: str | Path) -> str:
    """SHA-256, in hex, of a checkpoint's config and weights."""
    folder = find_checkpoint(path_or_hf_repo)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = pool.map(_sha256, [folder / CONFIG, *list_folder(folder, "*.safetensors")])
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _sha256(path: Path) -> bytes:
    check_file(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha256(data).digest()

"""Preparation of a run: embed missing features, and check that all ranks agree."""

import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from ..features.encoder import ImageEncoder, load_encoder
from ..features.image_files import known_images, look_up
from ..features.pipeline import Pipeline
from ..features.sources import Source
from ..features.store import STORE, FeatureError, FeatureStore
from ..features.writer import FeatureWriter
from ..files import printable
from .data import Dialogues, StoredTiler
from .ranks import RankError, Ranks

BATCH_SIZE = 8  # tiles embedded at once

# Differences between ranks other than options: description and remedy.
_REMEDIES = {
    "data": ("the file of --data", "copy it from one machine to the others"),
    "val": ("the file of --val", "copy it from one machine to the others"),
    "weights": ("the weights or the config of --model", "copy its folder from one machine to the others"),
    "features": ("the weights, dtype or preprocessing behind --features", "use another folder to embed again"),
    "store_dtype": ("the dtype of the rows in --features", "use another folder to embed again"),
    "examples": ("its usable rows", "give every machine the same images"),
}


def prepare_features(
    folder: str, model: str, stage: str, sets: Sequence[Dialogues], workers: int, ranks: Ranks
) -> tuple[FeatureStore, StoredTiler]:
    """Embed the images of `sets` that are missing in a store.

    Ranks that share a store split this work; a rank with a store on its own disk does all of it. Images that are still
    missing, because their paths differ between machines, are embedded by each rank for itself.

    Args:
        folder: the store; created if it does not exist.
        model: folder or Hub repository of the checkpoint that encodes.
        stage: "pretrain" needs patch features, "finetune" patch features or visual tokens.
        sets: data sets, the same on all ranks.
        workers: number of decoding threads.
        ranks: all of them must call this.

    Returns:
        The store, and a tiler that finds images in it by their paths.

    Raises:
        FeatureError: if the folder is not a store, or one of another model, kind or preprocessing.
        RankError: if another rank failed.
    """
    with ranks.together():
        encoder, store = _open(folder, model, stage)
        files = look_up(set().union(*(rows.image_paths for rows in sets)))
    sharing = ranks.sharing(store.folder)
    shares = [slice(sharing.index(ranks.rank), None, len(sharing)), slice(None)]
    failed: dict[str, str] = {}
    while True:
        with ranks.together():
            store.refresh()
            known = known_images(store, files)
            unread = {file.path: file for path, file in sorted(files.items()) if path not in known and file.stat}
            sources = [Source(path, Path(path).read_bytes, file.stat) for path, file in unread.items()]
            sources = [source for source in sources if source.name not in failed]
        if not shares or not any(ranks.gather(len(sources))):
            break
        with ranks.together():  # no rank may add anything before all have listed what is missing
            failed |= _embed(sources[shares.pop(0)], encoder, store, workers, silent=ranks.rank > 0)
    unusable = {p: f.problem or failed.get(f.path, "could not be embedded") for p, f in files.items() if p not in known}
    gone = sum(files[path].is_gone for path in known)
    if gone and ranks.rank == 0:
        print(f"note: {gone} images no longer exist; their features in {printable(folder)} are used", file=sys.stderr)
    return store, StoredTiler(store, known, unusable)


def _open(folder: str, model: str, stage: str) -> tuple[ImageEncoder, FeatureStore]:
    kind, stored, dtype = ("patch" if stage == "pretrain" else "visual-tokens"), None, None
    if (Path(folder) / STORE).is_file():
        info = FeatureStore(folder).info
        if info.kind != kind and (info.kind, stage) != ("patch", "finetune"):
            raise FeatureError(f"{folder}: holds {info.kind} features; --stage {stage} needs {kind}")
        kind, stored, dtype = info.kind, info.dtype, getattr(mx, info.compute_dtype)
    encoder = load_encoder(model, kind, dtype)
    encoder.all_cores = True
    return encoder, FeatureStore.create(folder, encoder.store_info(stored))


def _embed(
    sources: list[Source], encoder: ImageEncoder, store: FeatureStore, workers: int, silent: bool
) -> dict[str, str]:
    """Add the features of images to a store; return the reasons of failures by path."""
    if not sources:
        return {}
    bar = tqdm(total=len(sources), unit="image", disable=True if silent else None)
    with bar, FeatureWriter(store) as writer:
        pipeline = Pipeline(encoder, writer, BATCH_SIZE, workers, lambda report: bar.update(report.seen - bar.n))
        return dict(pipeline.run(iter(sources)).failed)


def say_rejected(sets: Sequence[Dialogues]) -> None:
    """Print the skipped rows and the reasons."""
    for rows in sets:
        if rows.rejected:
            print(f"{printable(str(rows.path))}: {len(rows.rejected)} rows are skipped:", file=sys.stderr)
            print("\n".join(f"  {printable(reason)}" for reason in rows.rejected[:10]), file=sys.stderr)


def agree(ranks: Ranks, facts: dict[str, object], sets: Sequence[Dialogues]) -> None:
    """Check that all ranks train on the same rows, features and weights with the same options.

    Args:
        ranks: all of them must call this.
        facts: options by name, and digests as in `_REMEDIES`; causes before effects, because the first difference is
            reported.
        sets: the data sets, their images found.

    Raises:
        RankError: on every rank, with the same message, if a rank differs from rank 0.
    """
    everyone = ranks.gather(facts)
    pairs = [(rank, key) for key in facts for rank, other in enumerate(everyone) if other[key] != everyone[0][key]]
    if not pairs:
        return
    rank, key = pairs[0]
    option = f"--{key.replace('_', '-')} ({everyone[rank][key]} and {everyone[0][key]})"
    what, remedy = _REMEDIES.get(key, (option, "start every rank with the same options"))
    if key == "examples":
        tables = ranks.gather([[rows.numbers.tolist(), rows.digests.tolist()] for rows in sets])
        what = f"{what}: {_first_difference(sets, tables[rank], tables[0])}"
        if ranks.rank == rank:
            say_rejected(sets)  # rank 0 has printed its own
    raise RankError(f"{ranks.name(rank)} differs from {ranks.name(0)} in {what}; {remedy}")


def _first_difference(sets: Sequence[Dialogues], *tables: list) -> str:
    """Describe the first row that differs between a rank and rank 0."""
    for rows, *pair in zip(sets, *tables, strict=True):
        one, first = (dict(zip(*table, strict=True)) for table in pair)
        differing = [number for number in one.keys() | first.keys() if one.get(number) != first.get(number)]
        if differing:
            row = f"row {min(differing)} of {rows.path}"
            if min(differing) not in one:
                return f"it skips {row}"
            return f"{row} has another image or other tokens" if min(differing) in first else f"only it can use {row}"
    return ""


def check_resume(ranks: Ranks, folder: str, step: int) -> None:
    """Check that no rank is ahead of rank 0, whose checkpoint all ranks resume from.

    Args:
        ranks: all of them must call this.
        folder: folder of the run, on each rank's disk.
        step: step of the newest checkpoint there; 0 if there is none or the run is new.

    Raises:
        RankError: on every rank, with the same message.
    """
    steps = ranks.gather(step)
    furthest = max(range(ranks.size), key=steps.__getitem__)
    if steps[furthest] > steps[0]:
        raise RankError(
            f"{ranks.name(furthest)} has {folder} at step {steps[furthest]}, {ranks.name(0)} at step {steps[0]}, and "
            f"--resume continues from rank 0's; make the former machine rank 0, or move its {folder} away"
        )

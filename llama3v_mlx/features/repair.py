"""Verification and repair of a feature store's files, writer by writer."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import write_beside
from .growing import names_path
from .shards import RECORD, SEALED, FeatureError, Shard, read_names, shard_path


@dataclass
class Verdict:
    """Result of verifying a store."""

    good: int = 0
    lost: list[str] = field(default_factory=list)  # one line per loss
    restored: int = 0


def check_writer(folder: Path, writer: int, width: int, dtype: str) -> Verdict:
    """Check the files of one writer, remove lost entries from its manifest and names, and restore sealed ones.

    A shard that cannot be read, or has no good entry, is renamed to the suffix `.damaged`.
    """
    manifest = folder / f"manifest-{writer:03}.bin"
    known = np.zeros(0, RECORD)
    if manifest.exists():
        known = np.fromfile(manifest, RECORD, manifest.stat().st_size // RECORD.itemsize)
    verdict, kept = Verdict(), []
    numbers = {int(number) for number in known["shard"]}
    numbers |= {int(p.stem.rpartition("-")[2]) for p in folder.glob(f"shard-{writer:03}-*{SEALED}")}
    for number in sorted(numbers):
        records = known[known["shard"] == number]
        try:
            shard = Shard(folder, writer, number, width, dtype)
        except FeatureError as e:
            verdict.lost.append(f"{len(records)} entries: {e}")
            _set_aside(shard_path(folder, writer, number))
            continue
        good = [record for record in records if _is_good(shard, record, dtype)]
        if bad := len(records) - len(good):
            verdict.lost.append(f"{bad} entries of {shard.path}: checksum mismatch or not finite")
        if not shard.growing:
            # Entries removed by an earlier check are still in the shard's own records, and still bad.
            listed = {record.tobytes() for record in records}
            missing = [record for record in shard.records if record.tobytes() not in listed]
            restored = [record for record in missing if _is_good(shard, record, dtype)]
            verdict.restored += len(restored)
            good += restored
            if not len(records) and len(restored) < len(missing):
                bad = len(missing) - len(restored)
                verdict.lost.append(f"{bad} entries of {shard.path}: checksum mismatch or not finite")
        if len(records) and not good:
            _set_aside(shard.path)
        kept += sorted(good, key=lambda record: int(record["start"]))
    verdict.good = len(kept)
    whole = np.array(kept, RECORD).tobytes()
    if not manifest.exists() or manifest.read_bytes() != whole:
        write_beside(manifest, whole)
    verdict.lost += _repair_names(names_path(folder, writer))
    return verdict


def _is_good(shard: Shard, record: np.void, dtype: str) -> bool:
    try:
        values, scales = shard.read(int(record["start"]), int(record["rows"]))
        shard.check(np.array([record], RECORD), values, scales)
    except FeatureError:
        return False
    if dtype == "bfloat16":
        return bool(((values & 0x7F80) != 0x7F80).all())  # an exponent of ones is infinity or NaN
    return bool(np.isfinite(values).all() and np.isfinite(scales).all())


def _set_aside(shard: Path) -> None:
    if shard.exists():
        shard.rename(shard.with_suffix(".damaged"))


def _repair_names(path: Path) -> list[str]:
    """Remove damaged lines, and a partial one at the end, from a list of names; return a message per damaged line."""
    if not path.exists():
        return []
    kept, lost = [], []
    for number, line, entry in read_names(path):
        if entry is None:
            lost.append(f"{path}:{number}: damaged line; embed the images again to record their names")
        else:
            kept.append(line)
    whole = b"".join(kept)
    if len(whole) != path.stat().st_size:
        write_beside(path, whole)
    return lost

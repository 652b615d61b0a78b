"""Merging of feature stores, such as the parts that the ranks of a run wrote on disks of their own."""

from collections.abc import Sequence
from pathlib import Path

from .store import FeatureError, FeatureStore
from .writer import FeatureWriter


def merge(parts: Sequence[str | Path], out: str | Path) -> FeatureStore:
    """Add the entries and names of stores to the store in `out`, created if necessary; entries that it has are kept.

    An interrupted merge is continued by the same call.

    Raises:
        FeatureError: if a part is no store or damaged, or made with another model, kind, preprocessing or dtype.
        OSError: if `out` cannot be written.
    """
    stores = [FeatureStore(part) for part in parts]
    for store in stores:
        if name := store.info.difference(stores[0].info):
            raise FeatureError(
                f"{store.folder}: was made with another model, --kind, --dtype or --store-dtype than "
                f"{stores[0].folder}, or with another preprocessing ({name} differs)"
            )
    merged = FeatureStore.create(out, stores[0].info)
    with FeatureWriter(merged) as writer:
        for store in stores:
            # Names first, as when they are embedded: features without a name cannot be found.
            for sha256, path, stat, facts in store.files_where("sha256 != X''"):
                writer.name(sha256, path, stat, (*facts, None, None)[:3])
            for place in store.database.rows("SELECT DISTINCT writer, shard FROM entries"):
                for block in store.blocks(*place):
                    writer.copy(*block)
    merged.refresh()
    return merged

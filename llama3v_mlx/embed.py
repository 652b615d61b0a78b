"""Embed images with SigLIP in batches: `llama3v embed photos/ --out photos.features`."""

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from itertools import chain, islice
from pathlib import Path

from .cli import CACHE, DEMO_SIGLIP_NOTE, note_slow_cpu, positive, run
from .demo import SIGLIP
from .files import beside, naming, printable, write_beside

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
BATCH_SIZES_FILE = CACHE / "batch_sizes.json"


def best_batch_size(encoder) -> int:
    """Find the smallest batch size within 3% of the fastest on this machine; the measurement is cached."""
    import mlx.core as mx
    import numpy as np

    from .device import chip, cores, on_gpu
    from .tiling import TiledImage

    side = encoder.config.image_size if encoder.image_config is None else encoder.image_config.scale_resolution
    c = encoder.config
    device = chip() if on_gpu() else f"cpu{cores()}"
    key = f"{device}/mlx {mx.__version__}/{c.hidden_size}x{c.num_hidden_layers}@{side}/{encoder.dtype}"
    known = _known_batch_sizes()
    if key in known:
        return known[key]
    speeds = {}
    for size in BATCH_SIZES:
        batch = [TiledImage((np.zeros((side, side, 3), np.uint8),), None)] * size
        times = []
        for _ in range(2):  # the first run compiles
            start = time.perf_counter()
            mx.eval([f.rows for f in encoder.encode(batch)])
            times.append(time.perf_counter() - start)
        speeds[size] = size / min(times)
        if times[-1] > 2 or speeds[size] < 0.9 * max(speeds.values()):
            break
    best = next(size for size, speed in speeds.items() if speed >= 0.97 * max(speeds.values()))
    with contextlib.suppress(OSError):  # only a cache: on a full disk or a read-only home, the next run measures again
        BATCH_SIZES_FILE.parent.mkdir(parents=True, exist_ok=True)
        write_beside(BATCH_SIZES_FILE, json.dumps({**known, key: best}, indent=1).encode())
    return best


def _known_batch_sizes() -> dict[str, int]:
    """Load the batch sizes measured before; damaged entries are skipped, to be measured again."""
    try:
        known = json.loads(BATCH_SIZES_FILE.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: size for key, size in known.items() if type(size) is int and size in BATCH_SIZES}


def embed(args: argparse.Namespace) -> None:
    """Find images, embed and store them, report."""
    import mlx.core as mx
    from tqdm import tqdm

    from .features.encoder import load_encoder
    from .features.pipeline import Pipeline, Report
    from .features.sources import Skipped, count_sources, find_sources
    from .features.store import FeatureStore
    from .features.writer import FeatureWriter

    skipped = Skipped()
    sources = find_sources(args.paths, skipped)
    first = next(sources, None)
    if first is None:
        raise ValueError(f"{', '.join(args.paths)}: no images found{skipped.details()}")
    group = mx.distributed.init()
    if group.rank() == 0:
        note_slow_cpu()
        if args.model is None:
            print(DEMO_SIGLIP_NOTE, file=sys.stderr)
    dtype = getattr(mx, args.dtype) if args.dtype else None
    encoder = load_encoder(args.model or SIGLIP, args.kind, dtype, args.draft)
    encoder.all_cores = True
    store = FeatureStore.create(args.out, encoder.store_info(args.store_dtype))
    batch_size = args.batch_size or best_batch_size(encoder)
    sources = islice(islice(chain([first], sources), args.limit), group.rank(), None, group.size())
    with tqdm(unit="image", smoothing=0.05, disable=True if args.json or group.rank() else None) as bar:

        def count() -> None:
            total = min(count_sources(args.paths), args.limit or sys.maxsize)
            bar.total = len(range(group.rank(), total, group.size()))

        # Counting millions of files takes a while and must not delay the first ones.
        threading.Thread(target=count, daemon=True).start()

        def progress(report: Report) -> None:
            bar.update(report.seen - bar.n)
            bar.set_postfix(failed=len(report.failed), refresh=False)

        with FeatureWriter(store) as writer:
            report = Pipeline(encoder, writer, batch_size, args.workers, progress).run(sources)
    for name, reason in report.failed:
        print(f"failed: {printable(name)}: {printable(reason)}", file=sys.stderr)
    if group.rank() == 0:  # every rank lists all folders
        for name, reason in skipped.denied:
            print(f"failed: {printable(name)}: the folder cannot be listed ({reason})", file=sys.stderr)
    counts = [report.new, report.known, len(report.failed)]
    sums = mx.distributed.all_sum(mx.array([*counts, report.flops, *report.seconds.values()]), stream=mx.cpu).tolist()
    new, known, failed = (round(n) for n in sums[:3])
    if group.size() > 1:
        note_parts(group, store.folder)
    if group.rank() == 0:
        store.refresh()  # the other ranks are done: all_sum waits for them
        figures = {"new": new, "known": known, "failed": failed, "rows": len(store)}
        figures |= {"store": args.out, "model": encoder.name, "kind": encoder.kind, "batch_size": batch_size}
        figures |= {"seconds": round(report.wall, 3), "images_per_second": new / report.wall}
        figures["tflops"] = sums[3] / report.wall / 1e12
        figures["stage_seconds"] = dict(zip(report.seconds, sums[4:], strict=True))
        figures |= {"skipped": dict(skipped.suffixes.most_common()), "denied": [name for name, _ in skipped.denied]}
        print(json.dumps(figures) if args.json else table(figures))
        if skipped.suffixes and not args.json:
            print(f"skipped: {printable(str(skipped))}")
    if failed or skipped.denied:
        sys.exit(1)


def table(figures: dict) -> str:
    """Format the figures of a run as text, the speeds only if there is something to measure."""
    lines = [
        f"{figures['new']} images embedded, {figures['known']} already stored, {figures['failed']} failed; "
        f"{printable(figures['store'])} has {figures['rows']}"
    ]
    if not figures["new"]:
        return lines[0]
    lines.append(
        f"{figures['images_per_second']:.1f} images/s, {figures['tflops']:.3f} TFLOP/s, "
        f"batches of {figures['batch_size']}"
    )
    for stage, seconds in figures["stage_seconds"].items():
        where = "  (all threads)" if stage in ("read", "decode") else ""
        lines.append(f"  {stage:7} {seconds:9.2f} s{where}")
    return "\n".join([*lines, f"  {'wall':7} {figures['seconds']:9.2f} s"])


def export(store_folder: str, folder: Path, json_only: bool) -> None:
    """Write a store as `embeddings.npy` (rows × width, float32) and `index.jsonl` (path, sha256, row)."""
    import mlx.core as mx
    import numpy as np

    from .features.store import FeatureStore

    store = FeatureStore(store_folder)
    if mx.distributed.init().rank():
        return
    names: dict[bytes, list[str]] = {}
    for sha256, name in store.names():
        names.setdefault(sha256, []).append(name)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    matrix, index = folder / "embeddings.npy", folder / "index.jsonl"
    try:
        with beside(index) as new_index, beside(matrix) as new_matrix, naming(folder):
            with new_matrix.open("wb") as file:
                shape = (store.num_rows, store.info.width)
                np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                for rows in store.matrix():
                    file.write(np.ascontiguousarray(rows).data)
            with new_index.open("w", encoding="utf-8") as file:
                row = 0
                for sha256, count in store.sizes():
                    paths = list(dict.fromkeys(names.get(sha256, [])))
                    entry = {"path": paths[0] if paths else None, "sha256": sha256.hex(), "row": row}
                    if count > 1:
                        entry["rows"] = count
                    if len(paths) > 1:
                        entry["paths"] = paths
                    file.write(json.dumps(entry) + "\n")
                    row += count
    finally:
        if is_new and not matrix.exists():
            folder.rmdir()
    file = sys.stderr if json_only else sys.stdout
    print(f"{printable(str(folder))}: {row} rows of width {store.info.width}", file=file)


def check(folder: str) -> None:
    """Verify and repair a store, and print the result."""
    from .features.repair import verify

    verdict = verify(folder)
    print(f"{printable(folder)}: {verdict.good} good entries, {verdict.restored} of them restored")
    for line in verdict.lost:
        print(f"lost: {printable(line)}", file=sys.stderr)
    if verdict.lost:
        sys.exit(1)


def merge(parts: list[str], out: str) -> None:
    """Merge stores into one, and print the result."""
    from .features.merge import merge

    print(f"{printable(out)}: {len(merge(parts, out))} entries")


def note_parts(group, store: Path) -> None:
    """Say what to do if the ranks have each written a store on a disk of their own."""
    import mlx.core as mx

    found = (store / "store.json").stat().st_mtime_ns  # of one file, if the ranks share a disk
    halves = mx.array([[found >> 32, found & 0xFFFFFFFF]], mx.uint32)
    disks = {tuple(halves) for halves in mx.distributed.all_gather(halves, stream=mx.cpu).tolist()}
    if len(disks) > 1 and group.rank() == 0:
        print(
            f"note: the {group.size()} processes wrote to {len(disks)} disks, and each {printable(str(store))} has a "
            "part; copy the parts to one machine and merge them: llama3v embed --merge PART PART --out STORE",
            file=sys.stderr,
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama3v embed",
        usage="llama3v embed PATH ... --out STORE [options]",
        description="Embed images with SigLIP in batches and store the features.",
    )
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="images, PDFs, folders, .txt or .jsonl lists, .tar archives"
    )
    parser.add_argument("--out", metavar="STORE", help="folder of the feature store, created or extended")
    parser.add_argument(
        "--model", help="folder or Hub repository of a SigLIP or llama3v checkpoint (default: the bundled demo)"
    )
    parser.add_argument(
        "--kind",
        choices=("pooled", "patch", "visual-tokens"),
        help="kind of features (default: pooled if possible, otherwise patch)",
    )
    parser.add_argument("--batch-size", type=_batch_size, default="auto", help="tiles per batch, or auto (default)")
    workers = min(16, os.cpu_count() or 1)
    parser.add_argument("--workers", type=positive, default=workers, help=f"decoding threads (default: {workers})")
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="compute dtype (default: float32 on a CPU, float16 on a GPU)",
    )
    parser.add_argument(
        "--store-dtype",
        choices=("float16", "bfloat16", "float32", "int8"),
        help="dtype of stored rows (default: half precision)",
    )
    parser.add_argument(
        "--draft", action="store_true", help="decode large JPEGs at a smaller scale: mean error under 1 of 255"
    )
    parser.add_argument("--limit", type=positive, help="stop after this many images")
    parser.add_argument("--export", type=Path, metavar="DIR", help="export the store to embeddings.npy and index.jsonl")
    parser.add_argument("--verify", metavar="STORE", help="check every entry of a store and repair it")
    parser.add_argument(
        "--merge", nargs="+", metavar="STORE", help="merge stores into --out, such as those of ranks on several disks"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with all figures")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return parser


def _batch_size(text: str) -> int | None:
    """Parse a batch size; None for "auto"."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive integer nor auto")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.verify and (args.paths or args.out or args.export):
        parser.error("--verify STORE takes no images, no --out and no --export")
    if args.merge and (args.paths or args.verify):
        parser.error("--merge STORE STORE takes no images and no --verify")
    if not args.verify and not args.out:
        parser.error("give --out STORE (or --verify STORE)")
    if not (args.verify or args.paths or args.export or args.merge):
        parser.error("give images or folders to embed")

    def command() -> None:
        if args.verify:
            check(args.verify)
            return
        try:
            if args.merge:
                merge(args.merge, args.out)
            if args.paths:
                embed(args)
        finally:
            # If the run failed before creating the store, report that failure, not the missing store.
            if args.export and (not args.paths or (Path(args.out) / "store.json").exists()):
                export(args.out, args.export, args.json)

    run(command, args.debug, awake=True)


if __name__ == "__main__":
    main()

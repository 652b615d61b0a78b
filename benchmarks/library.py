"""Search of a folder of pictures: what an update touches, what kills lose, and how fast an unchanged folder answers.

    python benchmarks/library.py --files 20000 --kills 20      # indexed, killed, then 500 deleted, moved and changed
    python benchmarks/library.py --files 0 --rows 1000000      # a query over a million rows of so400m's width

Pictures are random and small, so that reading, SQLite and the bookkeeping count, not the tower, which is the bundled
demo's. The last line is one JSON object with all figures.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from embed import machine, say  # first: it loads OpenBLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np

from llama3v_mlx.demo import SIGLIP
from llama3v_mlx.features.library import Library
from llama3v_mlx.features.ranking import Ranking
from llama3v_mlx.features.repair import verify
from llama3v_mlx.features.store import Features, FeatureStore, StoreInfo
from llama3v_mlx.features.writer import FeatureWriter

MODEL = str(SIGLIP)
PER_FOLDER = 200
UPDATE = """
import sys
from llama3v_mlx.features.library import Library
library = Library(*sys.argv[1:4])
print("begun", flush=True)
library.update(batch_size=32)
"""


def timed(action: Callable) -> tuple[object, float, float]:
    """Result of an action, its wall time and its CPU time, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def draw(path: Path, seed: int) -> None:
    """Write a small picture that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    path.write_bytes(b"P6 8 8 255\n" + pixels.tobytes())


def make(folder: Path, count: int, distinct: int) -> list[Path]:
    paths = [folder / f"{i // PER_FOLDER:03}" / f"{i}.ppm" for i in range(count)]
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path, seed % distinct)
    return paths


def keys_of(index: Path) -> set[bytes]:
    """Images in an index that can be read; each is compared with its checksum."""
    if not (index / "store.json").exists():
        return set()
    store = FeatureStore(index)
    for _ in store.matrix():
        pass
    return set(store.keys().tolist())


def kill_while_indexing(folder: Path, index: Path, kills: int, seconds: float) -> list[int]:
    """Kill updates at random moments; return the number of images in the index after each.

    Raises:
        AssertionError: if an image that was in the index is lost.
    """
    known, sizes = keys_of(index), []
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", UPDATE, folder, MODEL, index], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(random.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = keys_of(index)
        assert known <= found, f"{len(known - found)} images are lost"
        known = found
        sizes.append(len(known))
    return sizes


def change(folder: Path, paths: list[Path], count: int, first_seed: int) -> dict:
    """Delete, move and change `count` files each; return the new state."""
    random.shuffle(paths)
    deleted, moved, changed, kept = (paths[i * count : (i + 1) * count] for i in range(4))
    kept = paths[3 * count :]
    (folder / "moved").mkdir()
    for path in deleted:
        path.unlink()
    for path in moved:
        # A copy of which the original is removed: another inode, as when it is moved between disks.
        shutil.copy2(path, folder / "moved" / path.name)
        path.unlink()
    for seed, path in enumerate(changed, first_seed):
        draw(path, seed)
    return {*kept, *changed, *(folder / "moved" / path.name for path in moved)}


def search_command(folder: Path, index: Path) -> tuple[float, float]:
    """Wall and CPU seconds of the whole command on an unchanged folder."""
    words = [sys.executable, "-m", "llama3v_mlx", "search", folder, "a red circle", "--index", index, "--json"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert len(found["hits"]) == 9
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def follow(files: int, distinct: int, kills: int, seconds: float, temporary: Path) -> dict:
    """Index a folder under kills, change it, and search it unchanged."""
    folder, index = temporary / "pictures", temporary / "index"
    paths, wall, _ = timed(lambda: make(folder, files, distinct))
    say(f"{files} pictures drawn in {wall:.0f} s")
    sizes = kill_while_indexing(folder, index, kills, seconds)
    if kills:
        say(f"{kills} kills: none lost an image; in the index after each: {', '.join(map(str, sizes))}")
    library = Library(folder, MODEL, index)
    before = len(library.store)
    changes, wall, cpu = timed(lambda: library.update(batch_size=32))
    assert changes.embedded == distinct - before and library.counts() == (files, 0), changes
    say(f"the other {changes.embedded} indexed in {wall:.1f} s, {cpu:.1f} s CPU: {changes}")
    verdict = verify(index)
    assert (verdict.good, verdict.lost) == (distinct, []), verdict
    figures = {"files": files, "kills": kills, "after_kills": sizes, "index_cpu_seconds": cpu}

    count = min(500, files // 10)
    present = change(folder, paths, count, files)
    read, whole = [], Path.read_bytes

    def counted(path: Path) -> bytes:
        if path.is_relative_to(folder):
            read.append(path)
        return whole(path)

    Path.read_bytes = counted
    changes, wall, cpu = timed(library.update)
    expected = (0, count, count, count, count, 2 * count)
    found = (changes.added, changes.moved, changes.changed, changes.deleted, changes.embedded, len(read))
    assert found == expected, (found, expected)
    say(f"{count} deleted, moved, changed: {changes}; {len(read)} files read, {changes.embedded} embedded")
    assert {Path(path) for _, path in library.store.names()} == present
    read.clear()
    changes, wall, cpu = timed(library.update)
    assert str(changes) == "no changes" and not read
    say(f"unchanged: no file read, {wall:.2f} s, {cpu:.2f} s CPU")
    Path.read_bytes = whole
    figures |= {"changed_each": count, "files_read": 2 * count, "unchanged_update_cpu_seconds": cpu}
    walls, cpus = zip(*(search_command(folder, index) for _ in range(3)), strict=True)
    say(f"llama3v search on the unchanged folder: {min(walls):.2f} s, {min(cpus):.2f} s CPU, of 3")
    return figures | {"command_wall_seconds": min(walls), "command_cpu_seconds": min(cpus)}


def query(rows: int, width: int, temporary: Path) -> dict:
    """Time queries over a store of random float32 rows."""
    store = FeatureStore.create(temporary / "rows", StoreInfo("random", "pooled", "0", width, "float32"))
    rng = np.random.default_rng(0)
    with FeatureWriter(store) as writer:
        for start in range(0, rows, 20000):
            block = mx.array(rng.standard_normal((min(20000, rows - start), 1, width), np.float32))
            writer.add([(rng.bytes(32), Features(row, (1, 1))) for row in block])
    ranking = Ranking(store)

    def best() -> list:
        ranking.refresh()
        return [hit for hit, _ in zip(ranking.best(rng.standard_normal(width)), range(9), strict=False)]

    _, wall, cpu = timed(best)
    say(f"{rows} rows of width {width}: the first query in {wall:.2f} s, {cpu:.2f} s CPU (checksums and norms)")
    warm = [timed(best)[1:] for _ in range(5)]
    wall, cpu = (min(times) for times in zip(*warm, strict=True))
    say(f"a warm query in {wall:.2f} s, {cpu:.2f} s CPU, of 5")
    return {"rows": rows, "width": width, "warm_query_seconds": wall, "warm_query_cpu_seconds": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20000, help="pictures in the folder (default: 20000)")
    parser.add_argument("--distinct", type=int, help="different pictures among them (default: all)")
    parser.add_argument("--kills", type=int, default=20, help="kills while they are indexed (default: 20)")
    parser.add_argument("--kill-seconds", type=float, default=4, help="longest time before a kill (default: 4)")
    parser.add_argument("--rows", type=int, default=0, help="rows of a store to be queried (default: none)")
    parser.add_argument("--width", type=int, default=1152, help="their width (default: 1152)")
    args = parser.parse_args()
    figures = {"benchmark": "library", "machine": machine()}
    with tempfile.TemporaryDirectory() as temporary:
        if args.files:
            figures |= follow(args.files, args.distinct or args.files, args.kills, args.kill_seconds, Path(temporary))
        if args.rows:
            figures |= query(args.rows, args.width, Path(temporary))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""Inject faults for a given time and print a table: `python -m tests.faults --minutes 60 [--only checkpoints]`.

Each case has a seed. A failure is repeated by `--only KIND --seed SEED --cases 1`, which keeps its folder.
"""

import argparse
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # before MLX is imported, and not where the suite imports this
    os.environ |= {"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"RAYON_NUM_THREADS": "1", "LLAMA3V_DEVICE": "cpu"}

from . import calls, checkpoints, images, stores  # noqa: E402
from .harness import warm_up  # noqa: E402
from .material import Material  # noqa: E402
from .shim import shim, start_with_shim  # noqa: E402

KINDS = {name: module.case for module in (checkpoints, stores, images, calls) for name in module.KINDS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, help="time for all kinds together (default: 10, unless --cases)")
    parser.add_argument("--cases", type=int, help="cases per kind")
    parser.add_argument("--only", action="append", default=[], metavar="KIND", help="kinds that begin like this")
    parser.add_argument("--seed", type=int, help="of the first case (default: random)")
    parser.add_argument("--keep", metavar="DIR", help="folder for the cases that fail")
    args = parser.parse_args(argv)
    kinds = [kind for kind in KINDS if not args.only or kind.startswith(tuple(args.only))]
    if not kinds:
        parser.error(f"no such kind; there are {', '.join(KINDS)}")
    seed = random.SystemRandom().randrange(10**9) if args.seed is None else args.seed
    minutes = args.minutes or (10 if args.cases is None else 10**6)
    with tempfile.TemporaryDirectory(prefix="llama3v-faults-") as folder:
        start_with_shim(Path(folder))
        if shim() is None:
            print("no C compiler: system calls are not disturbed", file=sys.stderr)
            kinds = [kind for kind in kinds if KINDS[kind] is not calls.case]
        os.environ["XDG_CACHE_HOME"] = folder
        return run(kinds, seed, args.cases, 60 * minutes, Path(folder), Path(args.keep) if args.keep else None)


def run(kinds: list[str], seed: int, cases: int | None, seconds: float, folder: Path, keep: Path | None) -> int:
    """Run the kinds in turn until the time is over; return the exit status."""
    warm_up()
    material = Material(folder / "material")
    material.folder.mkdir()
    material.make()
    tried, failed, spent = Counter(), Counter(), Counter()
    end = time.monotonic() + seconds
    for number in itertools.count(seed) if cases is None else range(seed, seed + cases):
        for kind in kinds:
            if time.monotonic() > end:
                break
            tic = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="case-", dir=folder) as place:
                what, problem = KINDS[kind](kind, number, material, Path(place))
                tried[kind] += 1
                if problem:
                    failed[kind] += 1
                    print(f"FAILED {kind} --seed {number} ({what}): {problem}", flush=True)
                    if keep:
                        shutil.copytree(place, keep / f"{kind}-{number}", symlinks=True)
            spent[kind] += time.monotonic() - tic
        else:
            continue
        break
    print(f"\n| kind | tried | failed | seconds |\n|---|---|---|---|\n{_rows(kinds, tried, failed, spent)}")
    print(f"seeds {seed} to {number}")
    return 1 if failed else 0


def _rows(kinds: list[str], tried: Counter, failed: Counter, spent: Counter) -> str:
    rows = [f"| {kind} | {tried[kind]} | {failed[kind]} | {spent[kind]:.0f} |" for kind in kinds]
    return "\n".join([*rows, f"| all | {tried.total()} | {failed.total()} | {spent.total():.0f} |"])


if __name__ == "__main__":
    sys.exit(main())

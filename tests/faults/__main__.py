"""Inject faults for a given time and print a table: `python -m tests.faults --minutes 60 [--only checkpoints]`.

Each case has a seed. A failure is repeated by `--only KIND --seed SEED --cases 1`, which keeps its folder.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

if __name__ == "__main__":  # before MLX is imported, and not where the suite imports this
    os.environ |= {"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"RAYON_NUM_THREADS": "1", "LLAMA3V_DEVICE": "cpu"}

from . import calls, checkpoints, images, inputs, stores  # noqa: E402
from .harness import warm_up  # noqa: E402
from .material import Material  # noqa: E402
from .shim import shim, start_with_shim  # noqa: E402

MODULES = {name: module for module in (checkpoints, stores, images, inputs, calls) for name in module.KINDS}
KINDS = tuple(MODULES)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, help="time for all kinds together (default: 10, unless --cases)")
    parser.add_argument("--cases", type=int, help="cases per kind")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="KIND",
        help="kinds that begin like this (default: all but the slow)",
    )
    parser.add_argument("--seed", type=int, help="of the first case (default: random)")
    parser.add_argument("--keep", metavar="DIR", help="folder for the cases that fail")
    parser.add_argument("--log", metavar="FILE", help="file to append each case to: kind, seed, what, problem")
    args = parser.parse_args(argv)
    kinds = [kind for kind in KINDS if kind.startswith(tuple(args.only)) or not (args.only or kind in calls.SLOW)]
    if not kinds:
        parser.error(f"no such kind; there are {', '.join(KINDS)}")
    seed = random.SystemRandom().randrange(10**9) if args.seed is None else args.seed
    minutes = args.minutes or (10 if args.cases is None else 10**6)
    with tempfile.TemporaryDirectory(prefix="llama3v-faults-") as folder:
        start_with_shim(Path(folder))
        if shim() is None:
            print("no C compiler: system calls are not disturbed", file=sys.stderr)
            kinds = [kind for kind in kinds if MODULES[kind] is not calls]
        os.environ["XDG_CACHE_HOME"] = folder
        keep = Path(args.keep).absolute() if args.keep else None
        with open(args.log or os.devnull, "a", encoding="utf-8", buffering=1) as log:
            material = Material(Path(folder).resolve() / "material")
            with contextlib.closing(material):
                return run(kinds, seed, args.cases, 60 * minutes, material, keep, log)


def run(
    kinds: list[str], seed: int, cases: int | None, seconds: float, material: Material, keep: Path | None, log: TextIO
) -> int:
    """Run the kinds in turn until the time is over; return the exit status."""
    warm_up()
    material.folder.mkdir()
    material.make()
    tried, failed, spent = Counter(), Counter(), Counter()
    end = time.monotonic() + seconds
    last = sys.maxsize if cases is None else seed + cases
    waiting = {kind: seed for kind in kinds}
    while waiting and time.monotonic() < end:
        for kind, start in list(waiting.items()):
            if time.monotonic() > end:
                break
            tic = time.monotonic()
            numbers = range(start, min(start + MODULES[kind].BATCHED.get(kind, 1), last))
            with tempfile.TemporaryDirectory(prefix="case-", dir=material.folder.parent) as place:
                for number, (what, problem) in zip(numbers, _cases(kind, numbers, material, Path(place)), strict=True):
                    log.write(json.dumps([kind, number, what, problem]) + "\n")
                    tried[kind] += 1
                    if problem:
                        failed[kind] += 1
                        print(f"FAILED {kind} --seed {number} ({what}): {problem}", flush=True)
                        if keep:
                            with contextlib.suppress(shutil.Error):  # pipes and sockets
                                shutil.copytree(place, keep / f"{kind}-{number}", symlinks=True)
            spent[kind] += time.monotonic() - tic
            waiting[kind] = numbers.stop
            if numbers.stop == last:
                del waiting[kind]
    print(f"\n| kind | tried | failed | seconds |\n|---|---|---|---|\n{_rows(kinds, tried, failed, spent)}")
    for kind, count in calls.beyond.items():
        print(f"{kind}: {count} of them ended where Python cannot catch it")
    print(f"seeds from {seed}")
    return 1 if failed else 0


def _cases(kind: str, numbers: range, material: Material, place: Path) -> list[tuple[str, str | None]]:
    """Run the cases of these numbers in one child; what fails there is run again alone, as `--cases 1` does."""
    module, results = MODULES[kind], []
    if kind not in module.BATCHED:
        return [module.case(kind, number, material, place) for number in numbers]
    for number, (what, problem) in zip(numbers, module.cases(kind, numbers, material, place), strict=True):
        if problem and len(numbers) > 1:
            (place / "alone" / str(number)).mkdir(parents=True)
            [(_, alone)] = module.cases(kind, range(number, number + 1), material, place / "alone" / str(number))
            problem = alone or f"not alone, but after {numbers[0]} to {number - 1}: {problem}"
        results.append((what, problem))
    return results


def _rows(kinds: list[str], tried: Counter, failed: Counter, spent: Counter) -> str:
    rows = [f"| {kind} | {tried[kind]} | {failed[kind]} | {spent[kind]:.0f} |" for kind in kinds]
    return "\n".join([*rows, f"| all | {tried.total()} | {failed.total()} | {spent.total():.0f} |"])


if __name__ == "__main__":
    sys.exit(main())

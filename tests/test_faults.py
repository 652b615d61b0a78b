"""A few of the faults of `python -m tests.faults` in the suite, and (marked `faults`) ten minutes of them.

Seeds are fixed, so that the verdict is the same on every machine.
"""

import os
import sys

import pytest
from conftest import ROOT

from tests.faults.__main__ import KINDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and watches files by inotify")


def run(run_python, *args: object) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = run_python("-m", "tests.faults", *args, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sample(run_python) -> None:
    """One case of the kinds that take no more than a moment, on another file or call each."""
    written = (
        f"{what}:{name}" for what in ("calls", "signals", "power") for name in ("convert", "embed", "prompt-cache")
    )
    kinds = [kind for kind in KINDS if kind.startswith(("checkpoints:", "stores:", "images:", "inputs:", *written))]
    out = run(run_python, "--cases", 1, "--seed", 20, *(word for kind in kinds for word in ("--only", kind)))
    assert f"| {kinds[0]} | 1 | 0 |" in out


@pytest.mark.faults
def test_ten_minutes(run_python) -> None:
    """What is made for the cases, and the last case, take the rest of the ten."""
    print(run(run_python, "--minutes", 8))

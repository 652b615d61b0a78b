"""A few of the faults of `python -m tests.faults` in the suite, and (marked `faults`) ten minutes of them.

Seeds are fixed, so that the verdict is the same on every machine.
"""

import os
import sys

import pytest
from conftest import ROOT

from tests.faults.__main__ import KINDS
from tests.faults.more import MORE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and watches files by inotify")


def run(run_python, *args: object) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = run_python("-m", "tests.faults", *args, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_sample(run_python) -> None:
    """One case of most kinds, on another file or call each."""
    slow = ("memory:", "kills:", "names:", "vanishing:", "power:pre", "power:fine", "signals:pre", "signals:fine")
    slow += ("calls:fine", "calls:index", "calls:ask", "signals:index", "signals:ask", "signals:features")
    slow += ("power:features", "power:index", "power:ask", "power:synthesize", "signals:synthesize")
    big = MORE.keys() - {"synthesize"}
    kinds = [kind for kind in KINDS if not kind.startswith(slow) and kind.partition(":")[2] not in big]
    out = run(run_python, "--cases", 1, "--seed", 20, *(word for kind in kinds for word in ("--only", kind)))
    assert f"| {kinds[0]} | 1 | 0 |" in out


@pytest.mark.faults
def test_ten_minutes(run_python) -> None:
    """What is made for the cases, and the last case, take the rest of the ten."""
    print(run(run_python, "--minutes", 8))

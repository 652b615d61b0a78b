"""System calls that fail, are cut short, or are hit by a signal; and what a loss of power leaves.

Each command is run once undisturbed, which counts its calls and gives the result to compare with. Then, case by case,
the n-th call is disturbed, what existed before is checked, and the same command is run again.
"""

import errno
import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from . import shim
from .harness import CPU_SECONDS, CRASHED, WALL_SECONDS, Ended, complaint, limit_memory, run_child
from .material import Material
from .more import MORE
from .power import Power
from .written import WRITTEN, Written

NOT_UTF8 = "\udcff\udcfe"
ERRORS = (errno.ENOSPC, errno.EIO, errno.EINTR, errno.EACCES, errno.EROFS)
MODES = [(shim.FAIL, code) for code in ERRORS] + [
    (shim.FAIL_ALL, errno.ENOSPC),
    (shim.FAIL_ALL, errno.EIO),
    (shim.SHORT, 0),
]
SIGNALS = [(shim.SIGNAL, code) for code in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
COMMANDS = WRITTEN | MORE
# Of the folder that a command works in: what a terminal, a shell or a pattern obeys, what is no UTF-8, what is long.
NAMES = ("\x1b[2J\x1b]0;title\x07", "new\nline\r", "\u202egnp\x9b", NOT_UTF8, "[a]*?", "#3-5", "~ $HOME %s {0}'\"")
NAMES += ("e\u0301", "a.pdf", "x" * 200, "-", " ")
WHATS = ("calls", "signals", "power", "kills", "memory", "names")
NOT_TRIED = ("memory:server",)  # its client is in the same process
KINDS = tuple(kind for what in WHATS for name in COMMANDS if (kind := f"{what}:{name}") not in NOT_TRIED)
SLOW = {kind for kind in KINDS if COMMANDS[kind.partition(":")[2]].slow > 1}
BATCHED: dict[str, int] = {}


def case(kind: str, number: int, material: Material, place: Path) -> tuple[str, str | None]:
    """Disturb one call of a command and run it again; consecutive numbers go through all calls and modes."""
    what, _, name = kind.partition(":")
    written = COMMANDS[name]
    count, seconds, wanted = _undisturbed(name, written, material, place.parent)
    if what == "names":
        chosen = NAMES[number % len(NAMES)]
        if written.stdin(place):  # a line of which has the name
            chosen = chosen.replace("\n", "").replace("\r", "")
        return repr(chosen), _judge_name(written, material, _new(material, place / chosen / name, written), wanted)
    here = _new(material, place / name, written)
    if what in ("kills", "memory"):
        share = random.Random(f"{kind} {number}").random()
        if what == "kills":
            ended = replace(_run(written, material, here, seconds=share * seconds), timed_out=False)
            return f"killed after {share:.0%} of its time", _judge(written, material, here, ended, wanted)
        room = int(4e5 * 1000**share)  # 0.4 to 400 MB
        ended = _run(written, material, here, memory=room)
        if _is_beyond_python(ended):
            beyond[kind] += 1
            ended = replace(ended, code=-signal.SIGKILL)
        return f"with {room / 1e6:.1f} MB more", _judge(written, material, here, ended, wanted)
    modes = {"calls": MODES, "signals": SIGNALS, "power": [(shim.SIGNAL, signal.SIGKILL)]}[what]
    at, (mode, code) = number % count + 1, modes[number // count % len(modes)]
    power = Power(here, place / "kept") if what == "power" else None
    ended = _run(written, material, here, mode, at, code, kept=power and power.kept)
    _, log = shim.seen()
    if power:
        power.lose(random.Random(f"{kind} {number}"), log)
    hit = next((" ".join(line) for line in log if line[1] in ("failed", "signal")), "")
    described = f"call {at} of {count}, {errno.errorcode.get(code, code) if what == 'calls' else code}: {hit}"
    return described, _judge(written, material, here, ended, wanted)


def _judge(written: Written, material: Material, place: Path, ended: Ended, wanted: object) -> str | None:
    names = (str(place), "out of memory", "failed to map segment")
    seconds = written.slow * CPU_SECONDS
    problem = (
        complaint(ended, names, seconds=seconds)
        if ended.timed_out or ended.code in (0, 1, CRASHED)
        else _interrupted(ended)
    )
    problem = problem or written.kept(material, place, wanted)
    if problem:
        return problem
    if ended.code == 0 and not written.goes_on(ended):
        found = written.result(material, place)
        return None if found == wanted else f"succeeded, but the result differs: {_difference(found, wanted)}"
    again = _run(written, material, place)
    is_done = ended.code != 1 and "exists already" in again.errors  # stopped after the last step, the new name
    if again.code and not is_done:
        return f"the second run failed: {again.errors[-400:]!r}"
    found = written.result(material, place)
    return None if found == wanted else f"the second run's result differs: {_difference(found, wanted)}"


def _judge_name(written: Written, material: Material, place: Path, wanted: object) -> str | None:
    ended = _run(written, material, place)
    problem = complaint(ended, seconds=written.slow * CPU_SECONDS)
    if problem or ended.code:
        return problem or (None if "is not valid UTF-8" in ended.errors else ended.errors)
    found = written.result(material, place)
    return None if found == wanted else f"the result differs: {_difference(found, wanted)}"


beyond: Counter[str] = Counter()  # by kind


def _is_beyond_python(ended: Ended) -> bool:
    """Whether a shortage of memory ended a command where Python cannot catch it; nothing may be half-written even then.

    MLX aborts if it cannot start a thread or if an allocation fails on a thread of its own, and the loader of libraries
    exits.
    """
    aborted = ended.code == -signal.SIGABRT and "terminate called" in ended.errors
    return aborted or ended.code == -signal.SIGSEGV or "thread-local data" in ended.errors


def _interrupted(ended: Ended) -> str | None:
    if ended.outlived:
        return "what it had started goes on"
    if ended.code not in (130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP) or "Traceback" in ended.errors:
        return f"exit status {ended.code}: {ended.errors[-300:]!r}"
    return None


def _difference(found: object, wanted: object) -> str:
    if isinstance(found, dict):
        return str(sorted(set(found.items()) ^ set(wanted.items()))[:4])
    if isinstance(found, tuple):
        return " and ".join(_difference(*pair) for pair in zip(found, wanted, strict=True) if pair[0] != pair[1])
    return f"{str(found)[:300]} instead of {str(wanted)[:300]}"


_references: dict[str, tuple[int, float, object]] = {}


def _undisturbed(name: str, written: Written, material: Material, folder: Path) -> tuple[int, float, object]:
    """Number of calls of an undisturbed run, its seconds, and its result."""
    if name not in _references:
        place = _new(material, folder / "undisturbed" / name, written)
        tic = time.monotonic()
        ended = _run(written, material, place, shim.COUNT)
        seconds = time.monotonic() - tic
        count, _ = shim.seen()
        if ended.code or not count:
            raise RuntimeError(f"{name}: nothing was disturbed, but exit status {ended.code}: {ended.errors}")
        _references[name] = count, seconds, written.result(material, place)
    return _references[name]


def _new(material: Material, place: Path, written: Written) -> Path:
    place.mkdir(parents=True)
    written.prepare(material, place)
    return place


def _run(
    written: Written,
    material: Material,
    place: Path,
    mode: int = shim.OFF,
    at: int = 0,
    code: int = 0,
    seconds: float | None = None,
    memory: int | None = None,
    kept: Path | None = None,
) -> Ended:
    """Run a command in a child; see `shim.arm`. It is killed after `seconds`, and may map `memory` bytes more."""
    action = written.action(material, place)

    def disturbed() -> None:
        shim.arm(place, mode, at, code, kept)
        if memory is not None:
            limit_memory(memory)
        action()

    return run_child(disturbed, place, os.fsencode(written.stdin(place)), seconds or written.slow * WALL_SECONDS)

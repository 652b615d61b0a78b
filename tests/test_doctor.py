"""The doctor command: its report on a machine, and its detection of wrong results."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from llama3v_mlx import device, doctor, memory
from llama3v_mlx.models import llama3v, siglip
from llama3v_mlx.selftest import GOLDEN, Check, compare, observe


@pytest.mark.parametrize("free", [10**9, 10**12])
def test_what_is_right_is_told(run_main, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    done = run_main("llama3v_mlx.doctor", "--no-speed")
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("This machine", device.chip(), mx.__version__, "projector     ok", "tokens        ok     identical"):
        assert text in done.stdout
    assert "WRONG" not in done.stdout and max(map(len, done.stdout.splitlines())) < 120


def test_json_has_all_figures(run_main, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(doctor, "measure", lambda compute: calls.append(compute()) or 0.5)
    monkeypatch.setattr(device, "matmul_peak", lambda dtype: 2e11)
    done = run_main("llama3v_mlx.doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert figures["right"] is True
    assert [check["stage"] for check in figures["checks"]] == ["tiles", "tower", "projector", "tokens", "embeddings"]
    assert [row["bits"] for row in figures["fits"]] == [16, 8, 6, 5, 4, 3]
    speed = figures["speed"]
    assert [y.shape for y in calls] == [(1, 1024, 1152), (1, 1, 32064), (1, 1, 4096), (1, 8, 4096)]
    assert speed["tiles_per_second"] == pytest.approx(1 / (27 * 0.5))
    assert speed["tokens_per_second"] == pytest.approx(1 / (32 * 0.5 + 4 * 0.5))
    assert speed["first_token_seconds"] == pytest.approx(10 * 27 * 0.5 + 1040 * 32 * 0.5 / 8)
    assert (speed["matmul_tflops"], speed["extrapolated_from_layers"]) == (0.2, 1)


def test_a_wrong_tower_is_found(run_main, monkeypatch) -> None:
    """A GELU of the wrong kind differs by under 1e-3 per value, so answers may well be the same."""
    monkeypatch.setattr(siglip.linux_cpu, "gelu", lambda x: x * mx.sigmoid(1.702 * x))
    done = run_main("llama3v_mlx.doctor", "--no-speed")
    assert done.returncode == 1
    assert "tiles         ok" in done.stdout and "tower         WRONG" in done.stdout
    assert done.stderr.startswith("error: wrong results on this machine: tower, ") and done.stderr.count("\n") == 1


def test_no_number_is_not_right() -> None:
    assert not Check("tower", float("nan"), 1.0).passed
    golden = {name: np.array(array) for name, array in mx.load(str(GOLDEN)).items()}
    golden["tokens"] = golden["tokens"][:-1]
    golden["tower"][3] = np.nan
    assert {check.stage for check in compare(golden, mx.float32) if not check.passed} == {"tokens", "tower"}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_within_its_tolerance(dtype: mx.Dtype) -> None:
    found, computed = observe(dtype)
    checks = compare(found, computed)
    assert computed == dtype and all(check.passed for check in checks), checks
    assert max(check.error / check.tolerance for check in checks if check.tolerance) < 0.5


@pytest.mark.parametrize(
    ("gigabytes", "bits", "low_memory"), [(5.73, 4, True), (11.45, 8, False), (28.6, 8, False), (2.0, None, False)]
)
def test_advice_for_real_macs(gigabytes: float, bits: int | None, low_memory: bool, monkeypatch) -> None:
    limit = int(gigabytes * 1e9)
    for module in (device, memory, llama3v):
        monkeypatch.setattr(module, "memory_limit", lambda: limit)
    monkeypatch.setenv(device.PRETEND, "1")
    rows = doctor.fits()
    assert next(row["bytes"] for row in rows if row["bits"] == 4) == pytest.approx(6.6e9, rel=0.1)
    text = doctor.advice(rows, disk_free=10**12)
    if bits is None:
        assert text.startswith("no size fits")
        return
    assert f"--q-bits {bits}" in text and ("--low-memory" in text) is low_memory
    assert "GB of disk" in doctor.advice(rows, disk_free=10**9)
    fitting = next(row for row in rows if row["bits"] == bits)
    assert fitting["low_memory_bytes" if low_memory else "bytes"] <= limit


def test_speeds_are_marked_as_extrapolated() -> None:
    checks = [{"stage": "tower", "error": 2e-3, "tolerance": 1e-2, "passed": True, "dtype": "float16"}]
    speed = {"dtype": "float16", "matmul_tflops": 13.2, "extrapolated_from_layers": 4, "tiles_per_second": 4.0}
    speed |= {"prompt_tokens_per_second": 300.0, "tokens_per_second": 41.0, "first_token_seconds": 6.1}
    figures = {"machine": doctor.machine(), "fits": [], "advice": "", "checks": checks, "speed": speed}
    text = doctor.report(figures)
    assert "Extrapolated from 4 layers of the real width" in text and "error 2.0e-03, at most 1e-02" in text


def test_a_matrix_product_is_measured() -> None:
    assert 1e8 < device.matmul_peak(mx.float32) < 1e17

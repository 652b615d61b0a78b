"""Calibrated quantization: GPTQ, the choice of bits, and verification on prompts."""

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from llama3v_mlx import generate, load
from llama3v_mlx.checkpoint import CheckpointError, read_config, read_tensors
from llama3v_mlx.conversion import calibrate as calibrating
from llama3v_mlx.conversion.agreement import verify_rows
from llama3v_mlx.conversion.calibrate import EMBEDDING, HEAD, LLAMA
from llama3v_mlx.conversion.gptq import Inputs, pack, quantize
from llama3v_mlx.conversion.rows import Row, read_sets
from llama3v_mlx.conversion.sensitivity import BITS, allocate, measure
from llama3v_mlx.conversion.shard_writer import Plan, ShardWriter, make_plan
from llama3v_mlx.conversion.verify import Tensor
from llama3v_mlx.convert import convert, main
from llama3v_mlx.loading import load_model
from llama3v_mlx.models.llama3v import Model


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Rows with one image, with two, without any, and without an answer."""
    folder = tmp_path_factory.mktemp("prompts")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (56, 56 + 60 * i, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "Two red stars."}]
    rows = [{"image": f"{i}.png", "conversations": talk} for i in range(4)]
    rows.append({"image": ["0.png", "1.png"], "prompt": "How many shapes are there?"})
    rows.append(
        {"conversations": [{"from": "human", "value": "What is a star?"}, {"from": "gpt", "value": "A shape."}]}
    )
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "rows.jsonl"


def product_error(weight: mx.array, x: mx.array, y: mx.array, packed: tuple, bits: int) -> float:
    """How far products of the quantized matrix with x are from those of the original with y."""
    quantized = mx.dequantize(*packed, group_size=32, bits=bits)
    return (x @ quantized.T - y @ weight.T).square().sum().item()


@pytest.mark.parametrize("bits", BITS)
def test_packs_as_mlx_does(bits: int) -> None:
    codes = mx.random.randint(0, 2**bits, (3, 64), key=mx.random.key(0))
    one, none = mx.ones((3, 2)), mx.zeros((3, 2))
    assert mx.array_equal(mx.dequantize(pack(codes.T, bits), one, none, group_size=32, bits=bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_products_with_the_inputs_change_less(bits: int) -> None:
    """Correlated inputs, that earlier layers have changed."""
    a, b, c, d = mx.random.split(mx.random.key(0), 4)
    weight, mix = mx.random.normal((48, 128), key=a), mx.random.normal((16, 128), key=b)
    tokens = mx.random.normal((400, 16), key=c)
    y, x = tokens @ mix, tokens @ (mix + 0.3 * mx.random.normal(mix.shape, key=d))
    inputs = Inputs()
    inputs.add(x[:200], y[:200])
    inputs.add(x[200:], y[200:])
    plain = product_error(weight, x, y, mx.quantize(weight, group_size=32, bits=bits), bits)
    undrifted = Inputs()
    undrifted.add(x, x)
    calibrated, uncorrected = (
        product_error(weight, x, y, quantize(Tensor(weight), own, 32, bits, mx.float32), bits)
        for own in (inputs, undrifted)
    )
    assert 3 * calibrated < plain
    assert 3 * calibrated < uncorrected


def columns_one_by_one(w: np.ndarray, x: np.ndarray, y: np.ndarray, group_size: int, bits: int) -> np.ndarray:
    """GPTQ by its definition, in float64: codes (out, in)."""
    hessian = x.T @ x
    order = np.argsort(-np.diag(hessian))
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    w = w + w @ (y - x).T @ x @ np.linalg.inv(hessian)
    _, scales, biases = mx.quantize(mx.array(w.astype(np.float32)), group_size=group_size, bits=bits)
    scales, biases = np.array(scales), np.array(biases)
    codes = np.zeros(w.shape, np.uint8)
    for i, column in enumerate(order):
        inverse = np.linalg.inv(hessian[order[i:]][:, order[i:]])
        s, b = scales[:, column // group_size], biases[:, column // group_size]
        codes[:, column] = np.clip(np.round((w[:, column] - b) / s), 0, 2**bits - 1)
        error = (w[:, column] - (codes[:, column] * s + b)) / inverse[0, 0]
        w[:, order[i:]] -= np.outer(error, inverse[0])
    return codes


@pytest.mark.parametrize("outputs", [24, 160])
def test_equals_the_definition(outputs: int, monkeypatch) -> None:
    """In halves, panels, chunks of tokens and of rows, with fewer and more outputs than inputs."""
    monkeypatch.setattr("llama3v_mlx.conversion.gptq.TOKENS", 150)
    monkeypatch.setattr("llama3v_mlx.conversion.gptq.PANEL", 40)
    monkeypatch.setattr("llama3v_mlx.conversion.gptq.ROWS_BYTES", 4 * 96 * 70)
    a, b, c, d = mx.random.split(mx.random.key(0), 4)
    weight, mix = mx.random.normal((outputs, 96), key=a), mx.random.normal((96, 96), key=b)
    x = mx.random.normal((400, 96), key=c) @ mix
    y = x + mx.random.normal(x.shape, key=d)
    inputs = Inputs()
    for part in (slice(0, 100), slice(100, 200), slice(200, 400)):
        inputs.add(x[None, part], y[None, part])
    packed, *_ = quantize(Tensor(weight), inputs, 32, 4, mx.float32)
    codes = columns_one_by_one(*(np.array(array, np.float64) for array in (weight, x, y)), 32, 4)
    ones, zeros = mx.ones((outputs, 3)), mx.zeros((outputs, 3))
    same = np.array(mx.dequantize(packed, ones, zeros, group_size=32, bits=4)) == codes
    assert same.mean() > 0.98  # a tie may be rounded the other way, and later columns of that row follow


def test_halves_of_a_layer_are_the_layer(tiny: Path) -> None:
    layer = load_model(tiny, read_config(tiny), mx.float32).layers[0]
    x = mx.random.normal((1, 5, 64), key=mx.random.key(0))
    assert mx.allclose(calibrating.mlp(layer, calibrating.attention(layer, x)), layer(x, "causal"), atol=1e-6)


def test_degenerate_matrices() -> None:
    """Inputs that are always 0, constant rows, and more columns than tokens."""
    weight = mx.concatenate([mx.zeros((2, 64)), mx.full((2, 64), 3.0), mx.ones((2, 64))])
    inputs = Inputs()
    inputs.add(*[mx.zeros((5, 64))] * 2)
    for own in (inputs, None):
        packed = quantize(Tensor(weight), own, 32, 4, mx.float16)
        assert mx.allclose(mx.dequantize(*packed, group_size=32, bits=4).astype(mx.float32), weight, atol=1e-2)


def test_inputs_that_are_not_finite_or_nearly_dependent() -> None:
    weight, x = mx.random.normal((2, 8, 64), key=mx.random.key(0))
    same = mx.ones((8, 64)) * 1e4 + x * 1e-3
    inputs, broken = Inputs(), Inputs()
    inputs.add(same, same)
    packed = quantize(Tensor(weight), inputs, 32, 8, mx.float32)
    assert mx.isfinite(mx.dequantize(*packed, group_size=32, bits=8)).all().item()
    broken.add(x * mx.inf, x)
    with pytest.raises(ArithmeticError, match="not finite"):
        quantize(Tensor(weight), broken, 32, 4, mx.float32)


@pytest.fixture(scope="module")
def calibrated(tiny: Path, prompts: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("calibrated")
    convert(tiny, folder / "plain", quantize=True, q_bits=3, q_group_size=32)
    convert(tiny, folder / "gptq", quantize=True, q_bits=3, q_group_size=32, calibrate=prompts)
    sensitive = {"quant_predicate": "sensitive", "q_target_bpw": 4.5, "q_group_size": 32}
    convert(tiny, folder / "sensitive", quantize=True, calibrate=prompts, **sensitive)
    return {path.name: path for path in folder.iterdir()}


def test_same_bytes_and_closer_answers(tiny: Path, prompts: Path, calibrated: dict[str, Path]) -> None:
    shapes = [{n: (t.shape, t.dtype) for n, t in read_tensors(calibrated[k]).items()} for k in ("plain", "gptq")]
    assert shapes[0] == shapes[1]
    assert read_config(calibrated["plain"]) == read_config(calibrated["gptq"])
    rows, _ = read_sets(tiny, read_config(tiny), False, prompts, None, None, None)
    plain, gptq = (verify_rows(tiny, calibrated[name], rows) for name in ("plain", "gptq"))
    assert plain.tokens == gptq.tokens == sum(len(row.positions) for row in rows)
    assert gptq.kl < plain.kl / 10  # a hundredth, on the prompts that it was calibrated with
    assert verify_rows(tiny, tiny, rows).kl < 1e-6


def logprobs_of(model: Model, rows: list[Row]) -> mx.array:
    """Log-probabilities (positions, vocab_size) of a loaded model at the rows' positions."""
    logits = []
    for row in rows:
        h = model.embed_inputs(mx.array(row.ids), row.images)[None]
        logits.append(model(mx.array(row.ids)[None], input_embeddings=h)[0, mx.array(row.positions)])
    logits = mx.concatenate(logits).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def test_verification_is_that_of_the_loaded_model(tiny: Path, prompts: Path, calibrated: dict[str, Path]) -> None:
    rows, _ = read_sets(tiny, read_config(tiny), False, prompts, None, None, None)
    before, after = (logprobs_of(load(folder, dtype=mx.float32)[0], rows) for folder in (tiny, calibrated["plain"]))
    kl = (mx.exp(before) * (before - after)).sum(axis=-1).mean().item()
    assert verify_rows(tiny, calibrated["plain"], rows).kl == pytest.approx(kl, rel=0.02)


def test_sensitive_keeps_to_its_target(tiny: Path, calibrated: dict[str, Path]) -> None:
    tensors = read_tensors(calibrated["sensitive"])
    num_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("language_model."))
    weights = sum(tensor.size for name, tensor in read_tensors(tiny).items() if name.startswith("llm."))
    assert 4 < 8 * num_bytes / weights <= 4.5
    bits = {own["bits"] for own in read_config(calibrated["sensitive"])["quantization"].values() if type(own) is dict}
    assert bits <= set(BITS) and len(bits) > 1
    card = (calibrated["sensitive"] / "README.md").read_text(encoding="utf-8")
    form = f"{min(bits)}- to {max(bits)}-bit affine, groups of 32, {8 * num_bytes / weights:.2f} bits per weight."
    assert form in card
    assert generate(*load(calibrated["sensitive"]), "What is it?", temperature=0, max_tokens=2) is not None


def test_measured_is_the_divergence_of_quantizing_one_matrix(tiny: Path, prompts: Path) -> None:
    config = read_config(tiny) | {"dtype": "float16"}
    plan = make_plan(tiny, config, read_tensors(tiny), {"group_size": 32, "bits": 4, "mode": "affine"})
    rows, _ = read_sets(tiny, config, False, prompts, None, None, None)
    scores = measure(tiny, plan, rows)
    assert scores.keys() == plan.quantized.keys()
    model = load_model(tiny, config, mx.float32)
    modules, before = dict(model.named_modules()), logprobs_of(model, rows)
    for path in (EMBEDDING, f"{LLAMA}.layers.0.self_attn.v_proj", f"{LLAMA}.layers.1.mlp.down_proj", HEAD):
        weight = modules[path].weight
        packed = mx.quantize(weight.astype(mx.float16), group_size=32, bits=2)
        modules[path].weight = mx.dequantize(*packed, group_size=32, bits=2).astype(mx.float32)
        kl = (mx.exp(before) * (before - logprobs_of(model, rows))).sum().item()
        modules[path].weight = weight
        assert kl / 6 < scores[path][2] < 6 * kl  # of few and random gradients: 0.4 to 1.3 times


def test_bits_go_where_they_matter() -> None:
    costs = {name: {bits: bits for bits in BITS} for name in ("a", "b")}
    scores = {"a": {bits: 100 * 4.0**-bits for bits in BITS}, "b": {bits: 4.0**-bits for bits in BITS}}
    assert allocate(scores, costs, 9) == {"a": 6, "b": 3}
    assert allocate(scores, costs, 4) == {"a": 2, "b": 2}


def failure(capsys, code: int, *argv: str | Path) -> str:
    with pytest.raises(SystemExit) as exited:
        main([str(arg) for arg in argv])
    output = capsys.readouterr()
    assert exited.value.code == code and output.out == ""
    return output.err.splitlines()[-1]


@pytest.mark.parametrize(
    "row, reason",
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ('{"prompt": "%s"}' % ("word " * 1000), "too long for the context of 2048"),
        ("[]", "has no list of conversations"),
        ('{"image": "gone.png", "prompt": "What?"}', "gone.png"),
        ('{"image": [1], "prompt": "What?"}', "a path or a list of paths"),
        ('{"conversations": [{"from": "human", "value": "What?"}]}', "human and gpt"),
    ],
)
def test_an_unusable_row_is_named(tiny: Path, tmp_path: Path, capsys, row: str, reason: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What?"}\n' + row)
    out = tmp_path / "out"
    options = ("--hf-path", tiny, "--mlx-path", out, "-q", "--q-group-size", 32, "--calibrate")
    line = failure(capsys, 1, *options, tmp_path / "rows.jsonl")
    assert line.startswith(f"error: {tmp_path / 'rows.jsonl'}, row 2: ") and reason in line
    assert not out.exists()


@pytest.mark.parametrize("text", [None, "", "\n"])
def test_a_file_without_rows(tiny: Path, tmp_path: Path, capsys, text: str | None) -> None:
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    line = failure(
        capsys, 1, "--hf-path", tiny, "--mlx-path", tmp_path / "out", "-q", "--calibrate", tmp_path / "rows.jsonl"
    )
    assert line.startswith(f"error: {tmp_path / 'rows.jsonl'}: ")


@pytest.mark.parametrize(
    "options, reason",
    [
        ("--calibrate x", "without -q"),
        ("-q --q-mode mxfp4 --calibrate x", "affine only"),
        ("-q --q-mode nvfp4 --calibrate x", "affine only"),
        ("-q --quant-predicate sensitive --q-target-bpw 4.5", "needs --calibrate"),
        ("-q --quant-predicate sensitive --calibrate x", "go together"),
        ("-q --q-target-bpw 4.5 --calibrate x", "go together"),
        ("-q --q-bits 3 --quant-predicate sensitive --q-target-bpw 4.5 --calibrate x", "drop"),
        ("-q --q-bits 4 --quant-predicate sensitive --q-target-bpw 4.5 --calibrate x", "drop"),
        ("--q-target-bpw 4.5", "without -q"),
        ("--image-folder x", "needs --calibrate"),
        ("--verify --verify-prompts 3", "needs --calibrate"),
        ("-q --calibrate x --verify-prompts 3", "without --verify"),
        ("--verify-data x", "without --verify"),
    ],
)
def test_options_that_do_not_combine(capsys, options: str, reason: str) -> None:
    assert reason in failure(capsys, 2, "--hf-path", "x", *options.split())


def test_a_conversion_is_not_calibrated_again(
    calibrated: dict[str, Path], prompts: Path, tmp_path: Path, capsys
) -> None:
    options = ("--hf-path", calibrated["plain"], "--mlx-path", tmp_path / "out", "-q", "--calibrate", prompts)
    assert "quantized already" in failure(capsys, 1, *options)


def test_a_target_out_of_reach(tiny: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    options = ("-q", "--calibrate", prompts, "--quant-predicate", "sensitive", "--q-target-bpw")
    for target in ("1.9", "nan"):
        line = failure(capsys, 1, "--hf-path", tiny, "--mlx-path", tmp_path / "out", *options, target)
        assert f"--q-target-bpw {target} is less than" in line


def test_too_little_memory(tiny: Path, prompts: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(calibrating, "memory_limit", lambda: 10**9)
    line = failure(capsys, 1, "--hf-path", tiny, "--mlx-path", tmp_path / "out", "-q", "--calibrate", prompts)
    assert "GB of memory" in line and not list(tmp_path.iterdir())


def test_rows_to_verify_with_are_not_calibrated_with(tiny: Path, prompts: Path, tmp_path: Path, capsys) -> None:
    config = read_config(tiny)
    rows, held_out = read_sets(tiny, config, True, prompts, None, None, 2)
    assert ([len(row.images) for row in rows], [len(row.images) for row in held_out]) == ([1, 1, 1, 1], [2, 0])
    options = ("--hf-path", tiny, "--mlx-path", tmp_path / "out", "-q", "--calibrate", prompts, "--verify")
    assert "too few" in failure(capsys, 1, *options, "--verify-prompts", 6)
    main([*map(str, options), "--verify-prompts", "2", "--q-group-size", "32"])
    summary = re.search("\n(2 held-out prompts, .*)\n", capsys.readouterr().out)[1]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "4-bit affine, groups of 32, 5." in card
    assert f"Calibrated with GPTQ on 4 prompts with 4 images.\nCompared with its source: {summary}.\n" in card
    main(["--hf-path", str(tiny), "--mlx-path", str(tmp_path / "out"), "--verify", "--verify-data", str(prompts)])
    assert "\n6 held-out prompts, " in capsys.readouterr().out


def test_no_more_rows_are_read_than_are_used(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    """The whole of a training set may be given: the images of what is not used are not even looked for."""
    rows = [{"prompt": "What?"}] * 3 + [{"image": "gone.png", "prompt": "What?"}] + [{"prompt": "What?"}] * 2
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8-sig")  # as Windows saves it
    monkeypatch.setattr("llama3v_mlx.conversion.rows.MAX_TOKENS", 25)
    used, held_out = read_sets(tiny, read_config(tiny), True, tmp_path / "rows.json", None, None, 2)
    assert sum(len(row.ids) for row in used) <= 25 and 0 < len(used) < 3 and len(held_out) == 2


def test_values_beyond_float16_and_float32() -> None:
    plan = Plan(mx.float16, {"layer": {"group_size": 32, "bits": 4, "mode": "affine"}}, {}, 0)
    quantizer = calibrating.Quantizer(plan, ShardWriter(Path()))
    with pytest.raises(CheckpointError, match="layer.weight has values up to 1e\\+06, which float16 cannot represent"):
        quantizer("layer", Tensor(mx.full((4, 32), 1e6)), None)
    with pytest.raises(CheckpointError, match="layer.weight has values that are not finite"):
        quantizer("layer", Tensor(mx.ones((4, 32)).at[2, 3].add(mx.nan)), None)
    inputs = Inputs()
    inputs.add(mx.full((8, 32), 1e30), mx.ones((8, 32)))
    with pytest.raises(CheckpointError, match="layer: cannot be calibrated: the inputs are not finite"):
        quantizer("layer", Tensor(mx.ones((4, 32))), inputs)

"""Training from stored features: the data, the loss, the run folder, and the commands."""

import json
import os
import shutil
import signal
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from llama3v_mlx import load, train
from llama3v_mlx.checkpoint import CheckpointError
from llama3v_mlx.cli import check_plot
from llama3v_mlx.features.store import FeatureStore
from llama3v_mlx.image import load_image
from llama3v_mlx.tiling import TiledImage
from llama3v_mlx.training.batch import collate
from llama3v_mlx.training.data import DataError, Dialogues, StoredTiler, messages_of
from llama3v_mlx.training.prepare import say_rejected
from llama3v_mlx.training.trainer import Trainer, TrainingError, answer_loss
from tools.demo import world

ROWS = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny: Path) -> Path:
    """A folder with a converted model, pictures, `data.jsonl` with two turns about each, and both feature stores."""
    from llama3v_mlx.convert import convert

    folder = tmp_path_factory.mktemp("data")
    convert(tiny, folder / "model")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    with (folder / "data.jsonl").open("w") as file:
        for i in range(ROWS):
            scene = world.draw_scene(rng, (100, 60) if i % 2 else (50, 50), "train", numbers=0.0)
            scene.image.save(folder / "images" / f"{i}.png")
            turns = []
            for mark, kind in (("<image>\n", "describe"), ("", "color")):
                _, question, answer = world.ask(rng, scene, kind)
                turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": i, "image": f"{i}.png", "conversations": turns}) + "\n")
    for stage, store in (("pretrain", "patch"), ("finetune", "tokens")):
        command(folder, stage, "--features", folder / store, "--out", folder / f"made-{store}", "--iters", 1)
    return folder


def arguments(folder: Path, stage: str, *more: object) -> list[str]:
    paths = ("--model", folder / "model", "--data", folder / "data.jsonl", "--image-folder", folder / "images")
    return [*map(str, ("--stage", stage, *paths, "--batch-size", 8, *more))]


def command(folder: Path, stage: str, *more: object) -> None:
    train.main(arguments(folder, stage, *more))


def weights(folder: Path) -> dict[str, mx.array]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in mx.load(str(path)).items()}


def losses(run: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in row]


HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "no list of conversations"),
        ({"conversations": []}, "no list of conversations"),
        ({"image": 3, "conversations": [HUMAN, GPT]}, "path or a list of paths"),
        ({"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": " \n"}]}, "empty answer"),
        ({"image": "a.png", "conversations": [HUMAN, {"from": "bot", "value": "x"}]}, "unknown role 'bot'"),
        ({"image": "a.png", "conversations": [HUMAN, {"from": ["gpt"], "value": "x"}]}, r"unknown role \['gpt'\]"),
        ({"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "value": "\ud800"}]}, "a lone surrogate"),
        ({"image": "a.png", "conversations": [HUMAN, HUMAN]}, "alternation"),
        ({"image": "a.png", "conversations": [HUMAN]}, "alternation"),
        ({"conversations": [HUMAN, GPT]}, "1 <image> marks, but 0 images"),
        ({"image": ["a.png", "b.png"], "conversations": [HUMAN, GPT]}, "1 <image> marks, but 2 images"),
        ({"image": "a.png", "conversations": [HUMAN, {"from": "gpt"}]}, "a turn is not"),
    ],
)
def test_rows_that_cannot_be_used(row: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        messages_of(row, str)


def test_marks_become_images() -> None:
    def parts(images: object, *texts: str) -> list:
        turns = [turn for text in texts for turn in ({"from": "human", "value": text}, GPT)]
        row = {"image": images, "conversations": turns}
        return [m["content"] for m in messages_of(row, lambda path: f"/{path}") if m["role"] == "user"]

    def image(path: str) -> dict:
        return {"type": "image", "image": path}

    assert parts("a", "<image>\nWhat?") == [[image("/a"), "What?"]]
    assert parts("a", "What?\n<image>") == [["What?", image("/a")]]
    assert parts(["a", "b"], "<image> or <image>?", "Why?") == [[image("/a"), "or", image("/b"), "?"], ["Why?"]]
    assert parts("a", "What?") == [[image("/a"), "What?"]]
    assert parts(None, "Hello") == [["Hello"]]


def test_lists_and_lines_hold_the_same_rows(data: Path, tmp_path: Path, demo) -> None:
    _, processor = demo
    rows = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    rows[0]["conversations"][0]["value"] = '<image>\n"]}[{\\" What?'
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    one, other = (Dialogues(tmp_path / name, "f", processor) for name in ("list.json", "lines.jsonl"))
    assert len(one) == len(other) == ROWS and one.image_paths == other.image_paths
    for rows_of in (one, other):
        rows_of.find_images(lambda path: TiledImage((), (2, 1), path.encode()), 1000)
    assert one.examples_digest() == other.examples_digest() and len(set(one.digests)) > 1

    (tmp_path / "cut.json").write_text(json.dumps(rows)[:-9])
    with pytest.raises(DataError, match="cut short"):
        Dialogues(tmp_path / "cut.json", "f", processor)
    half = json.dumps({"conversations": [{"from": "human", "value": "\ud800"}, GPT]})  # of a character
    (tmp_path / "bad.jsonl").write_text(json.dumps(rows[0]) + "\n{]\n" + "[" * 100_000 + "\n" + half)
    rejected = Dialogues(tmp_path / "bad.jsonl", "f", processor).rejected
    assert "row 2: not JSON" in rejected[0] and "row 3: not JSON" in rejected[1]
    assert "row 4: " in rejected[2] and "lone surrogate" in rejected[2]
    with pytest.raises(DataError, match=r"bad.jsonl, row 2: not JSON"):
        Dialogues(tmp_path / "bad.jsonl", "f", processor, strict=True)


def test_a_long_text_takes_no_memory_to_split(tmp_path: Path, demo) -> None:
    turns = [{"from": "human", "value": "What?"}, GPT]
    (tmp_path / "rows.json").write_text(json.dumps([{"note": "a" * 1_000_000, "conversations": turns}]))
    tracemalloc.start()
    try:
        assert len(Dialogues(tmp_path / "rows.json", "f", demo[1])) == 1
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_answers_are_what_generation_would_say(demo, picture: Path) -> None:
    _, processor = demo
    question = {"role": "user", "content": [{"type": "image", "image": str(picture)}, "What?"]}
    messages = [question, {"role": "assistant", "content": "Three."}, {"role": "user", "content": "So?"}]
    prompt, answers = processor.encode_answered([*messages, {"role": "assistant", "content": "Yes."}])
    last = max(i for i, answer in enumerate(answers) if not answer) + 1
    assert prompt.ids[:last] == processor.encode(messages).ids
    learnt = processor.tokenizer.decode([i for i, answer in zip(prompt.ids, answers, strict=True) if answer])
    assert learnt == "Three.<|eot_id|>Yes.<|eot_id|>"


@pytest.mark.parametrize("kind", ["patch", "tokens"])
def test_the_loss_is_that_of_the_whole_model(data: Path, demo, kind: str) -> None:
    model, processor = load(data / "model")
    store = FeatureStore(data / kind)
    paths = [data / "images" / name for name in ("0.png", "1.png")]  # one tile, and one with slices
    rows = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()[:2]]
    names = {name: sha256 for sha256, name in store.names()}
    expected, dialogues = 0.0, []
    encoded = Dialogues(data / "data.jsonl", data / "images", processor)
    encoded.find_images(StoredTiler(store, names, {}), 1000)
    for i, (row, path) in enumerate(zip(rows, paths, strict=True)):
        prompt, answers = processor.encode_answered(messages_of(row, lambda _, path=path: load_image(path)))
        embeddings = model.embed_inputs(mx.array(prompt.ids), prompt.images)
        logits = model(mx.array([prompt.ids]), input_embeddings=embeddings[None])[0]
        places = np.flatnonzero(answers)
        targets = mx.array(np.array(prompt.ids)[places])
        expected += nn.losses.cross_entropy(logits[mx.array(places - 1)], targets).sum().item()
        dialogues.append(encoded[i])
    assert prompt.images[0].grid is not None
    batch = collate(dialogues, store, processor.prompt_tokens.image, processor.num_queries)
    # The stores hold float16, of which features keep eleven bits.
    assert answer_loss(model, batch).item() == pytest.approx(expected, rel=2e-3)


def test_batches_are_of_like_lengths_and_their_own_every_epoch(data: Path, demo) -> None:
    rows = Dialogues(data / "data.jsonl", data / "images", demo[1])
    rows.lengths = np.random.default_rng(0).integers(10, 500, len(rows)).astype(np.int32)
    first, second = rows.batches(5, 0, 0), rows.batches(5, 0, 1)
    assert [b.tolist() for b in first] == [b.tolist() for b in rows.batches(5, 0, 0)]
    assert [b.tolist() for b in first] != [b.tolist() for b in second]
    assert len(first) == 3 and len({i for batch in first for i in batch}) == 15
    assert sum(np.ptp(rows.lengths[b]) for b in first) < 500


def test_projector_alone_is_trained(data: Path, tmp_path: Path) -> None:
    command(data, "pretrain", "--features", data / "patch", "--out", tmp_path / "run", "--iters", 3)
    assert all(name.startswith("projector.") for name in weights(tmp_path / "run"))
    assert_fused_is_equal_but_for(data, tmp_path, "projector.")


@pytest.mark.parametrize("how", [["--lora-layers", "2"], ["--dora"], ["--full"]], ids=["lora", "dora", "full"])
def test_llama_alone_is_trained(data: Path, tmp_path: Path, how: list[str]) -> None:
    command(data, "finetune", "--features", data / "tokens", "--out", tmp_path / "run", "--iters", 3, *how)
    assert_fused_is_equal_but_for(data, tmp_path, "language_model.")
    adapted, processor = load(data / "model", adapter_path=tmp_path / "run")
    fused, _ = load(tmp_path / "fused")
    ids = mx.array([processor.encode("What is this?").ids])
    assert mx.abs(adapted(ids) - fused(ids)).max().item() < 0.05  # the fused weights are rounded to float16
    if "--full" not in how:  # of which any part is usable
        path = tmp_path / "run" / "adapters.safetensors"
        name, *others = tensors = mx.load(str(path))
        mx.save_safetensors(str(path), {other: tensors[other] for other in others})
        with pytest.raises(CheckpointError, match=f"{name} missing"):
            load(data / "model", adapter_path=tmp_path / "run")


def assert_fused_is_equal_but_for(data: Path, tmp_path: Path, prefix: str) -> None:
    train.main(
        ["--fuse", *map(str, ("--model", data / "model", "--adapter-path", tmp_path / "run"))]
        + ["--out", str(tmp_path / "fused")]
    )
    before, after = weights(data / "model"), weights(tmp_path / "fused")
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert not (tmp_path / "fused" / "README.md").exists()  # that of the model is about other weights
    assert all(name.startswith(prefix) for name in changed)
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_quantized_llama_takes_adapters(data: Path, tiny: Path, tmp_path: Path) -> None:
    from llama3v_mlx.convert import convert

    convert(tiny, tmp_path / "q4", quantize=True)
    options = arguments(data, "finetune", "--features", tmp_path / "tokens", "--out", tmp_path / "run", "--iters", 2)
    options[options.index("--model") + 1] = str(tmp_path / "q4")
    train.main(options)
    fuse = ["--fuse", "--model", str(tmp_path / "q4"), "--adapter-path", str(tmp_path / "run")]
    train.main([*fuse, "--out", str(tmp_path / "fused")])
    model, _ = load(tmp_path / "fused")
    assert any(isinstance(module, nn.QuantizedLinear) for module in model.language_model.modules())
    with pytest.raises(SystemExit):
        train.main([*options, "--full"])


def nonsense(data: Path, path: Path) -> None:
    """The same rows, of one turn, with answers that could not be told from the pictures by what is known."""
    rows = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    words = ["red", "green", "blue", "circle", "square", "star", "one", "two", "three", "four", "white", "black"]
    rng = np.random.default_rng(1)
    for row in rows:
        row["conversations"][1:] = [{"from": "gpt", "value": " ".join(rng.choice(words, 4))}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_sixteen_rows_are_learned_by_heart(data: Path, tmp_path: Path) -> None:
    """Over ten seeds of model and data, the first ten steps average 3.39 or more, the last ten 0.015 or less."""
    nonsense(data, tmp_path / "nonsense.jsonl")
    options = arguments(data, "finetune", "--features", data / "tokens", "--out", tmp_path / "run", "--full")
    options[options.index("--data") + 1] = str(tmp_path / "nonsense.jsonl")
    train.main([*options, "--batch-size", "16", "--iters", "60", "--learning-rate", "1e-2"])
    assert losses(tmp_path / "run")[0] > 1 and losses(tmp_path / "run")[-1] < 0.05


KILLED_IN_A_CHECKPOINT = """
import os, signal, sys
from llama3v_mlx import train  # before mlx.core, for the same OpenBLAS as here
import mlx.core as mx
save = mx.save_safetensors
def save_or_be_killed(path, *args, **kwargs):
    if "step-0000006" in path and "optimizer" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, *args, **kwargs)
mx.save_safetensors = save_or_be_killed
train.main(sys.argv[1:])
"""


def test_killed_and_resumed_is_as_if_never_killed(data: Path, tmp_path: Path, run_python) -> None:
    options = ["--features", data / "tokens", "--iters", 12, "--save-every", 2, "--lora-dropout", 0.1, "--epochs", 1]
    options += ["--report-every", 1, "--batch-size", 4, "--grad-accumulation-steps", 2]
    command(data, "finetune", "--out", tmp_path / "whole", *options)
    cut = arguments(data, "finetune", "--out", tmp_path / "cut", *options)
    done = run_python("-c", KILLED_IN_A_CHECKPOINT, *cut)
    steps = os.listdir(tmp_path / "cut" / "checkpoints")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(steps) == ["step-0000002", "step-0000004", "step-0000006.partial"]
    with pytest.raises(SystemExit):
        train.main(cut)
    with pytest.raises(SystemExit):
        train.main([*cut, "--resume", "--seed", "1"])
    train.main([*cut, "--resume"])
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == resumed.keys()
    assert all(mx.array_equal(whole[name], resumed[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert len(os.listdir(tmp_path / "cut" / "checkpoints")) == 2


def test_resume_takes_the_same_weights_and_images_wherever_they_are(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("model", "images"):
        shutil.copytree(data / name, tmp_path / name)
    shutil.copy(data / "data.jsonl", tmp_path)
    options = arguments(
        tmp_path, "finetune", "--features", tmp_path / "tokens", "--out", tmp_path / "run", "--iters", 1
    )
    train.main(options)
    (tmp_path / "model").rename(tmp_path / "moved")
    options[options.index("--model") + 1] = str(tmp_path / "moved")
    train.main([*options, "--resume"])

    shutil.copy(tmp_path / "images" / "1.png", tmp_path / "images" / "0.png")
    with pytest.raises(SystemExit):
        train.main([*options, "--resume"])
    assert "same data and options; examples changed" in capsys.readouterr().err
    shutil.copy(data / "images" / "0.png", tmp_path / "images")
    path = next((tmp_path / "moved").glob("*.safetensors"))
    tensors = mx.load(str(path))
    name = next(name for name in tensors if name.endswith("layers.0.input_layernorm.weight"))
    mx.save_safetensors(str(path), tensors | {name: tensors[name] * 2}, {"format": "mlx"})
    with pytest.raises(SystemExit):
        train.main([*options, "--resume"])
    assert "same data and options; weights changed" in capsys.readouterr().err


def test_best_is_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = iter([5.0, 3.0, 2.0, 2.0, 4.0, 3.0])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, batches: (10 * next(scripted), 10))
    options = ["--features", data / "tokens", "--iters", 6, "--save-every", 1, "--eval-every", 1]
    command(data, "finetune", "--out", tmp_path / "run", *options, "--val", data / "data.jsonl")
    assert losses(tmp_path / "run", "validation_loss") == [5, 3, 2, 2, 4, 3]
    assert (tmp_path / "run" / "best").resolve().name == "step-0000003"
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [f"step-{i:07}" for i in (3, 5, 6)]


def test_two_ranks_learn_as_one(data: Path, tmp_path: Path, run_ranks) -> None:
    options = ["--features", data / "patch", "--iters", 4, "--report-every", 1, "--val", data / "data.jsonl"]
    options += ["--dtype", "float32"]  # half precision would hide in rounding what this is to show
    command(data, "pretrain", "--out", tmp_path / "one", *options)
    two = arguments(data, "pretrain", "--out", tmp_path / "two", *options)
    run_ranks("-m", "llama3v_mlx.train", *two)
    for key in ("loss", "validation_loss"):
        assert losses(tmp_path / "two", key) == pytest.approx(losses(tmp_path / "one", key), abs=1e-4)


def test_a_step_that_is_not_finite_changes_nothing(data: Path) -> None:
    model, processor = load(data / "model")
    model.freeze()
    model.projector.unfreeze()
    store = FeatureStore(data / "patch")
    names = {name: sha256 for sha256, name in store.names()}
    rows = Dialogues(data / "data.jsonl", data / "images", processor)
    rows.find_images(StoredTiler(store, names, {}), 1000)
    dialogues = [rows[i] for i in range(2)]
    batch = collate(dialogues, store, processor.prompt_tokens.image, processor.num_queries)
    optimizer = optim.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    trainer = Trainer(model, optimizer)
    before = [(name, mx.array(tensor)) for name, tensor in tree_flatten(model.parameters())]
    bad = collate(dialogues, store, processor.prompt_tokens.image, processor.num_queries)
    bad.visual[0] = bad.visual[0] * mx.array(float("nan"))
    assert trainer.step([bad], 10) is None and trainer.step([bad], 10) is None and trainer.skipped == 2
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(tensor, after[name]) for name, tensor in before)
    assert trainer.step([batch], 10) is not None  # which ends the row
    assert trainer.step([bad], 10) is None and trainer.step([bad], 10) is None
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.step([bad], 10)


def test_a_run_that_diverges_leaves_no_broken_checkpoint(data: Path, tmp_path: Path, capsys) -> None:
    def number(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    often = (argument for name in ("save", "eval", "report") for argument in (f"--{name}-every", 1))
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        command(
            *(data, "finetune", "--features", data / "tokens", "--out", run, "--val", data / "data.jsonl", *often),
            *("--iters", 9, "--warmup", 1, "--learning-rate", 1e30),  # the first step is taken with a rate of 0
        )
    assert "error: 3 steps in a row had no finite loss" in capsys.readouterr().err
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == ["step-0000001", "step-0000002"]  # not the third's, which is the second's again
    assert (run / "best").resolve().name == "step-0000001"
    rows = [json.loads(line, parse_constant=number) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows if "loss" in row] == [False, False, True, True]
    assert [row["validation_loss"] is None for row in rows if "loss" not in row] == [False, True, True, True]


@pytest.mark.parametrize(
    "option",
    ["--learning-rate=nan", "--weight-decay=-1", "--lora-scale=inf", "--lora-dropout=2", "--warmup=-5", "--workers=0"],
)
def test_numbers_out_of_range(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, option: str) -> None:
    with pytest.raises(SystemExit) as end:
        command(data, "finetune", "--features", data / "tokens", "--out", tmp_path / "run", option)
    assert end.value.code == 2 and f"argument {option.partition('=')[0]}: " in capsys.readouterr().err


def test_any_seed(data: Path, tmp_path: Path) -> None:
    options = ("--features", data / "tokens", "--out", tmp_path / "run", "--iters", 1, "--seed", 2**64 - 1)
    command(data, "finetune", *options)
    assert losses(tmp_path / "run")


def test_a_plot_that_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ValueError, match="--plot needs matplotlib"):
        check_plot("loss.png")
    canvas = SimpleNamespace(get_supported_filetypes=lambda: {"png": "", "pdf": ""})
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", SimpleNamespace(FigureCanvasBase=canvas))
    check_plot(str(tmp_path / "loss.PNG"))
    with pytest.raises(ValueError, match="matplotlib writes png, pdf"):
        check_plot("loss.doc")
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        check_plot(str(tmp_path / "nowhere" / "loss.png"))


def test_rows_are_left_out_with_their_reason(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = (data / "data.jsonl").read_text().splitlines()
    missing = {**json.loads(lines[0]), "image": "gone.png"}
    long = json.loads(lines[1])
    long["conversations"][1]["value"] = "red " * 400
    shutil.copy(data / "data.jsonl", tmp_path / "images.txt")
    text = {**json.loads(lines[2]), "image": "../data.jsonl"}
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, *map(json.dumps, (missing, long, text))]))
    options = arguments(data, "finetune", "--features", data / "tokens", "--iters", 1, "--max-seq-length", 400)
    options[options.index("--data") + 1] = str(tmp_path / "rows.jsonl")
    train.main([*options, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert "3 rows are skipped" in said and "row 17: " in said and "gone.png: no such file" in said
    assert "row 18: " in said and "more than --max-seq-length 400" in said
    assert "row 19: " in said and "data.jsonl" in said
    with pytest.raises(SystemExit):
        train.main([*options, "--out", str(tmp_path / "strict"), "--strict"])
    assert "error: " in capsys.readouterr().err and not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"--data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"--features": "tokens"}, "holds visual-tokens features; --stage pretrain needs patch"),
        ({"--batch-size": "17"}, "16 rows do not fill a batch of 17"),
        ({"--model": "images"}, "images"),
    ],
)
def test_bad_input(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict, reason: str) -> None:
    options = arguments(data, "pretrain", "--features", data / "patch", "--out", tmp_path / "run")
    for option, value in changes.items():
        options[options.index(option) + 1] = value if value.isdigit() else str(data / value)
    with pytest.raises(SystemExit) as end:
        train.main(options)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and said[-1].startswith("error: ") and reason in said[-1]
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, _ = load(data / "model", dtype=mx.float16)
    shutil.copytree(data / "model", tmp_path / "model")
    model.projector.query = model.projector.query + 1
    mx.save_safetensors(str(next((tmp_path / "model").glob("*.safetensors"))), dict(tree_flatten(model.parameters())))
    options = arguments(data, "finetune", "--features", data / "tokens", "--out", tmp_path / "run")
    options[options.index("--model") + 1] = str(tmp_path / "model")
    with pytest.raises(SystemExit):
        train.main(options)
    said = capsys.readouterr().err
    assert "tokens: was made with other weights" in said and "use another folder" in said


def test_rejected_rows_are_printed_harmlessly(capsys: pytest.CaptureFixture) -> None:
    say_rejected([SimpleNamespace(path="rows.json", rejected=["row 1: unknown role \x1b[2J\r"])])
    assert capsys.readouterr().err.splitlines()[1] == "  row 1: unknown role \\x1b[2J\\r"

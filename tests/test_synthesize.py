"""A teacher's conversations: what is taken of them, and the command with a small real teacher, here and served."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llama3v_mlx import synthesize
from llama3v_mlx.evaluate import served
from llama3v_mlx.synthesize import KINDS, Rejected, conversation_of, prompt_of

GOOD = "Question: What is it?\nAnswer: A red star.\nQuestion: How many?\nAnswer: One."
CAPTIONS = {"star.png": "One red star on a white background.", "circle.png": "Two blue circles on a black background."}
SAID = {
    ("star.png", "conversation"): GOOD,
    ("star.png", "detail"): "Question: What do you see?\nAnswer: One red star.",
    ("star.png", "reasoning"): "Question: Why is it a star?\nAnswer: The caption says it.",
    ("circle.png", "conversation"): "Question: What is it?\nAnswer: Two circles.",
    ("circle.png", "detail"): "Two blue circles.",
    ("circle.png", "reasoning"): "Question: Which color is it?\nAnswer: It is blue, and not black.",
}


def test_turns() -> None:
    turns = conversation_of("conversation", f"\n{GOOD}\n", True)
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * 2
    assert turns[0]["value"] == "<image>\nWhat is it?" and turns[3]["value"] == "One."
    assert conversation_of("detail", "**Question:** What?\n**Answer:** Two\nlines.", True)[1]["value"] == "Two\nlines."


@pytest.mark.parametrize(
    ("text", "finished", "reason"),
    [
        (GOOD, False, "cut off"),
        ("", True, "alternate"),
        ("Here you are.\n" + GOOD, True, "alternate"),
        ("Question: What?\nQuestion: What?\nAnswer: It.", True, "alternate"),
        ("Question: What?\nAnswer:", True, "empty answer"),
        ("Question: What?\nAnswer: " + "red " * 401, True, "more than 400 words"),
        ("Question: What?\nAnswer: The captions say so.", True, "speaks of the captions"),
        ("Question: What?\nAnswer: A.\nQuestion: What?\nAnswer: B.", True, "a question twice"),
    ],
)
def test_what_is_not_taken(text: str, finished: bool, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        conversation_of("conversation", text, finished)


def test_one_question_where_one_was_asked_for() -> None:
    with pytest.raises(Rejected, match="more than one question"):
        conversation_of("detail", GOOD, True)


@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    rows = [{"id": name.split(".")[0], "image": name, "captions": [text]} for name, text in CAPTIONS.items()]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A small Llama, as mlx-lm takes it, that has learnt by heart what to say to each of the prompts."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    folder = tmp_path_factory.mktemp("teacher")
    prompts = {task: prompt_of(task[1], {"captions": [CAPTIONS[task[0]]]}) for task in SAID}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<|eot_id|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*prompts.values(), *SAID.values()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|eot_id|>\n")
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": tokenizer.get_vocab_size(),
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.token_to_id("<|eot_id|>"),
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    rows, masks = [], []
    for task, text in SAID.items():
        question = [{"role": "user", "content": prompts[task]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
        answer = [*tokenizer.encode(text, add_special_tokens=False), config["eos_token_id"]]
        rows.append(prompt + answer)
        masks.append([0] * len(prompt) + [1] * len(answer))
    length = max(map(len, rows))
    ids = mx.array([row + [0] * (length - len(row)) for row in rows])
    mask = mx.array([row + [0] * (length - len(row)) for row in masks])[:, 1:]

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    optimizer = optim.Adam(3e-3)

    def loss() -> tuple[mx.array, mx.array]:
        losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]) * mask
        return losses.sum() / mask.sum(), losses.max()

    for _ in range(400):
        (_, worst), grads = nn.value_and_grad(model, loss)()
        optimizer.update(model, optim.clip_grad_norm(grads, 1.0)[0])
        mx.eval(model.parameters(), optimizer.state)
        if worst.item() < 0.1:
            break
    assert worst.item() < 0.1
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    return folder


def ask(captions: Path, out: Path, teacher: str | Path, *more: str) -> None:
    synthesize.main(["--teacher", str(teacher), "--captions", str(captions), "--out", str(out), "--temp", "0", *more])


def read(path: Path) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def check(out: Path) -> None:
    rows, rejected = read(out), read(out.with_suffix(".rejected.jsonl"))
    assert rows.keys() == {"star-conversation", "star-detail", "circle-conversation", "circle-reasoning"}
    assert {name: row["reason"] for name, row in rejected.items()} == {
        "star-reasoning": "speaks of the captions",
        "circle-detail": "questions and answers do not alternate",
    }
    assert rows["star-conversation"] == {
        "id": "star-conversation",
        "image": "star.png",
        "conversations": conversation_of("conversation", GOOD, True),
    }


def test_a_local_teacher(captions: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.jsonl"
    ask(captions, out, teacher, "--batch-size", "4")
    said = capsys.readouterr().out
    assert "4 rows written, 0 were there, 2 rejected" in said and "1 speaks of the captions" in said
    check(out)
    # A kill has left half a line, and one row was never written.
    lines = out.read_text().splitlines(True)
    out.write_text("".join(lines[:-1]) + lines[-1][:20])
    ask(captions, out, teacher)
    assert "1 rows written, 5 were there, 0 rejected" in capsys.readouterr().out
    check(out)
    ask(captions, out, "/no/teacher/is/needed")
    assert "0 rows written, 6 were there" in capsys.readouterr().out


def test_a_server(captions: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with served("mlx_lm", "server", "--model", teacher) as (server, port, _):
        assert server.poll() is None
        url = f"http://127.0.0.1:{port}"
        out = tmp_path / "rows.jsonl"
        ask(captions, out, f"{url}/v1", "--teacher-model", "default_model", "--batch-size", "3", "--max-tokens", "100")
        check(out)
        with pytest.raises(SystemExit):
            ask(captions, tmp_path / "other.jsonl", f"{url}/v2")
        assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", "[]", '{"captions": ["a"]}', '{"image": "a.png", "captions": []}'])
def test_captions_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture, line: str) -> None:
    (tmp_path / "captions.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit):
        ask(tmp_path / "captions.jsonl", tmp_path / "out.jsonl", "/no/teacher")
    assert "captions.jsonl, row 1: is not" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_kinds() -> None:
    assert set(KINDS) == {"conversation", "detail", "reasoning"}
    assert np.unique([prompt_of(kind, {"caption": "A star."}) for kind in KINDS]).size == 3

"""A teacher's conversations: what is taken of them, and the command with a teacher checkpoint, here and served."""

import json
import os
import socket
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama3v_mlx import synthesize
from llama3v_mlx.evaluate import served
from llama3v_mlx.locks import open_locked
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
        ("Question: <image>\nWhat?\nAnswer: This.", True, "a question with <image>"),
        ("Question: What?\nAnswer: The captions say so.", True, "mentions the captions"),
        ("Question: What?\nAnswer: A.\nQuestion: What?\nAnswer: B.", True, "a repeated question"),
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
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def save_teacher(folder: Path) -> Path:
    """Write a Llama checkpoint that answers each prompt of `SAID` with its text, by construction and without training.

    The chat template ends each known prompt with a token of its own. Embeddings are one-hot, attention and MLP add
    nothing, and the head maps every token to its one successor: texts are cut into tokens that occur only once.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {token: i for i, token in enumerate(["<|eot_id|>", *sorted(byte_level.alphabet())])}
    successors, template = {}, "{% set prompt = messages[0]['content'] %}{{ prompt }}"
    for (image, kind), text in SAID.items():
        start = token = f"<|answer-{len(vocabulary)}|>"
        prompt = json.dumps(prompt_of(kind, {"captions": [CAPTIONS[image]]}))
        template += f"{{% if prompt == {prompt} %}}{start}{{% endif %}}"
        vocabulary[token] = len(vocabulary)
        [(left, _)] = byte_level.pre_tokenize_str(text)
        while left:
            length = next((n for n in range(5, len(left)) if left[:n] not in vocabulary), len(left))
            successors[token], token, left = left[:length], left[:length], left[length:]
            assert token not in vocabulary
            vocabulary[token] = len(vocabulary)
        successors[token] = "<|eot_id|>"
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in vocabulary if token.startswith("<|")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(template)

    width = -(-len(vocabulary) // 64) * 64
    config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(vocabulary),
        "tie_word_embeddings": False,
        "eos_token_id": vocabulary["<|eot_id|>"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = {name: mx.zeros_like(tensor) for name, tensor in tree_flatten(model.parameters())}
    weights |= {name: mx.ones_like(tensor) for name, tensor in weights.items() if "norm" in name}
    weights["model.embed_tokens.weight"] = mx.eye(len(vocabulary), width)
    head = np.zeros((len(vocabulary), width), np.float32)
    for token, successor in successors.items():
        head[vocabulary[successor], vocabulary[token]] = 1
    weights["lm_head.weight"] = mx.array(head)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def ask(captions: Path, out: Path, teacher: str | Path, *more: str) -> None:
    synthesize.main(["--teacher", str(teacher), "--captions", str(captions), "--out", str(out), "--temp", "0", *more])


def read(path: Path) -> dict[str, dict]:
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def check(out: Path) -> None:
    rows, rejected = read(out), read(out.with_suffix(".rejected.jsonl"))
    assert rows.keys() == {"star-conversation", "star-detail", "circle-conversation", "circle-reasoning"}
    assert {name: row["reason"] for name, row in rejected.items()} == {
        "star-reasoning": "mentions the captions",
        "circle-detail": "questions and answers do not alternate",
    }
    assert rows["star-conversation"] == {
        "id": "star-conversation",
        "image": "star.png",
        "conversations": conversation_of("conversation", GOOD, True),
    }


def test_a_local_teacher(captions: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows\x1b[2J.jsonl"
    ask(captions, out, teacher, "--batch-size", "4")
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "4 rows written, 0 existed already, 2 rejected" in said and "1 mentions the captions" in said
    check(out)
    # A kill has left half a line, and one row was never written.
    lines = out.read_text().splitlines(True)
    out.write_text("".join(lines[:-1]) + lines[-1][:20])
    ask(captions, out, teacher)
    assert "1 rows written, 5 existed already, 0 rejected" in capsys.readouterr().out
    check(out)
    ask(captions, out, "/no/teacher/is/needed")
    assert "0 rows written, 6 existed already" in capsys.readouterr().out


def test_a_server(captions: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with served("llama3v_mlx", "mlx-lm", "server", "--model", teacher) as (server, port, _):
        assert server.poll() is None
        url = f"http://127.0.0.1:{port}"
        out = tmp_path / "rows.jsonl"
        ask(captions, out, f"{url}/v1", "--teacher-model", "default_model", "--batch-size", "3", "--max-tokens", "100")
        check(out)
        with pytest.raises(SystemExit):
            ask(captions, tmp_path / "other.jsonl", f"{url}/v2")
        assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"captions": ["a"]}',
        b'{"image": "a.png", "captions": []}',
        b'{"image": "a.png", "captions": ["a", 1]}',
        rb'{"image": "a.png", "captions": ["\ud800"]}',
        b'"\xff"',
        b"[" * 10**5,
    ],
)
def test_captions_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture, line: bytes) -> None:
    (tmp_path / "captions.jsonl").write_bytes(line + b"\n")
    with pytest.raises(SystemExit):
        ask(tmp_path / "captions.jsonl", tmp_path / "out.jsonl", "/no/teacher")
    assert "captions.jsonl, row 1: is not" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not run, and a name that is neither a folder nor a repository."""
    monkeypatch.setattr(synthesize.time, "sleep", lambda _: None)
    with socket.socket() as unused:  # bound and not listening
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(ValueError, match=rf"^{url}/models: \[Errno \d+\] Connection refused$"):
            synthesize.RemoteTeacher(url, None, None, None)
    with pytest.raises(OSError, match="^no--such: no such folder"):
        synthesize.LocalTeacher("no--such", 1, 0)


@pytest.mark.parametrize("name", ["out.jsonl", "out.rejected.jsonl"])
@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": ["a"], "image": 1, "conversations": 1}', '{"id": "\xff"}'])
def test_a_damaged_line(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, line: str) -> None:
    good = json.dumps({"id": "star-detail", "image": "star.png", "conversations": []})
    (tmp_path / name).write_bytes(f"{good}\n{line}\n{good}\n".encode("latin-1"))
    with pytest.raises(SystemExit):
        ask(captions, tmp_path / "out.jsonl", "/no/teacher")
    assert f"error: {tmp_path / name}:2: is not a row of synthesize; remove the line" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes().count(b"\n") == 3


def test_a_second_run_beside_the_first(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.jsonl"
    with open_locked(out) as first:
        first.write(b'{"id": "star-detail", "ima')  # a row that the first run is just writing
        with pytest.raises(SystemExit, match="1"):
            ask(captions, out, "/no/teacher")
    assert capsys.readouterr().err == f"error: {out}: is being written by another process\n"
    assert out.read_bytes() == b'{"id": "star-detail", "ima'


def test_a_teacher_that_cannot_be_loaded(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for out in (tmp_path / "rows.jsonl", tmp_path / "link.jsonl"):
        (tmp_path / "link.jsonl").symlink_to("elsewhere.jsonl")
        with pytest.raises(SystemExit, match="1"):
            ask(captions, out, tmp_path / "teacher")
        assert "error: " in capsys.readouterr().err
        (tmp_path / "link.jsonl").unlink()
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_pipe(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(SystemExit, match="1"):
        ask(captions, tmp_path / "rows.jsonl", "/no/teacher")
    assert "rows.jsonl: is not a regular file" in capsys.readouterr().err


def test_a_name_that_is_not_unicode(teacher: Path, tmp_path: Path) -> None:
    row = {"id": "star", "image": "\ud800.png", "captions": [CAPTIONS["star.png"]]}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row) + "\n")
    ask(tmp_path / "captions.jsonl", tmp_path / "out.jsonl", teacher, "--kinds", "detail")
    assert read(tmp_path / "out.jsonl")["star-detail"]["image"] == "\ud800.png"


def test_kinds() -> None:
    assert set(KINDS) == {"conversation", "detail", "reasoning"}
    assert np.unique([prompt_of(kind, {"caption": "A star."}) for kind in KINDS]).size == 3

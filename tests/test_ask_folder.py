"""`llama3v generate --images`: one answer a file, in a batch, continued after any interruption."""

import io
import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pillow_heif
import pytest
from conftest import odd_character
from PIL import Image

from llama3v_mlx import generate
from llama3v_mlx.answers import AnswerFile, settings_path
from llama3v_mlx.ask_folder import Lines
from llama3v_mlx.batch_generate import ImageBatch
from llama3v_mlx.demo import IMAGES
from llama3v_mlx.models.siglip import VisionTower

NAMES = sorted(path.name for path in IMAGES.iterdir())
SCHEMA = {
    "type": "object",
    "properties": {"shapes": {"type": "integer", "minimum": 1, "maximum": 4}, "color": {"enum": ["red", "green"]}},
    "required": ["shapes", "color"],
    "additionalProperties": False,
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return Path(shutil.copytree(IMAGES, tmp_path / "photos"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


@pytest.fixture
def ask(run_main, demo, out: Path) -> Callable:
    """Run the command on paths, greedy and with the session's model, and return how it ended."""

    def ask(*paths: Path, out: Path | str | None = out, options: Sequence = ("--temp", "0")):
        options = [*options, *(() if out is None else ("--out", out))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llama3v_mlx.ask_folder.load", lambda *args, **kwargs: demo)
            return run_main("llama3v_mlx.generate", "--images", *paths, *options)

    return ask


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list:
    """What is asked of the model."""
    add, added = ImageBatch.add, []
    monkeypatch.setattr(ImageBatch, "add", lambda self, key, image: added.append(key) or add(self, key, image))
    return added


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_bytes().splitlines()]


def names(out: Path) -> list[str]:
    return [Path(row["path"]).name for row in rows(out)]


def summary(done) -> str:
    """The last line about the images, without the speed."""
    return next(line for line in done.stderr.splitlines() if " answered, " in line).partition(";")[0]


def test_greedy_answers_are_those_of_generate(demo, photos: Path, out: Path, ask) -> None:
    """In the order of the files, whatever was done first; some join the batch when others have left it."""
    prompt = "What is this image?"
    done = ask(photos, options=("--temp", "0", "--batch-size", "4", "--prompt", prompt))
    assert done.returncode == 0 and done.stdout == ""
    assert summary(done) == "6 images answered, 0 already answered, 0 failed"
    assert [(row["path"], row["answer"]) for row in rows(out)] == [
        (str(photos / name), generate(*demo, prompt, photos / name, temperature=0)) for name in NAMES
    ]
    first = rows(out)[0]
    assert first.keys() == {"path", "answer", "finish_reason", "tokens", "sha256", "stat"}
    assert first["finish_reason"] == "stop" and first["tokens"] > 3


def test_sampled_answers_depend_on_seed_and_image_alone(photos: Path, out: Path, ask) -> None:
    found = []
    options = ("--temp", "3", "--top-k", "0", "--top-p", "1", "--max-tokens", "6")
    paths = [photos / name for name in NAMES[:3]]
    for each, size, seed in ((paths, 1, 5), (paths[::-1], 3, 5), (paths, 3, 6)):
        ask(*each, options=(*options, "--batch-size", size, "--seed", seed))
        found.append({row["path"]: row["answer"] for row in rows(out)})
        out.unlink()
    assert found[0] == found[1] != found[2]
    assert len(set(found[0].values())) == 3


def test_what_is_unchanged_is_not_read_again(photos: Path, out: Path, ask, added: list) -> None:
    ask(photos)
    before, count = out.read_bytes(), len(added)
    os.chmod(photos / NAMES[0], 0o400)  # changes ctime: it is read, and its answer is known
    done = ask(photos)
    assert summary(done) == "0 images answered, 6 already answered, 0 failed" and len(added) == count
    now = rows(out)
    assert now[0].pop("stat") != json.loads(before.splitlines()[0]).pop("stat")
    assert [row["answer"] for row in now] == [json.loads(line)["answer"] for line in before.splitlines()]
    # Renamed, and with other contents.
    (photos / NAMES[0]).rename(photos / "z.png")
    shutil.copy(photos / NAMES[2], photos / "new.png")
    Image.new("RGB", (60, 60), "red").save(photos / NAMES[1])
    done = ask(photos)
    assert summary(done) == "1 images answered, 6 already answered, 0 failed" and len(added) == count + 1
    assert names(out) == [NAMES[0], *NAMES[1:3], *sorted([*NAMES[3:], "new.png"]), "z.png"]  # what is gone comes first
    answers = {name: row["answer"] for name, row in zip(names(out), rows(out), strict=True)}
    assert answers["z.png"] == answers[NAMES[0]] == "The number is 42." and answers["new.png"] == answers[NAMES[2]]
    assert answers[NAMES[1]] != "The number is 752."


def test_equal_files_are_asked_about_once(photos: Path, out: Path, ask, added: list) -> None:
    for i in range(3):
        shutil.copy(photos / NAMES[0], photos / f"copy {i}\n.png")
    done = ask(photos, photos / NAMES[0], photos)
    assert summary(done) == "9 images answered, 0 already answered, 0 failed" and len(added) == 6
    assert len(out.read_bytes().splitlines()) == 9
    assert [row["answer"] for row in rows(out) if "copy" in row["path"]] == ["The number is 42."] * 3


def test_a_kill_in_the_middle_of_a_line(photos: Path, out: Path, ask, run_python) -> None:
    code = """
import os, signal, sys
from llama3v_mlx import answers
from llama3v_mlx.generate import main
append, lines = answers.append, []
def append_or_die(file, data):
    lines.append(data)
    if len(lines) == 4:
        os.write(file.fileno(), data[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    append(file, data)
answers.append = append_or_die
main(sys.argv[1:])
"""
    done = run_python("-c", code, "--images", photos, "--temp", "0", "--batch-size", "2", "--out", out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert out.read_bytes().count(b"\n") == 3 and not out.read_bytes().endswith(b"\n")
    done = ask(photos)
    assert summary(done) == "3 images answered, 3 already answered, 0 failed"
    whole = out.with_name("whole.jsonl")
    ask(photos, out=whole)
    assert out.read_bytes() == whole.read_bytes()


def test_ctrl_c_says_how_to_continue(photos: Path, out: Path, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    write, rows_written = AnswerFile.write, []

    def interrupted(self, row: dict) -> None:
        if len(rows_written) == 2:
            raise KeyboardInterrupt
        rows_written.append(row)
        write(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "write", interrupted)
        done = ask(photos)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert f"stopped with 2 answers in {out}; the same command continues" in done.stderr
    assert rows(out) == json.loads(json.dumps(rows_written))
    assert summary(ask(photos)) == "4 images answered, 2 already answered, 0 failed"
    assert names(out) == NAMES


def test_lines_on_a_terminal(capsys: pytest.CaptureFixture) -> None:
    """C1 control characters and bidi ones need no escape in JSON, but a terminal obeys them."""
    rows = [{"path": "a.png", "answer": "Kätzchen"}, {"path": "b.png", "answer": "ä\x9b2J\u202e\x7f"}]
    for row in rows:
        Lines().write(row)
    said = capsys.readouterr().out
    assert "Kätzchen" in said and list(map(json.loads, said.splitlines())) == rows
    assert said.replace("\n", "").isprintable() and not set(said) & set("\u202e\x7f\x9b")


def test_bad_images_are_lines_and_the_rest_goes_on(photos: Path, out: Path, ask) -> None:
    evil = "a\x1b[2J\n.png"
    (photos / evil).write_bytes(b"hello")
    (photos / "b.png").write_bytes((photos / NAMES[0]).read_bytes()[:3000])
    (photos / "notes.txt").write_text("hello")
    os.mkfifo(photos / "pipe.png")
    (photos / "unreadable.jpg").symlink_to(photos / "gone.jpg")
    for _ in range(2):  # they are tried again
        done = ask(photos)
        assert done.returncode == 1 and summary(done).endswith(", 4 failed")
        assert f"failed: {photos}/a\\x1b[2J\\n.png: not an image" in done.stderr and "\x1b" not in done.stderr
        assert "skipped: 1 .txt" in done.stderr
        errors = {Path(row["path"]).name: row["error"] for row in rows(out) if "error" in row}
        assert errors.keys() == {evil, "b.png", "pipe.png", "unreadable.jpg"} and len(rows(out)) == 10
        assert errors["pipe.png"] == "is not a file" and "damaged" in errors["b.png"]
    for name in errors:
        (photos / name).unlink()
        shutil.copy(photos / NAMES[0], photos / name)
    assert ask(photos).returncode == 0
    assert [row["answer"] for row in rows(out) if Path(row["path"]).name in errors] == ["The number is 42."] * 4


def test_answers_outlive_files_that_cannot_be_read(photos: Path, out: Path, ask, tmp_path: Path) -> None:
    """A disk that is not mounted turns no answer into an error."""
    (tmp_path / "list.txt").write_text("".join(f"photos/{name}\n" for name in NAMES))
    ask(tmp_path / "list.txt")
    before = out.read_bytes()
    shutil.rmtree(photos)
    done = ask(tmp_path / "list.txt")
    assert done.returncode == 1 and summary(done) == "0 images answered, 0 already answered, 6 failed"
    assert out.read_bytes() == before


def test_sources(photos: Path, out: Path, ask, tmp_path: Path, added: list) -> None:
    """Archives, pages, HEIC, patterns, lists, and names of any bytes."""
    data = (photos / NAMES[0]).read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("in/a.png")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    pages = [Image.new("RGB", (60, 60), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "paper.pdf", save_all=True, append_images=pages[1:])
    pillow_heif.from_pillow(pages[0]).save(tmp_path / "x.heic")
    odd = f"a \n{odd_character(tmp_path)}.png"
    shutil.copy(photos / NAMES[0], photos / odd)
    paths = (tmp_path / "a.tar", tmp_path / "paper.pdf", tmp_path / "x.heic", photos / "*.png")
    for count in (6, 0):  # two of them have the archive's bytes
        added.clear()
        done = ask(*paths)
        assert done.returncode == 0 and len(added) == count
    pngs = [str(photos / name) for name in ("42.png", odd, *NAMES[2:]) if name.endswith(".png")]
    firsts = ("a.tar/in/a.png", "paper.pdf#1", "paper.pdf#2", "x.heic")
    assert [row["path"] for row in rows(out)] == [*(str(tmp_path / name) for name in firsts), *pngs]


def test_stdout_and_limit(photos: Path, ask) -> None:
    for out in ("-", None):
        done = ask(photos, out=out, options=("--limit", "2", "--temp", "0"))
        assert {Path(json.loads(line)["path"]).name for line in done.stdout.splitlines()} == set(NAMES[:2])
        assert done.returncode == 0


def test_another_question_or_model_is_refused(photos: Path, out: Path, ask, demo, tiny: Path, run_main) -> None:
    ask(photos, options=("--limit", "1", "--temp", "0"))
    before = out.read_bytes()
    others = {
        ("--prompt", "Where is this?"): "prompt was 'What is this image?' and is 'Where is this?'",
        ("--max-image-tiles", "1"): "max_image_tiles was None and is 1",
        ("--temp", "0.5"): "sampling was",
    }
    for options, message in others.items():
        done = ask(photos, options=(*({} if "--temp" in options else ("--temp", "0")), *options))
        assert done.returncode == 1 and f"error: {out}: has answers with other settings ({message}" in done.stderr
    done = run_main("llama3v_mlx.generate", "--images", photos, "--out", out, "--temp", "0", "--model", tiny)
    assert done.returncode == 1 and "weights was" in done.stderr
    assert out.read_bytes() == before


def test_stored_visual_tokens(photos: Path, out: Path, ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second question runs no tower, in any batch, and is answered as without the store."""
    call, calls = VisionTower.__call__, []
    monkeypatch.setattr(VisionTower, "__call__", lambda self, x: calls.append(len(x)) or call(self, x))
    options = ("--temp", "0", "--features", tmp_path / "store", "--batch-size", "2")
    question = ("--prompt", "What color is the background?")
    paths = [photos / name for name in NAMES[-3:]]
    assert ask(*paths, options=options).returncode == 0 and sum(calls) > 3
    calls.clear()
    assert ask(*paths, out=tmp_path / "b.jsonl", options=(*options, *question)).returncode == 0 and calls == []
    assert ask(*paths, out=tmp_path / "c.jsonl", options=("--temp", "0", *question)).returncode == 0
    answers = [[row["answer"] for row in rows(tmp_path / name)] for name in ("b.jsonl", "c.jsonl")]
    assert answers[0] == answers[1] and answers[0] != [row["answer"] for row in rows(out)]


def test_a_failure_while_an_answer_is_generated(photos: Path, out: Path, ask, monkeypatch) -> None:
    """It is that image's error, and the others in the batch are answered."""
    made = []

    def processors(sampling, *_):
        made.append(0)
        mine = len(made)

        def process(tokens, logits):
            return logits / 0 if mine == 2 and len(tokens) > 2 and 1 / 0 else logits

        return [process]

    monkeypatch.setattr("llama3v_mlx.serving.batch.logits_processors", processors)
    done = ask(photos)
    assert done.returncode == 1 and summary(done) == "5 images answered, 0 already answered, 1 failed"
    [failed] = [row for row in rows(out) if "error" in row]
    assert failed["error"].startswith("ZeroDivisionError: division by zero")


def test_prompts_that_are_too_long(demo, photos: Path, out: Path, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = demo
    context = len(processor.encode("What is this image?", [photos / NAMES[0]]).ids) + 5
    monkeypatch.setattr(model.language_model.args, "max_position_embeddings", context)
    done = ask(photos, options=("--prompt", "red " * 100))
    assert done.returncode == 1 and out.read_bytes() == b""
    assert f"error: the prompt of 111 tokens is too long for the context of {context}" in done.stderr
    done = ask(photos, options=("--temp", "0"))  # only the smallest image leaves room for an answer
    assert done.returncode == 1 and summary(done) == "1 images answered, 0 already answered, 5 failed"
    first, *others = rows(out)
    assert first["finish_reason"] == "length" and first["tokens"] == 5
    assert all("tokens is too long for the context of" in row["error"] for row in others)


def test_no_images_no_file(photos: Path, out: Path, ask, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    done = ask(tmp_path / "empty")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("no images found; skipped: 1 .txt")
    assert ask(photos, out=tmp_path / "no" / "a.jsonl").returncode == 1
    assert sorted(os.listdir(tmp_path)) == ["empty", "photos"]


def test_json_by_schema(demo, photos: Path, out: Path, ask, run_main, tmp_path: Path) -> None:
    """The demo never learned JSON, but all its answers match the schema, one by one as in the batch."""
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    options = ("--temp", "0", "--max-tokens", "60", "--schema", schema)
    assert ask(photos, options=options).returncode == 0
    for row in rows(out):
        seen = row["answer"]
        assert seen.keys() == {"shapes", "color"} and 1 <= seen["shapes"] <= 4 and seen["color"] in ("red", "green")
    done = run_main("llama3v_mlx.generate", "--image", photos / NAMES[-1], "--no-verbose", *options)
    assert json.loads(done.stdout) == rows(out)[-1]["answer"]
    done = ask(photos, out=tmp_path / "cut.jsonl", options=("--temp", "0", "--max-tokens", "5", "--schema", schema))
    assert {(type(row["answer"]), row["finish_reason"]) for row in rows(tmp_path / "cut.jsonl")} == {(str, "length")}
    schema.write_text('{"type": "no"}')
    done = ask(photos, options=options)
    assert done.returncode == 1 and f"error: {schema}: is not a JSON schema that answers can be" in done.stderr


def test_schemas_that_cannot_be_used(photos: Path, out: Path, ask, run_main, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    schema = tmp_path / "schema.json"
    for content, message in (
        (None, "no such file"),
        ("[]", "is not a JSON object"),
        ("{}", "need llguidance: pip install"),
    ):
        if content:
            schema.write_text(content)
        for done in (
            ask(photos, options=("--schema", schema)),
            run_main("llama3v_mlx.generate", "--image", photos / NAMES[0], "--schema", schema),
        ):
            assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert not out.exists() and not settings_path(out).exists()


def test_usage(run_main, tmp_path: Path) -> None:
    for args, message in (
        (("--images", tmp_path, "--json"), "--json cannot be used with --images"),
        (("--images", tmp_path, "--image", "a.png"), "--image cannot be used with --images"),
        (("--images", tmp_path, "--kv-bits", "8"), "--kv-bits cannot be used with --images"),
        (("--image", "a.png", "--out", "a", "--limit", "1"), "--out, --limit cannot be used without --images"),
        ((), "give --image, --images or --prompt"),
    ):
        done = run_main("llama3v_mlx.generate", *args)
        assert done.returncode == 2 and message in done.stderr

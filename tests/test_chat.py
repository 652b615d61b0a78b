"""Chat: the cache is kept, images are encoded once, and lines are executed."""

import contextlib
import errno
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import ROOT, unicode_names

from llama3v_mlx import stream_generate
from llama3v_mlx.chat import HELP, Chat
from llama3v_mlx.conversation import Conversation
from llama3v_mlx.demo import CHECKPOINT, IMAGES

STARS, CROSS = IMAGES / "two-red-stars.jpg", IMAGES / "one-purple-cross.jpg"
GREEDY = {"temperature": 0, "repetition_penalty": 1}


@pytest.fixture
def talk(demo) -> Conversation:
    return Conversation(*demo, options=GREEDY)


def answer(talk: Conversation, text: str, *images: Path) -> tuple[str, int]:
    """Return the answer and the number of prompt tokens processed for it."""
    responses = list(talk.ask(text, images))
    return "".join(response.text for response in responses), responses[-1].prompt_tokens


def test_a_follow_up_reads_its_own_tokens_alone(talk: Conversation, demo, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = demo
    first, count = answer(talk, "What is this image?", STARS)
    whole = processor.encode([{"role": "user", "content": [STARS, "What is this image?"]}])
    assert count == len(whole.ids)
    monkeypatch.setattr(type(model.vision_tower), "__call__", lambda *_: pytest.fail("the image was encoded again"))
    second, count = answer(talk, "What color is the background?")
    alone = processor.encode([{"role": "user", "content": "What color is the background?"}])
    assert count <= len(alone.ids)  # without BOS, and possibly with the last answer's end-of-turn token
    assert (first, second) == ("Two red stars on a yellow background.", "The background is yellow.")


def test_the_answers_are_those_of_the_whole_conversation(talk: Conversation, demo) -> None:
    questions = (
        ("What is this image?", [STARS]),
        ("What color is the background?", []),
        ("Which shape is it?", [CROSS]),
    )
    messages = []
    for text, images in questions:
        messages.append({"role": "user", "content": [*images, text]})
        expected = "".join(response.text for response in stream_generate(*demo, messages, **GREEDY))
        assert answer(talk, text, *images)[0] == expected
        assert talk.ids[: len(talk.ids) - 1].count(demo[1].prompt_tokens.image) > 0
        messages.append({"role": "assistant", "content": expected})
    assert talk.ids[:-1] == demo[1].encode(messages).ids[: len(talk.ids) - 1]


def test_undo_and_clear(talk: Conversation) -> None:
    answer(talk, "What is this image?", STARS)
    ids = list(talk.ids)
    first = answer(talk, "What color is the background?")
    assert talk.undo().text == "What color is the background?"
    assert talk.ids == ids
    assert answer(talk, "What color is the background?") == first
    talk.undo(), talk.undo()
    assert (talk.turns, talk.ids, talk.undo()) == ([], [], None)
    assert answer(talk, "What is this image?", CROSS)[0] == "One purple cross on an orange background."
    talk.clear()
    assert answer(talk, "What is this image?", STARS)[0] == "Two red stars on a yellow background."


def test_an_answer_that_is_stopped(talk: Conversation) -> None:
    stream = talk.ask("What is this image?", [STARS])
    pieces = [next(stream).text for _ in range(3)]
    stream.close()
    assert talk.turns[0].answer == "".join(pieces)
    assert answer(talk, "What color is the background?")[0] == "The background is yellow."


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8, "quantized_kv_start": 0}])
def test_saved_and_loaded(talk: Conversation, demo, tmp_path: Path, options: dict) -> None:
    talk.options |= options
    answer(talk, "What is this image?", STARS)
    talk.save(tmp_path / "talk.safetensors", "demo")
    expected = answer(talk, "What color is the background?")
    other = Conversation(*demo, options=GREEDY | options)
    other.load(tmp_path / "talk.safetensors", "demo")
    assert other.turns == talk.turns[:1]
    assert answer(other, "What color is the background?") == expected
    with pytest.raises(ValueError, match="was saved with the model demo, not mine"):
        other.load(tmp_path / "talk.safetensors", "mine")
    for path in (STARS, CHECKPOINT / "model-00001-of-00001.safetensors"):
        with pytest.raises(ValueError, match="is not a conversation"):
            other.load(path, "demo")
    with pytest.raises(ValueError, match=r"no\.safetensors: no such file"):
        other.load(tmp_path / "no.safetensors", "demo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["talk.safetensors"]


def test_a_full_context_is_said_in_time(talk: Conversation) -> None:
    answer(talk, "What is this image?", STARS)
    ids = list(talk.ids)
    with pytest.raises(
        ValueError, match=r"only \d+ of the context's 2048 are left; remove the last question \(/undo\)"
    ):
        list(talk.ask("red " * 2000))
    assert talk.ids == ids
    assert answer(talk, "What color is the background?")[0] == "The background is yellow."


def test_lines(talk: Conversation, tmp_path: Path, capsys) -> None:
    chat = Chat(talk, "demo")

    def say(line: str) -> str:
        assert chat.line(line)
        return capsys.readouterr().out

    assert "5 tiles, 73 tokens" in say(f"/image {STARS}")
    assert "for the next question" in say("/images")
    out = say("What is this image?")
    assert out.startswith("Two red stars on a yellow background.\nfirst token") and "89 tokens read" in out
    assert say("/images").strip() == f"1. {STARS}"
    assert "vision" in say("/stats")
    assert "no such" not in say(f"/save {tmp_path}/talk")
    assert "removed: What is this image?" in say("/undo")
    assert "Two red stars" in say(f"/load {tmp_path}/talk.safetensors")
    assert "started over" in say("r") and "/undo" in say("h")
    for line in (
        "/nothing",
        "/Help",
        "/ what is it?",
        f"/what is {STARS}",
        "/image",
        "/image 'x",
        "/image none.png",
        "/load",
        "/load none",
    ):
        with pytest.raises(ValueError):
            chat.line(line)
    assert not any(map(chat.line, ("q", "/exit", "/quit", "exit", "quit")))


def test_a_question_without_an_answer_keeps_no_images(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before its answer begins, or too long: repeating the line does not add its images twice."""
    chat = Chat(talk, "demo")
    chat.line(f"/image {CROSS}")
    with pytest.raises(ValueError, match="of the context's 2048 are left"):
        chat.line(f"{STARS} {'red ' * 2000}")
    monkeypatch.setattr(talk, "ask", lambda *_: (signal.raise_signal(signal.SIGINT) for _ in range(1)))
    chat.line(f"What is this image? {STARS}")
    assert [each.name for each in chat.waiting] == [str(CROSS)]


def test_help_fits_a_terminal() -> None:
    assert max(map(len, HELP.splitlines())) < 80


def test_the_commands_are_those_of_the_help(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """No method of `Chat` becomes a command by its name."""
    listed = set(re.findall(r"^  /(\w+)", HELP, re.MULTILINE))
    chat = Chat(talk, "demo")
    monkeypatch.setattr(chat, "ask", lambda question: pytest.fail(f"the model was asked {question}"))
    names = {name.strip("_") for name in dir(chat)} | {"ask", "line", "add", "HELP", "Help", "image_", ""}
    for name in sorted(names - listed):
        for line in (f"/{name}", f"/{name} f", f"/{name}\t{STARS}"):
            with pytest.raises(ValueError, match=f"^/{name}: no such command or image; /help lists the commands$"):
                chat.line(line)
    assert chat.waiting == []
    assert {f"/{name}" for name in listed} == {*Chat.COMMANDS, "/exit"}


def test_a_line_may_begin_with_an_image(talk: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Including an image whose path was escaped by a terminal."""
    path = tmp_path / "two red.jpg"
    path.write_bytes(STARS.read_bytes())
    asked = []
    chat = Chat(talk, "demo")
    monkeypatch.setattr(chat, "ask", lambda question: asked.append((question, chat.waiting[-1].name)))
    for text in (shlex.quote(str(STARS)), re.sub("([ '\"])", r"\\\1", str(path)), shlex.quote(str(path))):
        assert chat.line(f"{text} /what is it?")
    assert asked == [("/what is it?", str(name)) for name in (STARS, path, path)]


def test_the_command_in_a_pipe(run_main) -> None:
    done = run_main("llama3v_mlx.chat", "--temp", "0", "--image", CROSS, input="What color is the background?\n")
    assert done.returncode == 0, done.stderr
    assert "The background is orange." in done.stdout and "\033" not in done.stdout
    done = run_main("llama3v_mlx.chat", input="/nothing\n/exit\n")
    assert done.returncode == 1 and "error: /nothing" in done.stderr


def test_ctrl_c_leaves_the_chat_running() -> None:
    """Interrupted while it waits for the end of a line, so the moment is sure."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "llama3v_mlx.chat", "--temp", "0", "--image", str(CROSS)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "tiles" in process.stdout.readline()
    process.stdin.write(" " * 300_000)  # more than a pipe holds: done when the other side has begun to read
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "\n"
    out, _ = process.communicate("What color is the background?\n", timeout=60)
    assert process.returncode == 0
    assert "The background is orange." in out


class Terminal:
    """Chat process in a pseudo-terminal."""

    def __init__(self, *args: str | Path, **env: str):
        main, side = pty.openpty()
        command = [sys.executable, "-m", "llama3v_mlx.chat", "--temp", "0", *map(str, args)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=side, stdout=side, stderr=side, env={**os.environ, **env}, start_new_session=True
        )
        os.close(side)
        self.end, self.seen = main, ""

    def read_to(self, text: str, timeout: float = 90) -> str:
        """Read the output up to and including `text`."""
        limit = time.monotonic() + timeout
        while text not in self.seen:
            assert time.monotonic() < limit, self.seen
            if select.select([self.end], [], [], 0.1)[0]:
                self.seen += os.read(self.end, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def interrupt(self) -> str:
        """Ctrl-C, and what is printed up to the next prompt.

        Once more if nothing comes of it: between the prompt and the wait for a line, readline does not see a signal.
        """
        os.kill(self.process.pid, signal.SIGINT)
        with contextlib.suppress(AssertionError):
            return self.read_to(">> ", timeout=20)
        os.kill(self.process.pid, signal.SIGINT)
        return self.read_to(">> ")

    def say(self, line: str) -> str:
        """Send a line and return the output up to the next prompt."""
        os.write(self.end, f"{line}\n".encode())
        return self.read_to(">> ")


def test_in_a_terminal(tmp_path: Path) -> None:
    """Three turns, with a second image in the second, Ctrl-C, and saving and loading the conversation."""
    env = {"XDG_CACHE_HOME": str(tmp_path), "TERM": "xterm"}
    shell = Terminal("--image", STARS, **env)
    shell.read_to(">> ")
    assert "no answer yet" in shell.say("/sta\t")
    out = shell.say("What is this image?")
    assert "Two red stars on a yellow background." in out and "\033[2mfirst token" in out
    assert "One purple cross" in shell.say(f"{os.path.relpath(CROSS.parent, ROOT)}/one-p\t What is this image?")
    assert "The background is orange." in shell.say("What color is the background?")
    assert "saved to" in shell.say(f"/save {tmp_path}/talk")
    shell.interrupt()
    assert "started over" in shell.say("/clear")
    assert "One purple cross" in shell.say(f"/load {tmp_path}/talk")
    assert "The background is orange." in shell.say("What color is the background?")
    os.write(shell.end, b"\x04")
    assert shell.process.wait(30) == 0
    assert "What color is the background?" in (tmp_path / "llama3v_mlx" / "chat_history").read_text()


def resave(source: Path, target: Path, change) -> Path:
    """Copy a saved conversation, its arrays and metadata changed."""
    arrays, metadata = mx.load(str(source), return_metadata=True)
    change(arrays, metadata)
    mx.save_safetensors(str(target), arrays, metadata)
    return target


def said_about(**changes):
    """Change what a saved conversation says about itself."""

    def change(arrays: dict, metadata: dict) -> None:
        metadata["0.conversation"] = json.dumps(json.loads(metadata["0.conversation"]) | changes)

    return change


DAMAGES = {
    "ids beyond the vocabulary": said_about(ids=[10**6]),
    "ids of texts": said_about(ids=["a"]),
    "turns of another form": said_about(turns=[{"text": 1}]),
    "a turn after the end": said_about(
        turns=[{"text": "", "images": [], "answer": "", "start": 10**6, "num_tokens": 1}]
    ),
    "a cache of another length": lambda arrays, metadata: arrays.update({"0.2": mx.array(10**6)}),
    "an offset that is no number": lambda arrays, metadata: arrays.update({"0.2": mx.array([1, 2])}),
    "a cache of another width": lambda arrays, metadata: arrays.update(
        {name: array[..., :1] for name, array in arrays.items() if name.startswith("0.0")}
    ),
    "a layer less": lambda arrays, metadata: [arrays.pop(n) for n in [*arrays] if n.startswith("1.")],
    "a layer with a huge number": lambda arrays, metadata: arrays.update({"99999999.0": mx.zeros(1)}),
    "nothing": lambda arrays, metadata: metadata.clear(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_conversation_is_refused(talk: Conversation, tmp_path: Path, damage: str) -> None:
    """And the present one goes on: MLX would not notice ids and offsets beyond its arrays."""
    answer(talk, "What is this image?", STARS)
    talk.save(tmp_path / "talk.safetensors", "demo")
    path = resave(tmp_path / "talk.safetensors", tmp_path / "damaged.safetensors", DAMAGES[damage])
    with pytest.raises(ValueError, match=rf"^{path}: (is not a conversation written by /save|is damaged)"):
        talk.load(path, "demo")
    assert answer(talk, "What color is the background?")[0] == "The background is yellow."


def test_a_save_that_fails_keeps_the_last(talk: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(talk, "What is this image?", STARS)
    path = tmp_path / "talk.safetensors"
    talk.save(path, "demo")
    before = path.read_bytes()
    for name, error in (("fsync", OSError(errno.EIO, "I/O error")), ("rename", OSError(errno.ENOSPC, "full"))):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=str(path)):
            patch.setattr(os, name, lambda *_, error=error: (_ for _ in ()).throw(error))
            talk.save(path, "demo")
        assert os.listdir(tmp_path) == ["talk.safetensors"] and path.read_bytes() == before


@unicode_names
def test_control_sequences_are_not_obeyed(talk: Conversation, tmp_path: Path, capsys, monkeypatch) -> None:
    """In an answer and in the name of an image: a terminal would be cleared, or its title set."""
    path = tmp_path / "a\x1b[2J\u202e.jpg"
    path.write_bytes(STARS.read_bytes())
    chat = Chat(talk, "demo")
    response = SimpleNamespace(text="red\x1b]0;title\x07\n\r\u2066star")
    monkeypatch.setattr(Conversation, "ask", lambda *_: (each for each in [response]))
    monkeypatch.setattr("llama3v_mlx.conversation.last_figures", lambda *_: "")
    chat._image(shlex.quote(str(path)))
    chat._images("")
    chat.ask("What?")
    said = capsys.readouterr().out
    assert "a\\x1b[2J\\u202e.jpg" in said and "red\\x1b]0;title\\x07\n\\r\\u2066star" in said
    assert not set(said) & set("\x1b\x07\r\u202e\u2066")

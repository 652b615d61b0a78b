"""The file of answers: continued after any interruption, never mixed, sorted at the end."""

import errno
import json
import os
from pathlib import Path

import pytest

from llama3v_mlx import locks
from llama3v_mlx.answers import AnswerFile, AnswersError, settings_path, to_line

SETTINGS = {"prompt": "What is this?", "seed": 0}


def row(i: int, path: str | None = None, answer: str = "A cat.") -> dict:
    shown = {"answer": answer, "finish_reason": "stop", "tokens": 3, "sha256": f"{i:064x}", "stat": (i, i, i, i)}
    return {"path": path or f"/photos/{i}.jpg", **shown}


def write(path: Path, rows: list[dict]) -> None:
    """Write what is missing, as the command does."""
    with AnswerFile(path, SETTINGS) as file:
        for each in rows:
            if not file.is_unchanged(each["path"], each.get("stat")):
                file.write(each)
        file.finish([each["path"] for each in rows])


ROWS = [
    row(1),
    {"path": "/photos/2.jpg", "error": "the file is empty"},
    row(3, "/photos/a\nb\udcff.jpg", "Ein Kätzchen."),
    row(4),
]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def test_a_file_cut_anywhere_is_completed(out: Path) -> None:
    """As a kill or a full disk leaves it: no line is lost, doubled or half."""
    write(out, ROWS)
    whole = out.read_bytes()
    assert [json.loads(line)["path"] for line in whole.splitlines()] == [each["path"] for each in ROWS]
    assert "Kätzchen".encode() in whole and rb"a\nb\udcff.jpg" in whole
    for end in range(0, len(whole), 7):
        out.write_bytes(whole[:end])
        write(out, ROWS)
        assert out.read_bytes() == whole, end


def test_a_complete_file_is_left_alone(out: Path) -> None:
    write(out, ROWS)
    before = out.stat()
    write(out, ROWS)
    assert out.stat() == before


def test_an_equal_line_is_written_once(out: Path) -> None:
    """An image that fails again does not make an interrupted file grow."""
    with AnswerFile(out, SETTINGS) as file:
        for _ in range(2):
            for each in ROWS:
                file.write(each)
    assert out.read_bytes() == b"".join(map(to_line, ROWS))


def test_a_full_disk_in_the_middle_of_a_line(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only whole lines are left, also where the half line cannot be removed at once; the next run completes them."""
    write(out, ROWS)
    whole = out.read_bytes()
    pwrite, room = os.pwrite, len(whole) - 40

    def full(descriptor: int, data, offset: int) -> int:
        if offset >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, bytes(data)[: room - offset], offset)

    def broken(descriptor: int, length: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for is_broken in (False, True):
        out.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            if is_broken:
                patch.setattr(os, "ftruncate", broken)
            with pytest.raises(OSError, match="Input" if is_broken else "No space left on device: .*answers.jsonl"):
                write(out, ROWS)
        half = whole[:room] if is_broken else b"".join(whole.splitlines(True)[:3])
        assert out.read_bytes() == half
        write(out, ROWS)
        assert out.read_bytes() == whole


def test_a_disk_too_full_for_the_sorted_file(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers stay as they are, and the next run sorts them."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(out, ROWS[::-1])
    before = out.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("llama3v_mlx.files.sync", full)
        write(out, ROWS)
    assert out.read_bytes() == before
    assert sorted(os.listdir(out.parent)) == ["answers.jsonl", "answers.jsonl.settings.json"]
    write(out, ROWS)
    assert out.read_bytes() == b"".join(map(to_line, ROWS))


def test_superseded_lines_go_and_others_stay(out: Path) -> None:
    write(out, [row(9, "/elsewhere.jpg"), *ROWS])
    changed = row(7, "/photos/1.jpg", "A dog.")
    with AnswerFile(out, SETTINGS) as file:
        assert file.copy(bytes.fromhex(f"{1:064x}"))["answer"] == "A cat."
        file.write(changed)
        # Until the end, the former contents of the file are known as well.
        assert file.copy(bytes.fromhex(f"{1:064x}"))["answer"] == "A cat."
        file.write(row(2))  # it is no error any more
        file.finish(each["path"] for each in ROWS)
    assert out.read_bytes() == b"".join(map(to_line, [row(9, "/elsewhere.jpg"), changed, row(2), *ROWS[2:]]))


def test_other_settings_are_refused(out: Path) -> None:
    write(out, ROWS)
    before = out.read_bytes()
    with pytest.raises(AnswersError, match="prompt was 'What is this\\?' and is 'Where\\?'.*another --out"):
        AnswerFile(out, {**SETTINGS, "prompt": "Where?"})
    with pytest.raises(AnswersError, match="schema was None and is"):
        AnswerFile(out, {**SETTINGS, "schema": {}})
    assert out.read_bytes() == before
    out.write_bytes(b"")  # there is nothing to mix them with
    AnswerFile(out, {**SETTINGS, "prompt": "Where?"}).__exit__()
    assert json.loads(settings_path(out).read_text())["prompt"] == "Where?"


@pytest.mark.parametrize("content", [b"half a line of mine", b"my notes\n"])
def test_a_file_of_something_else_is_not_touched(out: Path, content: bytes) -> None:
    out.write_bytes(content)
    with pytest.raises(AnswersError, match="has no answers.jsonl.settings.json beside it"):
        AnswerFile(out, SETTINGS)
    assert out.read_bytes() == content and os.listdir(out.parent) == ["answers.jsonl"]


ODD = ("{", "[]", "{}", "\0\0", '{"path": []}', '{"path": "a"}', '{"path": "a", "sha256": "00"}', "[" * 100_000)
ODD += (
    '{"path": 1, "error": ""}',
    '{"path": "a", "answer": "", "sha256": 7}',
    '{"path": "a", "answer": "", "stat": [1]}',
)


@pytest.mark.parametrize("line", ODD)
def test_a_damaged_line_is_named(out: Path, line: str) -> None:
    write(out, ROWS)
    lines = out.read_bytes().splitlines(True)
    out.write_bytes(b"".join([*lines[:2], line.encode() + b"\n", *lines[2:]]))
    with pytest.raises(AnswersError, match=r"answers.jsonl:3: is not a line of answers"):
        AnswerFile(out, SETTINGS)


def test_one_writer_at_a_time(out: Path) -> None:
    with AnswerFile(out, SETTINGS) as file:
        with pytest.raises(OSError, match="is being written by another process"):
            AnswerFile(out, SETTINGS)
        file.write(row(1))
    with AnswerFile(out, SETTINGS) as file:
        assert len(file) == 1


def test_a_file_replaced_while_its_lock_is_awaited(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run replaces it by the sorted one: what is written next must not go to the one that is gone."""
    write(out, ROWS)
    lock, tried = locks.lock, []

    def replacing(file, wait: bool) -> bool:
        if not tried:
            os.replace(out, out.with_name("gone"))
            out.write_bytes(out.with_name("gone").read_bytes())
        tried.append(file)
        return lock(file, wait)

    monkeypatch.setattr(locks, "lock", replacing)
    write(out, [*ROWS, row(5)])
    assert len(tried) == 2 and out.read_bytes() == b"".join(map(to_line, [*ROWS, row(5)]))


def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(AnswersError, match="is not a regular file"):
            AnswerFile(path, SETTINGS)

"""Input that users type, drag or paste into the chat's line."""

import io
import json
import os
import re
import sys
import types
import urllib.parse
from pathlib import Path

import pytest
from conftest import unicode_names
from PIL import Image, ImageGrab

from llama3v_mlx.chat import Chat
from llama3v_mlx.conversation import Conversation
from llama3v_mlx.demo import IMAGES
from llama3v_mlx.image import ImageError
from llama3v_mlx.terminal import (
    completions,
    find_images,
    line_editing,
    read_clipboard,
    read_history,
    split_paths,
    write_history,
)

pytestmark = unicode_names

STARS, CROSS = IMAGES / "two-red-stars.jpg", IMAGES / "one-purple-cross.jpg"
SCREENSHOT = "Screenshot 2026-11-21 at 10.00.00\u202fAM.png"
ODD = [
    "plain.png",
    SCREENSHOT,
    "it's mine (1) & yours.jpg",
    'say "hi" $HOME!.webp',
    "back\\slash.HEIC",
    "Café — 図.avif",
]


def dragged(path: Path | str) -> str:
    """Escape a path like Terminal and iTerm2 do when a file is dropped into them."""
    return re.sub(r"""([ \\'"()&;|<>$`!*?#\[\]{}~])""", r"\\\1", str(path))


def quoted(path: Path | str) -> str:
    """Quote a path like VS Code's terminal."""
    return "'" + str(path).replace("'", "'\\''") + "'"


def url(path: Path) -> str:
    """Return the URL that Finder and browsers copy."""
    return "file://" + urllib.parse.quote(str(path))


@pytest.fixture(params=ODD)
def file(request, tmp_path: Path) -> Path:
    (tmp_path / request.param).touch()
    return tmp_path / request.param


@pytest.mark.parametrize("write", [dragged, quoted, url])
def test_a_dragged_file(file: Path, write) -> None:
    path, text = str(file), write(file)
    assert find_images(text) == ([path], "")
    assert find_images(f"{text} ") == ([path], "")
    assert find_images(f"{text} what is this?") == ([path], "what is this?")
    assert find_images(f"what's on {text} and why and/or how?") == ([path], "what's on and why and/or how?")
    assert find_images(f"what's on {text}?") == ([path], "what's on?")
    assert split_paths(text) == [path]


def test_several_dragged_at_once(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ODD]
    for each in files:
        each.touch()
    paths = [*map(str, files)]
    for write in (dragged, quoted, url):
        line = " ".join(map(write, files))
        assert find_images(f"{line} which is brighter?") == (paths, "which is brighter?")
        assert split_paths(line) == paths


def test_pasted_lines(tmp_path: Path) -> None:
    path = tmp_path / "two red.jpg"
    path.touch()
    text = f"Look at\n{dragged(path)}\nand {path} count:\n\n- the stars"
    assert find_images(text) == ([str(path)] * 2, "Look at\nand count:\n- the stars")


def test_a_path_with_plain_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed, or pasted without escapes."""
    path = tmp_path / SCREENSHOT
    path.touch()
    for written in (str(path), str(path).replace("\u202f", " ")):
        assert find_images(written) == ([written], "")
        assert find_images(f"tell me what {written} shows") == ([written], "tell me what shows")
        assert split_paths(written) == [written]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_images(f"~/{dragged(SCREENSHOT)} so?") == ([str(path)], "so?")
    assert split_paths(f"~/{dragged(SCREENSHOT)}") == [str(path)]
    monkeypatch.chdir(tmp_path)
    assert find_images(SCREENSHOT) == ([SCREENSHOT], "")


def test_pages_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "My paper.pdf"
    path.touch()
    for pages in ("", "#3", "#3-5", "#2-", "#1,4-6"):
        for written in (dragged(path) + pages, f"{path}{pages}", url(path) + pages):
            assert find_images(f"sum up {written}, please") == ([f"{path}{pages}"], "sum up, please"), written


TEXTS = [
    "is it red and/or blue, 1/2 or 3/4, at 5 km/h, w/o a doubt?",
    "what is https://example.com/a.png or http://x.org/b/c.jpg?",
    "it costs 3 $ /kg, or ~5/10 of that  with two spaces",
    "is .png better than .jpg, or JPEG/PNG?",
    "is `/etc/passwd` or `photo.jpg` a file?",
    "he's said 'tis \"fine\" ... / // \\ ok",
    "node.js, U.S./Canada, a.b.c and 10.5",
    "x" * 20_000,
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_text_stays_text(text: str) -> None:
    assert find_images(text) == ([], text)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("what is photo.jpg?", "photo.jpg"),
        ("what is on /Users/me/holiday\\ pictures/a please", "/Users/me/holiday pictures/a"),
        ("describe './none.png'.", "./none.png"),
        ("~/no/such/file", os.path.expanduser("~/no/such/file")),
        ("file:///no/such%20file.png", "/no/such file.png"),
        ("is IMG_1.DNG sharp?", "IMG_1.DNG"),
        ("paper.pdf#3-5", "paper.pdf#3-5"),
        (f"what is in {dragged(IMAGES)}?", str(IMAGES)),
        (f"read {dragged(__file__)}", __file__),
    ],
)
def test_what_is_meant_as_a_path_is_never_text(demo, text: str, path: str) -> None:
    assert find_images(text)[0] == [path]
    chat = Chat(Conversation(*demo), "demo")
    with pytest.raises(ImageError, match=re.escape(path)):
        chat.line(text)
    assert chat.waiting == [] and chat.conversation.turns == []


def test_all_images_of_a_line_or_none(demo, capsys) -> None:
    chat = Chat(Conversation(*demo), "demo")
    with pytest.raises(ImageError, match="gone.png: no such file"):
        chat.line(f"{STARS} and gone.png")
    assert chat.waiting == [] and capsys.readouterr().out == ""


# --- the clipboard ---------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that creates a shell script in the only folder on the PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)

    def make(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


def ask_pasted(demo, capsys, line: str) -> str:
    chat = Chat(Conversation(*demo, options={"temperature": 0}), "demo")
    assert chat.line(line)
    return capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has its own clipboard")
@pytest.mark.parametrize("name", ["wl-paste", "xclip"])
def test_paste_on_linux(demo, program, capsys, name: str) -> None:
    program(name, f'case "$*" in *uri-list*) exit 1;; esac\nexec /bin/cat {quoted(STARS)}')
    out = ask_pasted(demo, capsys, "/paste What is this image?")
    assert out.startswith("pasted image: 505x433, 5 tiles") and "Two red stars on a yellow background." in out
    program(
        name, f'case "$*" in *uri-list*) echo {quoted(f"file://{CROSS}")}; echo {quoted(url(STARS))};; *) exit 1;; esac'
    )
    assert read_clipboard() == [str(CROSS), str(STARS)]
    assert str(CROSS) in ask_pasted(demo, capsys, "/paste")
    program(name, 'case "$*" in *uri-list*) exit 1;; esac\necho Nothing is copied >&2; exit 1')
    with pytest.raises(ValueError, match="the clipboard holds no image or file"):
        read_clipboard()
    program(name, 'case "$*" in *uri-list*) exit 1;; esac\necho no display >&2; exit 1')
    with pytest.raises(ValueError, match=f"the clipboard cannot be read: {name} error: no display"):
        read_clipboard()
    program(name, 'case "$*" in *uri-list*) exit 1;; esac\necho text')
    with pytest.raises(ValueError, match="holds no image"):
        read_clipboard()


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has its own clipboard")
def test_paste_without_a_program(program, run_main, monkeypatch) -> None:
    with pytest.raises(ValueError, match="needs wl-paste .package wl-clipboard. or xclip; install one of them"):
        read_clipboard()
    done = run_main("llama3v_mlx.chat", input="/paste\n")
    assert done.returncode == 1 and "error: the clipboard needs wl-paste" in done.stderr


def test_paste_on_a_mac(program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate osascript's output: JSON for our script, and «data PNGf…» for Pillow's."""
    monkeypatch.setattr(sys, "platform", "darwin")
    image = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(image, "PNG")
    icon = f"«data PNGf{image.getvalue().hex().upper()}»"
    program(
        "osascript",
        f"if [ \"$1\" = -l ]; then /bin/cat <<'E'\n{json.dumps([str(STARS), 'b c.png'])}\nE\nelse echo '{icon}'; fi",
    )
    assert read_clipboard() == [str(STARS), "b c.png"]  # not the icon
    program("osascript", f"if [ \"$1\" = -l ]; then echo '[]'; else echo '{icon}'; fi")
    (found,) = read_clipboard()
    assert found.size == (30, 20)
    program("osascript", "exit 1")
    with pytest.raises(ValueError, match="holds no image"):
        read_clipboard()


def test_a_pasted_image_is_remembered_by_name(demo, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(ImageGrab, "grabclipboard", lambda: Image.open(CROSS))
    monkeypatch.setattr("llama3v_mlx.terminal._copied_files", lambda: [])
    chat = Chat(Conversation(*demo, options={"temperature": 0}), "demo")
    for line in ("/paste", "/images", "What is this image?", f"/save {tmp_path}/talk", "/images"):
        assert chat.line(line)
    out = capsys.readouterr().out
    assert "for the next question: pasted image" in out and "One purple cross" in out and "1. pasted image" in out


# --- completion and history ------------------------------------------------------------------------------------------


def complete(line: str, delimiters: str = " \t\n") -> list[str]:
    """Return the completed lines for an editor that does not know about backslashes."""
    begin = max((line.rfind(delimiter) for delimiter in delimiters), default=-1) + 1
    return [line[:begin] + found for found in completions(line, begin, [*Chat.COMMANDS, "/exit"])]


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My photos").mkdir()
    for name in ("a.png", "b.txt", "._a.png", ".hidden.png", "My photos/It's (1).heic", "talk.safetensors"):
        (tmp_path / name).touch()
    assert complete("/im") == ["/image ", "/images "]
    assert complete("/ex") == ["/exit "]
    assert complete("what is a") == ["what is a.png "]
    assert complete("/image M") == ["/image My\\ photos/"]
    assert complete("see My\\ ph") == ["see My\\ photos/"]
    assert complete("see My\\ photos/It") == ["see My\\ photos/It\\'s\\ \\(1\\).heic "]
    assert complete("see 'My ph") == ["see 'My photos/"]
    assert complete('see "My photos/') == ['see "My photos/It\'s (1).heic" ']
    assert complete(f"{dragged(tmp_path)}/My\\ photos/") == [f"{dragged(tmp_path)}/My\\ photos/It\\'s\\ \\(1\\).heic "]
    assert complete("/load t") == ["/load talk.safetensors "] and complete("see t") == []
    assert complete(".h") == [".hidden.png "] and complete("") == ["My\\ photos/", "a.png "]
    assert complete("none/x") == complete("it's none") == complete('"a.png"') == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert complete("~/a") == ["~/a.png "]


def test_what_completes_is_found(tmp_path: Path) -> None:
    for name in ODD:
        (tmp_path / name).touch()
        begun = f"{tmp_path}/{re.split('[^a-zA-Zé]', name[:3])[0]}"
        for start in (dragged(tmp_path / name[:3]), *(f"{quote}{begun}" for quote in "'\"" if quote not in begun)):
            (line,) = complete(f"what is {start}")
            assert find_images(line) == ([str(tmp_path / name)], "what is")


@pytest.mark.parametrize("is_libedit", [False, True])
@pytest.mark.parametrize("by_backend", [False, True])
def test_both_editors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_libedit: bool, by_backend: bool) -> None:
    """With a fake readline that records calls; Python 3.13 names the backend, older versions in the docstring."""
    told, items = [], []
    editor = types.ModuleType("readline", "Importing this module enables command line editing using GNU readline.")
    if by_backend:
        editor.backend = "editline" if is_libedit else "readline"
    elif is_libedit:
        editor.__doc__ = "Importing this module enables command line editing using libedit readline."
    editor.parse_and_bind = told.append
    editor.set_completer = editor.set_completer_delims = lambda value: None
    editor.add_history = items.append
    editor.get_current_history_length = lambda: len(items)
    editor.get_history_item = lambda i: items[i - 1]
    monkeypatch.setitem(sys.modules, "readline", editor)
    write_history(tmp_path / "history", ["what is this?"])
    with line_editing(tmp_path / "history", ["/help"]):
        items.append("and that?")
    assert told == (["bind ^I rl_complete"] if is_libedit else ["tab: complete", "set enable-bracketed-paste on"])
    assert (tmp_path / "history").read_text() == "what is this?\nand that?\n"


def test_history_of_either_editor(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history"
    assert read_history(path) == []
    lines = ["What color is it?", "Café\u202fAM \\040", *map(str, range(1500))]
    write_history(path, lines)
    assert read_history(path) == lines[-1000:] and [*path.parent.iterdir()] == [path]
    path.write_text("_HiStOrY_V2_\nWhat\\040color\\040is\\040it?\nCaf\\303\\251\n", encoding="utf-8")
    assert read_history(path) == ["What color is it?", "Café"]
    path.write_bytes(b"Caf\xe9\n")  # not UTF-8, as from a terminal without a locale
    write_history(path, read_history(path))
    assert path.read_bytes() == b"Caf\xe9\n"

"""Terminal input: paths typed or dragged into a line, completion, history, and the clipboard."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

from .files import find_path, is_junk, write_beside

# A word of a line: quoted if it begins with a quote, else with backslashes before spaces. Not split at \s, which
# includes U+202F, the narrow space in the names of macOS screenshots.
_WORD = re.compile(
    r"""(?:'[^']*'|"(?:\\.|[^"\\])*")(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^ \t\n\\])*|(?:\\.|[^ \t\n\\])+|\\"""
)
_PARTIAL = re.compile(r"""(?:^|(?<=[ \t]))('[^']*|"[^"]*|(?:\\.|[^ \t\\])*)$""")
_SPECIAL = re.compile(r"""([ \t\\'"()&;|<>$`!*?\[\]{}])""")
_PAGES = re.compile(r"(\.pdf)#[-0-9, ]*[-0-9]$", re.IGNORECASE)
_PUNCTUATION = ".,;:!?)"

_LIBEDIT = "_HiStOrY_V2_"
_HISTORY_LINES = 1000
# All files copied in Finder; `the clipboard as «class furl»` would only return the first.
_COPIED_FILES = """\
ObjC.import("AppKit");
JSON.stringify(ObjC.deepUnwrap($.NSPasteboard.generalPasteboard.propertyListForType("NSFilenamesPboardType")) || [])"""


def find_images(text: str) -> tuple[list[str], str]:
    """Split a line into the paths of image files and the remaining text.

    A path may be quoted, escaped with backslashes, contain plain spaces, be a file:// URL, or begin with ~. A word
    that looks like a path is treated as one even if the image does not exist, and is never left in the text.
    """
    words = list(_WORD.finditer(text))
    ends = [j for j, word in enumerate(words) if _is_named_like_image(unescape(word[0].rstrip(_PUNCTUATION)))]
    images, rest, i = [], [], 0
    while i < len(words):
        for j in [j for j in reversed(ends) if j >= i]:
            path, after = _existing(text[words[i].start() : words[j].end()])
            if path:
                break
        else:
            j, (path, after) = i, _meant(words[i][0])
        if path:
            images.append(path)
        if path and rest:
            rest[-1] += after
        elif not path:
            gap = text[words[i - 1].end() : words[i].start()] if i else ""
            rest.append(("\n" if "\n" in gap else " ") + words[i][0])
        i = j + 1
    return images, "".join(rest).lstrip() if images else text


def split_paths(text: str) -> list[str]:
    """Split a text that consists only of paths.

    Raises:
        ValueError: if a quote is not closed.
    """
    whole = unescape(text)
    return [whole] if os.path.isfile(find_path(whole)) else [_local(part) for part in shlex.split(text)]


def unescape(text: str) -> str:
    """Decode a path as pasted into a terminal: quoted, escaped, a file:// URL, or beginning with ~."""
    try:
        parts = shlex.split(text)
    except ValueError:  # such as an apostrophe
        parts = []
    return _local(parts[0] if len(parts) == 1 else re.sub(r"\\(.)", r"\1", text))


def _local(text: str) -> str:
    """Decode a file:// URL and expand a leading ~."""
    if text.startswith("file://"):
        text = urllib.parse.unquote(text.removeprefix("file://").removeprefix("localhost"))
    return os.path.expanduser(text)


def _is_named_like_image(path: str) -> bool:
    """Return True if a path has the suffix of an image or a PDF, supported or not."""
    from .formats import EXTENSIONS, UNREAD
    from .pdf import PDF

    return Path(_PAGES.sub(r"\1", path)).suffix.lower() in EXTENSIONS | UNREAD | {PDF}


def _existing(text: str) -> tuple[str | None, str]:
    """Return the existing image file that a text names and the punctuation after it; (None, "") if none."""
    bare = text.rstrip(_PUNCTUATION)
    for candidate, after in ((unescape(text), ""), (text, ""), (unescape(bare), text[len(bare) :])):
        if _is_named_like_image(candidate) and any(
            os.path.isfile(find_path(name)) for name in (candidate, _PAGES.sub(r"\1", candidate))
        ):
            return candidate, after
    return None, ""


def _meant(word: str) -> tuple[str | None, str]:
    """Return the path that a word looks like and the punctuation after it; (None, "") for text like and/or, 1/2."""
    bare = word.rstrip(_PUNCTUATION)
    path = unescape(bare)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", bare) and not bare.startswith("file://"):
        return None, ""
    rooted = re.match(r"(/[^/]+/|~([A-Za-z_][\w.-]*)?/|\.\.?/|file://)[^/]", bare.lstrip("'\""))
    exists = "/" in bare and bare.strip("/") and os.path.lexists(path)
    if rooted or exists or _is_named_like_image(path):
        return path, word[len(bare) :]
    return None, ""


def completions(line: str, begin: int, commands: Sequence[str]) -> list[str]:
    """Complete the end of a line with commands, folders and images; return replacements for `line[begin:]`.

    Args:
        line: the line up to the cursor.
        begin: start of the word according to the editor, which may be after an escaped space.
        commands: completed only at the beginning of a line.
    """
    match = _PARTIAL.search(line)
    if match is None:
        return []
    word, start = match[1], match.start(1)
    found = [f"{name} " for name in commands if start == 0 and word and name.startswith(word)]
    any_file = line.startswith(("/save ", "/load "))
    quote = word[:1] if word[:1] in ("'", '"') else ""
    head = word[: word.rfind("/") + 1] or quote
    base = word[len(head) :] if quote else re.sub(r"\\(.)", r"\1", word[len(head) :])
    folder = unescape(head + quote) if head != quote else "."
    base = unicodedata.normalize("NFC", base)
    with contextlib.suppress(OSError), os.scandir(find_path(folder)) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = entry.name
            if not unicodedata.normalize("NFC", name).startswith(base) or is_junk(name):
                continue
            if name.startswith(".") and not base:
                continue
            if entry.is_dir():
                end = "/"
            elif any_file or _is_named_like_image(name):
                end = f"{quote} "
            else:
                continue
            found.append(head + _escape(name, quote) + end)
    typed = line[start:begin]
    return [candidate[len(typed) :] for candidate in found if candidate.startswith(typed)]


def _escape(name: str, quote: str) -> str:
    """Escape a name as a shell does within these quotes, or without any."""
    if quote == "'":
        return name.replace("'", r"'\''")
    return (re.compile(r'(["\\])') if quote else _SPECIAL).sub(r"\\\1", name)


@contextlib.contextmanager
def line_editing(history: Path, commands: Sequence[str]) -> Iterator[None]:
    """Enable Tab completion and a persistent history for `input`."""
    try:
        import readline
    except ImportError:
        yield
        return
    matches: list[str] = []

    def complete(text: str, state: int) -> str | None:
        if state == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            matches[:] = completions(line, readline.get_begidx(), commands)
        return matches[state] if state < len(matches) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind(_tab_binding(readline))
    if not _is_libedit(readline):
        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question
    for line in read_history(history):
        readline.add_history(line)
    try:
        yield
    finally:
        readline.set_completer(None)
        items = map(readline.get_history_item, range(1, readline.get_current_history_length() + 1))
        with contextlib.suppress(OSError):
            write_history(history, [item for item in items if item])


def _tab_binding(readline) -> str:
    return "bind ^I rl_complete" if _is_libedit(readline) else "tab: complete"


def _is_libedit(readline) -> bool:
    """Return True if `readline` is libedit, as on many Macs, which has its own syntax."""
    return getattr(readline, "backend", "") == "editline" or "libedit" in (readline.__doc__ or "")


def read_history(path: Path) -> list[str]:
    """Read the lines of a history file, either plain or written by libedit, with \\040 for a space."""
    try:
        data = path.read_bytes()
    except OSError:
        return []
    lines = data.split(b"\n")
    if lines[0] == _LIBEDIT.encode():
        lines = [re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8) & 255]), line) for line in lines[1:]]
    return [line.decode(errors="surrogateescape") for line in lines if line][-_HISTORY_LINES:]


def write_history(path: Path, lines: Sequence[str]) -> None:
    """Write a history file of plain lines, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, "".join(f"{line}\n" for line in lines[-_HISTORY_LINES:]).encode(errors="surrogateescape"))


def read_clipboard() -> list:
    """Return the paths of copied files, or else a list of one PIL image.

    Raises:
        ValueError: if the clipboard has neither, or the program needed on Linux is missing.
    """
    from PIL import ImageGrab, UnidentifiedImageError

    if files := _copied_files():  # first, because Finder also copies an image of their icon
        return files
    try:
        found = ImageGrab.grabclipboard()
    except NotImplementedError:
        raise ValueError("the clipboard needs wl-paste (package wl-clipboard) or xclip; install one of them") from None
    except UnidentifiedImageError:  # xclip returns text if there is no image
        found = None
    except OSError as e:
        raise ValueError(f"the clipboard cannot be read: {e}") from e
    if not found:
        raise ValueError("the clipboard holds no image or file")
    return found if isinstance(found, list) else [found]


def _copied_files() -> list[str]:
    """Return the paths of the files on the clipboard."""
    if sys.platform == "darwin":
        return json.loads(_output("osascript", "-l", "JavaScript", "-e", _COPIED_FILES) or "[]")
    kind = ("-t", "text/uri-list")
    out = _output("wl-paste", *kind) or _output("xclip", "-selection", "clipboard", *kind, "-o")
    return [_local(line.strip()) for line in out.splitlines() if line.startswith("file://")]


def _output(*command: str) -> str:
    """Return the output of a program; empty if it fails or is not installed."""
    if not shutil.which(command[0]):
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
        return done.stdout if done.returncode == 0 else ""
    return ""

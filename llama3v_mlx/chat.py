"""Chat about images in the terminal: `llama3v chat`, then drag an image into the line and ask."""

import argparse
import contextlib
import os
import re
import shlex
import sys
from pathlib import Path

from .cli import CACHE, DEMO_NOTE, add_generation_options, error_line, generation_options, note_slow_cpu, run
from .demo import CHECKPOINT
from .features.sources import EXTENSIONS

HELP = """\
Ask a question; paste, type or drag the path of an image anywhere into the line to add it.
  /image PATH [PATH…]   add images to the next question
  /images               the images so far
  /undo                 take the last question and its answer back
  /clear, r             start anew
  /save FILE            write the conversation, with all that was read, to a file
  /load FILE            go on with one
  /stats                what the last answer took
  /help, h              this
  /exit, q, Ctrl-D      leave; Ctrl-C stops an answer"""
HISTORY = CACHE / "chat_history"


class Chat:
    """What a line does; `conversation` keeps what was said."""

    def __init__(self, conversation, name: str):
        self.conversation, self.name = conversation, name
        self.waiting: list[str] = []  # images for the next question
        self.stats = "nothing was asked yet"

    def line(self, text: str) -> bool:
        """Do what a line says; False if it is to be the last.

        Raises:
            ValueError: if it cannot be done.
        """
        text = text.strip()
        word, _, rest = text.partition(" ")
        command = {"q": "/exit", "r": "/clear", "h": "/help"}.get(text, word)
        if command == "/exit":
            return False
        action = getattr(self, f"_{command[1:]}", None) if re.fullmatch("/[a-z]+", command) else None
        if action is not None:
            action(rest.strip())
            return True
        if command.startswith("/") and not is_image(unescape(command)):
            raise ValueError(f"{command}: no such command or image; /help lists the commands")
        images, question = find_images(text)
        self._add(images)
        if question:
            self.ask(question)
        return True

    def ask(self, question: str) -> None:
        """Put a question with the waiting images, and print the answer as it comes."""
        from .conversation import last_figures

        stream = self.conversation.ask(question, self.waiting, self.waiting)
        response = None
        try:
            for response in stream:
                print(response.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" …", end="")
        finally:
            stream.close()
        if response is None:
            return
        print()
        self.waiting = []
        self.stats = last_figures(response, self.conversation)
        print(dim(self.stats))

    def _add(self, paths: list[str]) -> None:
        from .image import load_image, plan_tiles

        for path in paths:
            image = load_image(path)
            tiles = plan_tiles(*image.size, self.conversation.processor.image_config)
            tokens = self.conversation.processor.num_image_tokens(tiles)
            self.waiting.append(path)
            print(dim(f"{path}: {image.width}x{image.height}, {tiles.num_tiles} tiles, {tokens} tokens"))

    def _image(self, rest: str) -> None:
        try:
            paths = shlex.split(rest)
        except ValueError as e:
            raise ValueError(f"/image {rest}: {e}") from None
        if not paths:
            raise ValueError("/image: give one or more paths")
        self._add([str(Path(path).expanduser()) for path in paths])

    def _images(self, rest: str) -> None:
        names = [name for turn in self.conversation.turns for name in turn.images]
        for i, name in enumerate(names, 1):
            print(f"{i}. {name}")
        for name in self.waiting:
            print(f"for the next question: {name}")
        if not names and not self.waiting:
            print("no images yet")

    def _undo(self, rest: str) -> None:
        turn = self.conversation.undo()
        print(f"taken back: {turn.text}" if turn else "there is no question to take back")

    def _clear(self, rest: str) -> None:
        self.conversation.clear()
        self.waiting = []
        print("started anew")

    def _save(self, rest: str) -> None:
        path = _file(rest, "/save")
        self.conversation.save(path, self.name)
        print(f"saved to {path}")

    def _load(self, rest: str) -> None:
        self.conversation.load(_file(rest, "/load"), self.name)
        for turn in self.conversation.turns:
            print("".join(f"[{name}] " for name in turn.images) + turn.text)
            print(turn.answer.strip())

    def _stats(self, rest: str) -> None:
        print(self.stats)

    def _help(self, rest: str) -> None:
        print(HELP)


def _file(text: str, command: str) -> Path:
    if not text:
        raise ValueError(f"{command}: give a file")
    path = Path(unescape(text)).expanduser()
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def unescape(text: str) -> str:
    """A path as a terminal pastes it: in quotes, or with backslashes before spaces and the like."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return re.sub(r"\\(.)", r"\1", text)


def is_image(path: str) -> bool:
    """Whether a path is a file that is called like an image."""
    with contextlib.suppress(OSError, RuntimeError):
        path = Path(path).expanduser()
        return path.suffix.lower() in EXTENSIONS and path.is_file()
    return False


def find_images(text: str) -> tuple[list[str], str]:
    """The paths of images in a line, and the rest of it."""
    images = []

    def take(match: re.Match) -> str:
        path = unescape(match[0])
        if not is_image(path):
            return match[0]
        images.append(str(Path(path).expanduser()))
        return ""

    rest = re.sub(r"'[^']*'|\"[^\"]*\"|(?:\\.|[^\s\\])+", take, text)
    return images, " ".join(rest.split()) if images else text


def dim(text: str) -> str:
    """Grey, where that can be seen."""
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


@contextlib.contextmanager
def history():
    """Line editing, and the lines of earlier chats."""
    try:
        import readline
    except ImportError:
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(HISTORY)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            HISTORY.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(HISTORY)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llama3v chat", description="Chat with Llama3-V about images.")
    parser.add_argument("--model", help="folder or Hub repository of a checkpoint (default: the bundled demo)")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="images for the first question")
    parser.add_argument("--system-prompt", help="goes before the first question (default: none)")
    add_generation_options(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return parser


def chat(args: argparse.Namespace) -> None:
    """Load, then read lines until there are no more."""
    import mlx.core as mx

    from .checkpoint import name_of
    from .conversation import Conversation
    from .features.lookup import FeatureCache
    from .generation import load

    if args.model is None:
        print(DEMO_NOTE, file=sys.stderr)
    note_slow_cpu()
    model, processor = load(
        args.model or CHECKPOINT, max_image_tiles=args.max_image_tiles, adapter_path=args.adapter_path
    )
    name = name_of(args.model or CHECKPOINT)
    features = FeatureCache(args.features, model, processor.image_config, name) if args.features else None
    if args.seed is not None:
        mx.random.seed(args.seed)
    title = f"{name} with {args.adapter_path}" if args.adapter_path else name
    session = Chat(Conversation(model, processor, args.system_prompt, features, generation_options(args)), title)
    session._add(args.image)
    if sys.stdin.isatty():
        print("Ask about an image; drag its file into the line. /help lists what else there is, Ctrl-D leaves.")
    going_on, failed = True, False
    with history():
        while going_on:
            try:
                going_on = session.line(input(">> " if sys.stdin.isatty() else ""))
            except EOFError:
                going_on = False
            except KeyboardInterrupt:
                print()
            except (ValueError, OSError) as e:
                print(f"error: {error_line(e)}", file=sys.stderr)
                failed = True
    if failed and not sys.stdin.isatty():
        sys.exit(1)  # a script wants to know


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    run(lambda: chat(args), args.debug)


if __name__ == "__main__":
    main()

"""Chat about images in the terminal with `llama3v chat`: drag an image into the line and ask."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .cli import (
    CACHE,
    DEMO_NOTE,
    add_generation_options,
    add_inputs,
    error_line,
    generation_options,
    loading_options,
    note_slow_cpu,
    run,
)
from .demo import CHECKPOINT
from .files import printable
from .terminal import find_images, line_editing, read_clipboard, split_paths, unescape

HELP = """\
Ask a question; paste, type or drag the path of an image or a PDF anywhere
into the line to add it. A path that is not an image is an error, unless it is
in `backticks`. Tab completes commands and paths.
  /image PATH ...       add images to the next question; paper.pdf#3-5: pages
  /paste [QUESTION]     add the clipboard's image or files
  /images               list the images so far
  /undo                 remove the last question and its answer
  /clear, r             start over
  /save FILE            save the conversation and its cache
  /load FILE            load a saved conversation
  /stats                show the timings of the last answer
  /help, h              show this help
  /exit, q, Ctrl-D      quit; Ctrl-C stops an answer"""
HISTORY = CACHE / "chat_history"
# Lines that are commands: mlx-lm's, and what other prompts are left with.
ALIASES = {"q": "/exit", "exit": "/exit", "quit": "/exit", "/quit": "/exit", "r": "/clear", "h": "/help"}
LINES = "\n\t"  # characters of an answer that are printed as they are
PASTED = "pasted image"


@dataclass(frozen=True)
class Waiting:
    """Image for the next question."""

    name: str
    image: Any  # an `ImageSource`
    num_tokens: int


class Chat:
    """Interpreter of the lines of a chat about images; its state is a `Conversation`."""

    def __init__(self, conversation, name: str):
        self.conversation, self.name = conversation, name
        self.waiting: list[Waiting] = []
        self.stats = "no answer yet"

    def line(self, text: str) -> bool:
        """Execute a command or ask a question; return False to quit.

        Raises:
            ValueError: if the line cannot be executed.
        """
        text = text.strip(" \t\r\n")  # not the narrow spaces of file names
        word, *rest = text.split(maxsplit=1) or [""]
        command = ALIASES.get(text, word)
        if command == "/exit":
            return False
        if command in self.COMMANDS:
            self.COMMANDS[command](self, "".join(rest))
            return True
        images, question = find_images(text)
        if word.startswith("/") and question.split(maxsplit=1)[:1] == [word]:
            raise ValueError(f"{word}: no such command or image; /help lists the commands")
        before = list(self.waiting)
        self._add(images)
        if question:
            try:
                self.ask(question)
            finally:
                if self.waiting:  # no answer: the line can be repeated without adding its images twice
                    self.waiting = before
        return True

    def ask(self, question: str) -> None:
        """Ask a question about the waiting images and stream the answer to stdout."""
        from .conversation import last_figures

        images, names = [each.image for each in self.waiting], [each.name for each in self.waiting]
        stream = self.conversation.ask(question, images, names)
        response = None
        try:
            for response in stream:
                print(printable(response.text, keep=LINES), end="", flush=True)
        except KeyboardInterrupt:
            print(" ...", end="" if response else "\n")
        finally:
            stream.close()
        if response is None:
            return
        print()
        self.waiting = []
        self.stats = last_figures(response, self.conversation)
        print(dim(self.stats))

    def _add(self, sources: Sequence) -> None:
        """Add images to the next question: all of them, or none if one is unusable."""
        from PIL.Image import Image

        from .image import expand, image_size
        from .tiling import plan_tiles

        processor = self.conversation.processor
        images = [image for source in sources for image in expand(source)]
        taken = len(self.conversation.ids) + sum(each.num_tokens for each in self.waiting)
        processor.check_pages(images, self.conversation.context - taken)
        waiting, lines = [], []
        for image in images:
            width, height = image_size(image, processor.image_config)
            tiles = plan_tiles(width, height, processor.image_config)
            tokens = processor.num_image_tokens(tiles)
            waiting.append(Waiting(PASTED if isinstance(image, Image) else str(image), image, tokens))
            lines.append(f"{printable(waiting[-1].name)}: {width}x{height}, {tiles.num_tiles} tiles, {tokens} tokens")
        self.waiting += waiting
        for line in lines:
            print(dim(line))

    def _image(self, rest: str) -> None:
        try:
            paths = split_paths(rest)
        except ValueError as e:
            raise ValueError(f"/image {rest}: {e}") from None
        if not paths:
            raise ValueError("/image: give one or more paths")
        self._add(paths)

    def _paste(self, rest: str) -> None:
        self._add(read_clipboard())
        if rest:
            self.ask(rest)

    def _images(self, rest: str) -> None:
        names = [name for turn in self.conversation.turns for name in turn.images]
        for i, name in enumerate(names, 1):
            print(f"{i}. {printable(name)}")
        for each in self.waiting:
            print(f"for the next question: {printable(each.name)}")
        if not names and not self.waiting:
            print("no images yet")

    def _undo(self, rest: str) -> None:
        turn = self.conversation.undo()
        print(f"removed: {printable(turn.text, keep=LINES)}" if turn else "there is no question to remove")

    def _clear(self, rest: str) -> None:
        self.conversation.clear()
        self.waiting = []
        print("started over")

    def _save(self, rest: str) -> None:
        path = _file(rest, "/save")
        self.conversation.save(path, self.name)
        print(f"saved to {printable(str(path))}")

    def _load(self, rest: str) -> None:
        self.conversation.load(_file(rest, "/load"), self.name)
        for turn in self.conversation.turns:
            print("".join(f"[{printable(name)}] " for name in turn.images) + printable(turn.text, keep=LINES))
            print(printable(turn.answer.strip(), keep=LINES))

    def _stats(self, rest: str) -> None:
        print(self.stats)

    def _help(self, rest: str) -> None:
        print(HELP)

    COMMANDS: ClassVar[dict[str, Callable[["Chat", str], None]]] = {
        "/image": _image,
        "/paste": _paste,
        "/images": _images,
        "/undo": _undo,
        "/clear": _clear,
        "/save": _save,
        "/load": _load,
        "/stats": _stats,
        "/help": _help,
    }


def _file(text: str, command: str) -> Path:
    if not text:
        raise ValueError(f"{command}: give a file name")
    path = Path(unescape(text))
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def dim(text: str) -> str:
    """Print text in grey if stdout is a terminal that may show colors."""
    return f"\033[2m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama3v chat",
        usage="llama3v chat [--model MODEL] [--image FILE ...] [options]",
        description="Chat with Llama3-V about images.",
    )
    add_inputs(parser, "images or PDFs for the first question")
    parser.add_argument("--system-prompt", help="instructions before the first question (default: none)")
    add_generation_options(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return parser


def chat(args: argparse.Namespace) -> None:
    """Load the model, then read lines until the end of input."""
    import mlx.core as mx

    from .checkpoint import name_of
    from .conversation import Conversation
    from .drafting.draft_model import load_draft_model
    from .features.lookup import FeatureCache
    from .generation import load

    if args.model is None:
        print(DEMO_NOTE, file=sys.stderr)
    note_slow_cpu()
    options = loading_options(args, args.model or CHECKPOINT)
    model, processor = load(
        args.model or CHECKPOINT, max_image_tiles=args.max_image_tiles, adapter_path=args.adapter_path, **options
    )
    name = name_of(args.model or CHECKPOINT)
    features = FeatureCache(args.features, model, processor.image_config, name) if args.features else None
    options = generation_options(args)
    if args.draft_model is not None:
        options["draft_model"] = load_draft_model(args.draft_model, processor, model.language_model.args.vocab_size)
    if args.seed is not None:
        mx.random.seed(args.seed)
    title = f"{name} with {args.adapter_path}" if args.adapter_path else name
    session = Chat(Conversation(model, processor, args.system_prompt, features, options), title)
    session._add(args.image)
    if sys.stdin.isatty():
        print("Drag an image into the line and ask. /help lists the commands, Ctrl-D quits.")
    going_on, failed = True, False
    with line_editing(HISTORY, (*Chat.COMMANDS, "/exit")):
        while going_on:
            try:
                going_on = session.line(input(">> " if sys.stdin.isatty() else ""))
            except EOFError:
                going_on = False
                if sys.stdin.isatty():
                    print()
            except KeyboardInterrupt:
                print()
            except (ValueError, OSError) as e:
                print(f"error: {error_line(e)}", file=sys.stderr)
                failed = True
    if failed and not sys.stdin.isatty():
        sys.exit(1)  # for scripts


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    run(lambda: chat(args), args.debug)


if __name__ == "__main__":
    main()

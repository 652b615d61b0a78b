"""Code shared by the commands: exit codes, one-line errors, quiet libraries, and generation options."""

import argparse
import contextlib
import io
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from .files import explain_denial, printable

Number = TypeVar("Number", int, float)

DEMO_NOTE = (
    "note: this is the bundled demo model, which knows plain shapes and handwritten numbers and nothing else; for the "
    "real one: llama3v convert --hf-path openbmb/MiniCPM-Llama3-V-2_5 --mlx-path llama3v-4bit -q, then --model "
    "llama3v-4bit"
)
DEMO_SIGLIP_NOTE = (
    "note: this is the bundled demo SigLIP, which knows plain shapes and handwritten numbers and nothing else; for "
    "your pictures: --model google/siglip-so400m-patch14-384"
)
# Errors of MLX, C++ and Python for memory, or a thread's stack, that cannot be allocated.
_OUT_OF_MEMORY = re.compile("[Uu]nable to allocate|bad_alloc|can't start new thread|Resource temporarily unavailable")
# A relative XDG_CACHE_HOME, or an empty one, is to be ignored. A user without a home has /, as in a container.
_CACHES = [Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~/.cache")), Path("/.cache")]
CACHE = next(filter(Path.is_absolute, _CACHES)) / "llama3v_mlx"
# Runs a module that ends with this process, however that ends: then the pipe at its stdin is closed.
FOLLOWING = """
import os, runpy, sys, threading

def end():
    os.read(0, 1)  # not sys.stdin: a thread that waits in it would keep Python from exiting
    os._exit(1)

threading.Thread(target=end, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
GENERATION = ("max_tokens", "top_p", "top_k", "min_p", "repetition_penalty")
GENERATION += ("kv_bits", "kv_group_size", "quantized_kv_start")


def _open_closed_streams() -> None:
    """Open on /dev/null what the caller has closed (`<&-`), before a file gets its descriptor.

    MLX takes descriptor 0 for a failure, and what is written to 1 and 2 would end in that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


_open_closed_streams()


def run(command: Callable[[], None], debug: bool = False, awake: bool = False) -> None:
    """Run a command and exit: 0 on success, 1 with one `error:` line on failure, 130 on Ctrl-C.

    With `debug`, a failure shows its traceback instead of that line, and library warnings are shown. With `awake`, a
    Mac does not sleep until the command has ended.
    """
    _prepare_streams()
    _leave_torch_out()
    if not debug:
        hush_libraries()
    try:
        if os.environ.get("LLAMA3V_DEVICE"):
            from .device import select

            select()
        with keep_awake() if awake else contextlib.nullcontext():
            command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`): there is nothing to report, and flushing at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as e:
        if debug:
            raise
        print(f"error: {error_line(e)}", file=sys.stderr)
        sys.exit(1)


@contextlib.contextmanager
def keep_awake() -> Iterator[None]:
    """Keep a Mac from sleeping while it is idle; elsewhere, do nothing."""
    program = shutil.which("caffeinate")
    if program is None:
        yield
        return
    # -w: caffeinate exits if this process is killed. A session of its own keeps Ctrl-C from reaching it.
    command = [program, "-i", "-w", str(os.getpid())]
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def error_line(error: Exception) -> str:
    """Format an error as one line, with its type unless it is a ValueError or OSError."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    text = printable(" ".join(text.splitlines()).strip())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)):
        return f"out of memory ({text or 'allocation failed'}); close other programs, or use a smaller model or batch"
    if isinstance(error, (ValueError, OSError)) and text:
        return explain_denial(text)
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"


def note_slow_cpu() -> None:
    """Print a note if MLX computes on a Linux CPU without OpenBLAS, where float32 matmul is slow."""
    from . import HAS_OPENBLAS
    from .device import on_gpu

    if sys.platform == "linux" and not on_gpu() and not HAS_OPENBLAS:
        print(
            "note: without OpenBLAS, MLX reads images and prompts about 40 times slower on this CPU: apt-get install "
            "libopenblas0-pthread",
            file=sys.stderr,
        )


def _prepare_streams() -> None:
    """Escape what a terminal's encoding lacks, and open /dev/null for standard streams that the caller has closed.

    A file opened in the place of one would get its messages, and MLX takes descriptor 0 for a failure.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(descriptor)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _leave_torch_out() -> None:
    """Keep transformers from importing torch if it is installed: no command uses it, and importing it takes 2 s.

    This applies only to processes started as one of our commands: other programs that import us may use torch.
    """
    main = sys.modules["__main__"]  # `python -m llama3v_mlx…`, or one of the scripts llama3v, llama3v.generate, …
    script = Path(getattr(main, "__file__", None) or "").name
    if main.__package__ == __package__ or script.split(".")[0] == "llama3v":
        sys.modules.setdefault("torch", None)  # Python treats this as not installed


def hush_libraries() -> None:
    """Silence warnings of libraries that a user cannot act on."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def check_plot(picture: str) -> None:
    """Check, before hours of work, that a plot can be drawn and saved.

    Raises:
        ValueError: if matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    path, formats = Path(picture), FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in formats:
        raise ValueError(f"--plot {picture}: matplotlib writes {', '.join(formats)}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {picture}: no folder {path.parent}")


def add_inputs(parser: argparse.ArgumentParser, images: str) -> None:
    """Add --model and --image, whose help is `images`."""
    parser.add_argument("--model", help="folder or Hub repository of a checkpoint (default: the bundled demo)")
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help=images)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of generate and chat: adapters, sampling, memory and feature store."""
    parser.add_argument("--adapter-path", metavar="DIR", help="adapters written by llama3v train")
    parser.add_argument(
        "-m", "--max-tokens", type=positive, default=1024, help="maximum number of tokens to generate (default: 1024)"
    )
    sampling = parser.add_argument_group("sampling", "defaults come from the checkpoint's generation_config.json")
    sampling.add_argument("--temp", "--temperature", type=share_or_more, help="sampling temperature; 0: greedy")
    sampling.add_argument("--top-p", type=share, help="nucleus sampling: cumulative probability cutoff")
    sampling.add_argument("--top-k", type=count, help="sample from this many of the most likely tokens; 0: all")
    sampling.add_argument("--min-p", type=share, help="minimum probability, as a fraction of the most likely token's")
    sampling.add_argument("--repetition-penalty", type=share_or_more, help="penalty on generated tokens; 1: none")
    sampling.add_argument("--seed", type=seed, help="random seed, to repeat an answer")
    drafts = parser.add_argument_group(
        "drafts", "several tokens verified in one pass through Llama; answers are the same"
    )
    drafts.add_argument("--no-draft", action="store_true", help="do not draft from the conversation")
    drafts.add_argument("--draft-model", metavar="MODEL", help="also draft with a small Llama of the same vocabulary")
    cache = parser.add_argument_group("memory")
    cache.add_argument(
        "--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="bits per value of a quantized key-value cache"
    )
    cache.add_argument(
        "--kv-group-size", type=int, choices=(32, 64, 128), default=64, help="its group size (default: 64)"
    )
    cache.add_argument(
        "--quantized-kv-start", type=count, default=5000, help="number of tokens before it is quantized (default: 5000)"
    )
    cache.add_argument("--features", metavar="STORE", help="feature store to look images up in and add new ones to")
    cache.add_argument("--max-image-tiles", type=positive, help="maximum tiles per image, including the overview")
    add_memory_options(cache)


def add_memory_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of generate, chat and server for machines with little memory."""
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="keep tower and projector in memory only while images are encoded (default on 8 GB)",
    )
    parser.add_argument("--force", action="store_true", help="load a model even if it does not fit in memory")


def loading_options(
    args: argparse.Namespace, model: str | Path, images: int | None = None, text_tokens: int = 0
) -> dict:
    """Check that the models fit in memory, and return the arguments of `load` from the options of `add_memory_options`.

    Args:
        args: parsed options.
        model: the checkpoint.
        images: number of images in a prompt; None: as many as fit in the context.
        text_tokens: text tokens of prompt and answer together.

    Raises:
        MemoryLimitError: if the model does not fit and --force is not given.
    """
    from .memory import check_memory, is_small

    low_memory = args.low_memory or is_small()
    if not args.force:
        options = {name: getattr(args, name, None) for name in ("max_image_tiles", "kv_bits", "draft_model")}
        check_memory(model, images=images, text_tokens=text_tokens, low_memory=low_memory, **options)
    return {"low_memory": low_memory}


def generation_options(args: argparse.Namespace) -> dict:
    """Arguments of `stream_generate` from the options of `add_generation_options`."""
    draft = None if args.no_draft else "auto"
    return {"temperature": args.temp, "draft": draft} | {name: getattr(args, name) for name in GENERATION}


def positive(text: str) -> int:
    """Parse a positive integer option."""
    return _checked(int, text, 1, math.inf, "is not 1 or more")


def size(text: str) -> int:
    """Parse an option in bytes: 500000, 500k, 500M or 5G."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9}
    unit = units.get(text[-1:].lower(), 1)
    return positive(text[:-1] if unit > 1 else text) * unit


def share(text: str) -> float:
    """Parse an option from 0 to 1."""
    return _checked(float, text, 0, 1, "is not from 0 to 1")


def share_or_more(text: str) -> float:
    """Parse a finite option of 0 or more."""
    return _checked(float, text, 0, sys.float_info.max, "is not 0 or more, and finite")


def count(text: str) -> int:
    """Parse a whole option of 0 or more."""
    return _checked(int, text, 0, math.inf, "is below 0")


def seed(text: str) -> int:
    """Parse a seed of MLX's random numbers."""
    return _checked(int, text, 0, 2**64 - 1, "is not from 0 to 2^64 - 1")


def _checked(parse: Callable[[str], Number], text: str, least: float, most: float, problem: str) -> Number:
    try:
        value = parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if parse is int else ''}number") from None
    if not least <= value <= most:  # nor is it NaN
        raise argparse.ArgumentTypeError(f"{value} {problem}")
    return value

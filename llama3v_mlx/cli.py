"""What the commands share: exit codes, errors in one line, quiet libraries, and the options of generation."""

import argparse
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

DEMO_NOTE = (
    "note: this is the bundled demo model, which knows plain shapes and handwritten numbers and nothing else; for the "
    "real one: llama3v convert --hf-path openbmb/MiniCPM-Llama3-V-2_5 --mlx-path llama3v-4bit -q, then --model "
    "llama3v-4bit"
)
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llama3v_mlx"
GENERATION = ("max_tokens", "top_p", "top_k", "min_p", "repetition_penalty")
GENERATION += ("kv_bits", "kv_group_size", "quantized_kv_start")


def run(command: Callable[[], None], debug: bool = False, awake: bool = False) -> None:
    """Run a command and exit: 0 when it is done, 1 with one `error:` line when it fails, 130 on Ctrl-C.

    With `debug`, a failure shows its traceback in place of the line, and libraries may warn. With `awake`, a Mac does
    not sleep before the command has ended.
    """
    _leave_torch_out()
    if not debug:
        _hush_libraries()
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
        # The reader went away (`| head`): nothing is left to say, and flushing at exit would only fail again.
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
    # -w: should this process be killed, caffeinate ends by itself. Ctrl-C is for this process to answer.
    command = [program, "-i", "-w", str(os.getpid())]
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def error_line(error: Exception) -> str:
    """What went wrong, in one line; errors that are nobody's input name their type."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"


def note_slow_cpu() -> None:
    """Say once, on Linux without a GPU, what makes float32 matmul fast there."""
    from . import HAS_OPENBLAS
    from .device import on_gpu

    if sys.platform == "linux" and not on_gpu() and not HAS_OPENBLAS:
        print(
            "note: MLX is 40 to 80 times slower on this CPU without OpenBLAS: apt-get install libopenblas0-pthread",
            file=sys.stderr,
        )


def _leave_torch_out() -> None:
    """Keep transformers from importing torch where it is installed: no command uses it, and it takes 2 s to import.

    Only in a process that was started as one of our commands: what else imports us may well use torch.
    """
    main = sys.modules["__main__"]  # of `python -m llama3v_mlx…`, or one of the scripts llama3v, llama3v.generate, …
    script = Path(getattr(main, "__file__", None) or "").name
    if main.__package__ == __package__ or script.split(".")[0] == "llama3v":
        sys.modules.setdefault("torch", None)  # which Python takes for not installed


def _hush_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Adapters, sampling, memory and feature store, as generate and chat take them."""
    parser.add_argument("--adapter-path", metavar="DIR", help="adapters of the model, from llama3v train")
    parser.add_argument("-m", "--max-tokens", type=positive, default=1024, help="length of the answer (default: 1024)")
    sampling = parser.add_argument_group("sampling", "defaults come from the checkpoint's generation_config.json")
    sampling.add_argument("--temp", type=share_or_more, help="temperature; 0: always the likeliest token")
    sampling.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this probability together")
    sampling.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens; 0: all")
    sampling.add_argument("--min-p", type=float, help="draw from tokens of this share of the likeliest's probability")
    sampling.add_argument("--repetition-penalty", type=share_or_more, help="on tokens already generated; 1: none")
    sampling.add_argument("--seed", type=int, help="of the random numbers, to repeat an answer")
    cache = parser.add_argument_group("memory")
    cache.add_argument("--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantize the key-value cache")
    cache.add_argument("--kv-group-size", type=int, choices=(32, 64, 128), default=64, help="(default: 64)")
    cache.add_argument("--quantized-kv-start", type=int, default=5000, help="from this token on (default: 5000)")
    cache.add_argument("--features", metavar="STORE", help="a store where images are looked up, and new ones kept")
    cache.add_argument("--max-image-tiles", type=positive, help="tiles per image, the overview included, at most")
    add_memory_options(cache)


def add_memory_options(parser: argparse._ActionsContainer) -> None:
    """What to do on a machine that is small for the model; for generate, chat and server."""
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="tower and projector are in memory only while images are encoded (default on 8 GB)",
    )
    parser.add_argument("--force", action="store_true", help="load a model that does not fit the memory")


def loading_options(
    args: argparse.Namespace, model: str | Path, images: int | None = None, text_tokens: int = 0
) -> dict:
    """What `add_memory_options` has read, for `load`, after a look at the memory.

    Args:
        args: as parsed.
        model: the checkpoint.
        images: how many images a prompt has; None: as many as the context has room for.
        text_tokens: of prompt and answer together.

    Raises:
        MemoryLimitError: if the model does not fit, and --force is not given.
    """
    from .memory import check_memory, is_small

    low_memory = args.low_memory or is_small()
    if not args.force:
        options = {name: getattr(args, name, None) for name in ("max_image_tiles", "kv_bits")}
        check_memory(model, images=images, text_tokens=text_tokens, low_memory=low_memory, **options)
    return {"low_memory": low_memory}


def generation_options(args: argparse.Namespace) -> dict:
    """What `add_generation_options` has read, for `stream_generate`."""
    return {"temperature": args.temp} | {name: getattr(args, name) for name in GENERATION}


def positive(text: str) -> int:
    """An option's whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def size(text: str) -> int:
    """An option's number of bytes: 500000, 500k, 500M or 5G."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9}
    unit = units.get(text[-1:].lower(), 1)
    return positive(text[:-1] if unit > 1 else text) * unit


def share_or_more(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return value

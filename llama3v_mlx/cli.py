"""What the commands share: exit codes, errors in one line, and quiet libraries."""

import logging
import os
import sys
import warnings
from collections.abc import Callable


def run(command: Callable[[], None], debug: bool = False) -> None:
    """Run a command and exit: 0 when it is done, 1 with one `error:` line when it fails, 130 on Ctrl-C.

    With `debug`, a failure shows its traceback in place of the line, and libraries may warn.
    """
    if not debug:
        _hush_libraries()
    try:
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


def error_line(error: Exception) -> str:
    """What went wrong, in one line; errors that are nobody's input name their type."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"


def note_slow_cpu() -> None:
    """Say once, on Linux without a GPU, what makes float32 matmul fast there."""
    import mlx.core as mx

    from . import HAS_OPENBLAS

    if sys.platform == "linux" and mx.default_device() == mx.cpu and not HAS_OPENBLAS:
        print(
            "note: MLX is 40 to 80 times slower on this CPU without OpenBLAS: apt-get install libopenblas0-pthread",
            file=sys.stderr,
        )


def _hush_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

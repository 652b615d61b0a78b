"""Serve Llama3-V as OpenAI does: `llama3v server`; `serving/` is the server."""

import argparse
import logging
import os
import re
import signal
import sys
import threading
import urllib.parse
from pathlib import Path

from .cli import (
    DEMO_NOTE,
    DEMO_SIGLIP_NOTE,
    add_memory_options,
    count,
    loading_options,
    note_slow_cpu,
    positive,
    run,
    share,
    share_or_more,
    size,
)
from .demo import CHECKPOINT, SIGLIP
from .files import printable

GRACE_SECONDS = 5.0  # for running answers when the server is stopped
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def serve(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C, SIGTERM or the end of the terminal; running answers then have `GRACE_SECONDS`.

    Raises:
        OSError: if the address is taken, or the prompt cache's folder cannot be made.
        CheckpointError: if a checkpoint cannot be loaded.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    # Told in whichever thread a signal arrives, which may not wake this one, and if a library swallows the exit.
    signal.set_wakeup_fd(tell)
    before = {number: signal.signal(number, lambda *_: sys.exit(0)) for number in stop_signals()}
    try:
        _serve(args, tuple(before), told)
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(told)
        os.close(tell)


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that stop the server; not the end of the terminal under nohup, which ignores it."""
    end = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return signal.SIGINT, signal.SIGTERM, *end


class HarmlessFormatter(logging.Formatter):
    """Escapes what a terminal would obey in names of files and in what other programs say."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


def _serve(args: argparse.Namespace, stop: tuple[signal.Signals, ...], told: int) -> None:
    from .generation import load
    from .serving.app import App, Options, announcement
    from .serving.prefix_cache import PrefixCache, fingerprint

    note_slow_cpu()
    handler = logging.StreamHandler()
    handler.setFormatter(HarmlessFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=args.log_level, handlers=[handler])
    app = App(
        Options(
            name=Path(args.model).name if args.model else "llama3v-demo",
            host=args.host,
            port=args.port,
            api_key=os.environ[args.api_key_env] if args.api_key_env else None,
            allowed_origins=tuple(args.allow_origin),
            allowed_hosts=tuple(args.allowed_host),
            max_body=args.max_body_mb * 10**6,
            max_images=args.max_images,
            max_pixels=args.max_megapixels * 10**6,
            timeout=args.timeout,
            max_tokens=args.max_tokens,
            concurrency=args.decode_concurrency,
            step_size=args.prefill_step_size,
            embedding_model=args.embedding_model or SIGLIP,
            library=args.library,
            library_index=args.library_index,
            library_model=args.library_model or args.embedding_model or SIGLIP,
        )
    )
    name = args.model or CHECKPOINT
    options = loading_options(args, name)
    model, processor = load(name, adapter_path=args.adapter_path, max_image_tiles=args.max_image_tiles, **options)
    sampling = processor.sampling.override(**{name: getattr(args, name) for name in SAMPLING})
    folder = Path(args.prompt_cache_dir).expanduser() if args.prompt_cache_dir else None
    own = fingerprint(model, (model.args, processor.prompt_tokens)) if folder else ""
    llama = model.language_model.args
    shape = (
        llama.num_hidden_layers,
        llama.num_key_value_heads,
        llama.head_dim or llama.hidden_size // llama.num_attention_heads,
    )
    prefixes = PrefixCache(args.prompt_cache_bytes, folder, own, args.prompt_cache_dir_bytes, shape)
    app.listen(model, processor, prefixes, sampling)

    if app.library is not None:
        app.library.indexer.start()
    for number in stop:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=app.serve_forever, name="accept", daemon=True).start()
    print(announcement(app.options, *app.server_address[:2]), file=sys.stderr, flush=True)
    os.read(told, 1)
    for number in (signal.SIGINT, signal.SIGTERM):  # a second time means at once
        signal.signal(number, signal.SIG_DFL)
    app.close(GRACE_SECONDS)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="llama3v server",
        usage="llama3v server [--model MODEL] [--port PORT] [options]",
        description="Serve Llama3-V over HTTP, as OpenAI does, and a page to chat with it.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="folder or Hub repository of a checkpoint (default: the bundled demo)")
    parser.add_argument("--adapter-path", metavar="DIR", help="adapters of the model, from llama3v train")
    parser.add_argument("--embedding-model", help="SigLIP for /v1/embeddings (default: the bundled demo's)")
    parser.add_argument("--library", metavar="FOLDER", help="pictures to search and ask about on the page")
    parser.add_argument("--library-index", metavar="DIR", help="folder of their index (default: in the cache)")
    parser.add_argument("--library-model", metavar="SIGLIP", help="its SigLIP (default: that of --embedding-model)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8080, help="port; 0: any free port (default: 8080)")
    parser.add_argument("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings of the start")

    who = parser.add_argument_group("access")
    who.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the API key that clients must send"
    )
    who.add_argument(
        "--allow-origin",
        action="append",
        type=_origin,
        default=[],
        metavar="ORIGIN",
        help="origin of other web pages to admit; *: all",
    )
    who.add_argument(
        "--allowed-host",
        action="append",
        type=_host_name,
        default=[],
        metavar="NAME",
        help="further host name of this server",
    )

    defaults = parser.add_argument_group("defaults of requests", "sampling defaults to the checkpoint's")
    defaults.add_argument("--max-tokens", type=positive, default=1024, help="length of an answer (default: 1024)")
    defaults.add_argument(
        "--temp", "--temperature", type=share_or_more, dest="temperature", help="temperature; 0: greedy"
    )
    defaults.add_argument("--top-p", type=share, help="nucleus sampling: cumulative probability cutoff")
    defaults.add_argument("--top-k", type=count, help="sample from the k most likely tokens; 0: all")
    defaults.add_argument("--min-p", type=share, help="probability cutoff relative to the most likely token")
    defaults.add_argument("--repetition-penalty", type=share_or_more, help="penalty on generated tokens; 1: none")

    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-image-tiles", type=positive, help="maximum tiles per image, including the overview")
    limits.add_argument("--max-body-mb", type=positive, default=32, help="largest request (default: 32)")
    limits.add_argument("--max-images", type=positive, default=16, help="images per request (default: 16)")
    limits.add_argument(
        "--max-megapixels", type=positive, default=100, help="megapixels of all images of a request (default: 100)"
    )
    limits.add_argument("--timeout", type=positive, default=600, help="seconds per answer (default: 600)")

    work = parser.add_argument_group("computation and memory")
    work.add_argument("--decode-concurrency", type=positive, default=16, help="answers generated at once (default: 16)")
    work.add_argument(
        "--prefill-step-size", type=positive, default=512, help="prompt tokens prefilled at once (default: 512)"
    )
    work.add_argument(
        "--prompt-cache-bytes",
        type=size,
        default="1G",
        metavar="SIZE",
        help="size of the prefix cache in memory (default: 1G)",
    )
    work.add_argument("--prompt-cache-dir", metavar="DIR", help="keep the prefix cache here across restarts")
    work.add_argument(
        "--prompt-cache-dir-bytes",
        type=size,
        default="8G",
        metavar="SIZE",
        help="size of the prefix cache on disk (default: 8G)",
    )
    add_memory_options(work)
    args = parser.parse_args(argv)
    if args.api_key_env and not os.environ.get(args.api_key_env):
        parser.error(f"--api-key-env: the environment has no {args.api_key_env}")
    if not args.host:
        parser.error("--host: is empty; 0.0.0.0 is all addresses of this machine")
    if args.model is None:
        print(DEMO_NOTE, file=sys.stderr)
    if args.library is None and (args.library_index or args.library_model):
        parser.error("--library-index and --library-model need --library FOLDER")
    if args.library is not None and not (args.library_model or args.embedding_model):
        print(DEMO_SIGLIP_NOTE.replace("--model", "--library-model"), file=sys.stderr)
    run(lambda: serve(args), args.debug)


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{value} is not a port")
    return value


def _origin(text: str) -> str:
    origin = text.rstrip("/")
    if origin not in ("*", "null") and not re.fullmatch(r"[\w+.-]+://[^/\s]+", origin):
        raise argparse.ArgumentTypeError(f"{text} is not an origin like https://chat.example or http://localhost:3000")
    return origin


def _host_name(text: str) -> str:
    """Name of a host, whose port does not matter."""
    try:
        name = urllib.parse.urlsplit(f"//{text}").hostname
    except ValueError:
        name = None
    if not name or "/" in text:
        raise argparse.ArgumentTypeError(f"{text} is not the name of a host, like mac.local")
    return name


if __name__ == "__main__":
    main()

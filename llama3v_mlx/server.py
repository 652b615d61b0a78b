"""An OpenAI-compatible server: `llama3v server`. It is mlx-lm's own, serving one model, its edges closed.

All options of `mlx_lm.server` are taken as well.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import select
import socket
import sys
import threading
import warnings
from pathlib import Path

from .cli import DEMO_NOTE, note_slow_cpu, run
from .demo import CHECKPOINT, SIGLIP

PAGE = Path(__file__).parent / "serving" / "page.html"


def make_classes(options: argparse.Namespace):
    """mlx-lm's provider, generator and handler, with what they lack; made late, for mlx-lm takes a second to import."""
    import numpy as np
    from mlx_lm import server

    from .generation import load, on_generated
    from .image import ImageError, load_image, plan_tiles
    from .serving.embeddings import Embedder
    from .serving.image_prefix import cache_key, read_images
    from .serving.json_schema import SchemaError, Schemas
    from .serving.validate import RequestError, check_inputs, check_messages

    embedder = Embedder(options.embedding_model or SIGLIP)

    # So that an image is turned upright and laid over white here as everywhere else.
    server._decode_image = lambda url: np.asarray(load_image(url))
    # mlx-lm serves requests one by one in which this finds images; here they go into its batches, see `Generator`.
    server._image_parts = lambda messages: iter(())
    # On generated tokens alone, as the reference does, and here never on what stands for an image.
    make_processors = server._make_logits_processors
    server._make_logits_processors = lambda args: [
        on_generated(process) for process in (*make_processors(args), *args.more_processors)
    ]

    class Provider(server.ModelProvider):
        """Serves the one model that it was started with, whatever name a request gives."""

        loaded = threading.Event()

        def load(self, model_path=None, adapter_path=None, draft_model_path=None):
            if self.model is None:
                self.model, self.processor = load(options.model or CHECKPOINT, adapter_path=self.cli_args.adapter_path)
                self.tokenizer = self.processor.tokenizer
                self.schemas = Schemas(self.tokenizer, self.model.language_model.args.vocab_size)
                self.model_key = (options.name, None, None)
                self.is_batchable = True
                for name, value in (("temp", "temperature"), ("top_p", "top_p"), ("top_k", "top_k")):
                    if f"--{name.replace('_', '-')}" not in sys.argv:
                        setattr(self.cli_args, name, getattr(self.model.sampling, value))
                self.loaded.set()
            return self.model, self.tokenizer

        def load_default(self):
            self.load()

    class Generator(server.ResponseGenerator):
        """Reads the images of a request into the prefix cache, where mlx-lm's batches find them."""

        def _tokenize(self, tokenizer, request, args):
            prompt, segments, types, state, vision = super()._tokenize(tokenizer, request, args)
            context = self.model_provider.model.language_model.args.max_position_embeddings
            if len(prompt) >= context:
                raise RequestError(
                    400,
                    f"the prompt of {len(prompt)} tokens is too long for the context of {context}",
                    "context_length_exceeded",
                )
            args.max_tokens = min(args.max_tokens, context - len(prompt))
            if not args.logits.repetition_penalty:
                args.logits.repetition_penalty = self.model_provider.model.sampling.repetition_penalty
            if vision is None:
                return prompt, segments, types, state, None
            key = cache_key(prompt, vision.cache_key, tokenizer.vocab_size)
            provider, step = self.model_provider, self.cli_args.prefill_step_size
            args.cached = read_images(provider.model, provider.model_key, self.prompt_cache, prompt, key, vision, step)
            return key, [key], types, state, None

    class Watched:
        """A generator that stops when the client has gone, and keeps what it failed with: mlx-lm passes on the text."""

        def __init__(self, generator: Generator, connection: socket.socket):
            self._generator, self._connection = generator, connection
            self.failure: Exception | None = None
            self.response_format: dict | None = None

        def __getattr__(self, name: str):
            return getattr(self._generator, name)

        def generate(self, request, args, *rest, **kwargs):
            try:
                args.more_processors = self._more_processors()
                context, responses = self._generator.generate(request, args, *rest, **kwargs)
            except Exception as e:
                self.failure = e
                raise
            context.prompt_cache_count = getattr(args, "cached", context.prompt_cache_count)

            def watched():
                for response in responses:
                    yield response
                    if self._gone():
                        raise ConnectionResetError("the client has gone")

            return context, watched()

        def _more_processors(self) -> list:
            if self.response_format is None:
                return []
            process = self.model_provider.schemas.processor(self.response_format)
            return [process] if process else []

        def _gone(self) -> bool:
            try:
                readable, _, _ = select.select([self._connection], [], [], 0)
                return bool(readable) and self._connection.recv(1, socket.MSG_PEEK) == b""
            except (OSError, ValueError):  # it is closed
                return True

    class Handler(server.APIHandler):
        PATHS = ("/v1/completions", "/v1/chat/completions", "/chat/completions")

        def __init__(self, generator: Generator, request: socket.socket, *args, **kwargs):
            self._failed: int | None = None
            self._answering = False
            super().__init__(Watched(generator, request), request, *args, **kwargs)

        def setup(self):
            super().setup()
            self.connection.settimeout(60)  # for a client that never sends what it promised

        def do_POST(self):
            try:
                while not self.response_generator.model_provider.loaded.wait(1):
                    if not self.response_generator.generation_available():
                        raise RequestError(500, "the model could not be loaded", "internal_error")
                body = self._check()
                if self.path in self.OURS:
                    self.OURS[self.path](self, body)
                    return
                super().do_POST()
                if self._failed:
                    self._rewrite()
            except RequestError as e:
                self._fail(e.status, str(e), e.code)
            except (ConnectionError, TimeoutError):
                self.close_connection = True
            except Exception as e:
                self._fail(500, f"{type(e).__name__}: {e}", "internal_error")

        def do_GET(self):
            try:
                if self.path == "/":
                    self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
                    return
                if self.path != "/health":
                    self._check_key()
                super().do_GET()
            except RequestError as e:
                self._fail(e.status, str(e), e.code)
            except ConnectionError:
                self.close_connection = True

        def _check(self) -> dict:
            """Read and check a request, and leave it for mlx-lm to read again."""
            if self.path not in (*self.PATHS, *self.OURS):
                raise RequestError(404, f"{self.path}: there is no such endpoint", "not_found")
            self._check_key()
            length = self.headers.get("Content-Length", "")
            if not length.isdigit():
                raise RequestError(411, "Content-Length is required", "length_required")
            most = options.max_body_mb * 10**6
            if int(length) > most:
                for _ in range(min(int(length), 8 * most) >> 16):  # else the client never reads the answer
                    self.rfile.read(1 << 16)
                raise RequestError(413, f"the body of {int(length):,} bytes is over {most:,}", "body_too_large")
            try:
                body = json.loads(self.rfile.read(int(length)))
            except ValueError as e:
                raise RequestError(400, f"the body is not JSON: {e}", "invalid_json") from e
            if not isinstance(body, dict):
                raise RequestError(400, "the body must be a JSON object", "invalid_json")
            if self.path in self.OURS:
                return body
            if "chat" in self.path:
                check_messages(body.get("messages"), options.allow_remote_images, most)
            elif not isinstance(body.get("prompt"), str):
                raise RequestError(400, "prompt must be text", "invalid_prompt")
            if not isinstance(body.get("stream_options"), (dict, type(None))):
                raise RequestError(400, "stream_options must be an object", "invalid_request")
            if body.get("stream_options") is not None:
                body["stream_options"].setdefault("include_usage", False)
            self.response_generator.response_format = body.pop("response_format", None)
            data = json.dumps({key: value for key, value in body.items() if value is not None}).encode()
            self.rfile = io.BytesIO(data)
            self.headers.replace_header("Content-Length", str(len(data)))
            return body

        def _embed(self, body: dict) -> None:
            """OpenAI's embeddings, of texts and of images given as data: URIs."""
            inputs, form = check_inputs(body)
            try:
                rows, count = embedder.embed(inputs)
            except ImageError as e:
                raise RequestError(400, str(e), "invalid_image") from e
            except ValueError as e:
                raise RequestError(400, str(e), "invalid_input") from e
            data = []
            for i, row in enumerate(rows):
                value = base64.b64encode(row.astype("<f4")).decode() if form == "base64" else row.tolist()
                data.append({"object": "embedding", "index": i, "embedding": value})
            usage = {"prompt_tokens": count, "total_tokens": count}
            name = Path(options.embedding_model or SIGLIP).name
            self._send(200, {"object": "list", "data": data, "model": name, "usage": usage})

        def _tiles(self, body: dict) -> None:
            """How the model cuts an image, for the page."""
            if not isinstance(body.get("image"), str) or not body["image"].startswith("data:"):
                raise RequestError(400, "image must be a data: URI", "invalid_image")
            try:
                image = load_image(body["image"])
            except ImageError as e:
                raise RequestError(400, str(e), "invalid_image") from e
            provider = self.response_generator.model_provider
            tiling = plan_tiles(*image.size, provider.processor.image_config)
            seen = {"width": image.width, "height": image.height, "overview": tiling.overview, "grid": tiling.grid}
            seen |= {"slice": tiling.cell, "tokens": provider.processor.num_image_tokens(tiling)}
            self._send(200, seen)

        def _send(self, status: int, value: dict | bytes, kind: str = "application/json") -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self._set_cors_headers()
            self.end_headers()
            self.wfile.write(data)

        OURS = {"/v1/embeddings": _embed, "/v1/tiles": _tiles}

        def _check_key(self) -> None:
            if options.api_key and self.headers.get("Authorization") != f"Bearer {options.api_key}":
                raise RequestError(401, "wrong or missing API key", "invalid_api_key")

        def _set_completion_headers(self, status_code: int = 200):
            if status_code >= 400:  # what mlx-lm writes of it is put into OpenAI's form at the end
                self._failed, self._client, self.wfile = status_code, self.wfile, io.BytesIO()
            super()._set_completion_headers(status_code)

        def _set_stream_headers(self, status_code: int = 200):
            self._answering = True
            super()._set_stream_headers(status_code)

        def _rewrite(self) -> None:
            said = self.wfile.getvalue().partition(b"\r\n\r\n")[2].decode()
            self.wfile = self._client
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = json.loads(said)["error"]
            failure = self.response_generator.failure
            if isinstance(failure, RequestError):
                raise failure
            if isinstance(failure, SchemaError):
                raise RequestError(400, str(failure), "invalid_response_format")
            if isinstance(failure, ImageError):
                raise RequestError(400, str(failure), "invalid_image")
            raise RequestError(400 if self._failed == 404 else self._failed, said, "invalid_request")

        def _fail(self, status: int, message: str, code: str) -> None:
            kind = {401: "authentication_error", 500: "server_error"}.get(status, "invalid_request_error")
            error = {"error": {"message": message, "type": kind, "code": code, "param": None}}
            try:
                if self._answering:
                    self.wfile.write(f"data: {json.dumps(error)}\n\n".encode())
                    return
                self._headers_buffer = []
                self._send(status, error)
            except ConnectionError:
                self.close_connection = True

        def handle_models_request(self):
            model = {"id": options.name, "object": "model", "created": self.created, "owned_by": "llama3v_mlx"}
            self._send(200, {"object": "list", "data": [model]})

        def log_message(self, format: str, *args):
            server.logging.info(format, *args)

    return Provider, Generator, Handler


def serve(options: argparse.Namespace, rest: list[str]) -> None:
    """Start mlx-lm's server with our classes in it, until Ctrl-C."""
    warnings.filterwarnings("ignore", message="mlx_lm.server is not recommended")
    from mlx_lm import server
    from mlx_lm.models.cache import LRUPromptCache

    Provider, Generator, Handler = make_classes(options)

    def start(host: str, port: int, model_provider) -> None:
        generator = Generator(model_provider, LRUPromptCache(model_provider.cli_args.prompt_cache_size))
        print(f"serving {options.name} at http://{host}:{port}", file=sys.stderr)
        server._run_http_server(host, port, generator, handler_class=Handler)

    server.ModelProvider, server.run = Provider, start
    sys.argv = ["llama3v server", "--host", options.host, "--port", str(options.port)]
    sys.argv += ["--log-level", "WARNING"] * ("--log-level" not in rest) + rest
    server.main()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="llama3v server",
        description="Serve Llama3-V over HTTP, as OpenAI does.",
        epilog="All options of mlx_lm.server are taken as well: --max-tokens, --temp, --prompt-cache-size, …",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="folder or Hub repository of a checkpoint (default: the bundled demo)")
    parser.add_argument("--embedding-model", help="SigLIP for /v1/embeddings (default: the bundled demo)")
    parser.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="(default: 8080)")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the key that clients must send"
    )
    parser.add_argument("--allow-remote-images", action="store_true", help="fetch images from public http(s) addresses")
    parser.add_argument("--max-body-mb", type=int, default=32, help="largest request (default: 32)")
    options, rest = parser.parse_known_args(argv)
    options.api_key = os.environ.get(options.api_key_env) if options.api_key_env else None
    if options.api_key_env and not options.api_key:
        parser.error(f"--api-key-env: the environment has no {options.api_key_env}")
    options.name = Path(options.model).name if options.model else "llama3v-demo"
    if options.model is None:
        print(DEMO_NOTE, file=sys.stderr)
    note_slow_cpu()
    run(lambda: serve(options, rest))


if __name__ == "__main__":
    main()

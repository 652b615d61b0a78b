"""The HTTP server: access checks, routes, and answers in OpenAI's format, whole or streamed."""

import base64
import concurrent.futures
import dataclasses
import hashlib
import hmac
import io
import ipaddress
import json
import logging
import queue
import re
import select
import socket
import socketserver
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..files import printable
from ..models.llama3v import Model
from ..prompt import Processor
from ..sampling import Sampling
from .batch import Settings
from .checks import RequestError, parse, read_json
from .embeddings import Embedder
from .engine import Engine, internal_error
from .jobs import Job, Logprob, NeedImages, Token
from .json_schema import ResponseFormats
from .library import SIDE, ServedLibrary
from .prefix_cache import PrefixCache
from .prompts import chat_prompt, completion_prompt, num_tokens, plan_image
from .requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    LibrarySearchRequest,
    LibraryUpdateRequest,
    Limits,
    TilesRequest,
    read_image,
)

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page.html"
HEARTBEAT = 0.5  # seconds without a token after which a stream says what it is at
RECEIVE_SECONDS = 30.0  # for a request to arrive, in all
MAX_CONNECTIONS = 128
MAX_BODIES = 8  # of the largest size, in memory at once


@dataclass(frozen=True)
class Options:
    """Options of the server."""

    name: str  # of the model
    host: str = "127.0.0.1"
    port: int = 8080  # 0: a free one
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()  # of web pages beside our own; "*": all
    allowed_hosts: tuple[str, ...] = ()  # names in `Host` beside loopback and the address that was bound
    max_body: int = 32 * 10**6  # bytes
    max_images: int = 16
    max_pixels: int = 100_000_000  # of a request's images together
    timeout: float = 600.0  # seconds for an answer
    max_tokens: int = 1024  # of an answer whose request does not say
    concurrency: int = 16  # answers at once
    step_size: int = 512  # tokens that are prefilled at once
    embedding_model: str | Path | None = None  # None: no /v1/embeddings
    library: str | Path | None = None  # folder of pictures
    library_index: str | Path | None = None  # None: in the cache
    library_model: str | Path | None = None  # a SigLIP; None: the embedding model


class App(ThreadingHTTPServer):
    """HTTP server of one model. It binds at once, listens after `listen`, and answers while `serve_forever` runs.

    Raises:
        OSError: if the address cannot be bound.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, options: Options):
        self.options = options
        self.address_family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        self.created = int(time.time())
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._bodies = threading.BoundedSemaphore(MAX_BODIES)
        self._running = 0  # requests that are being answered
        self._lock = threading.Lock()
        self.stopping = False
        self.page = PAGE.read_bytes()
        self.library: ServedLibrary | None = None
        super().__init__((options.host, options.port), Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except BaseException:
            self.server_close()
            raise

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # not HTTPServer's, which looks up the host's name
        self.server_name, self.server_port = self.server_address[:2]

    def listen(self, model: Model, processor: Processor, prefixes: PrefixCache, sampling: Sampling) -> None:
        """Start listening, and answer with a model and default sampling.

        Raises:
            OSError: if another process listens at the address by now.
            CheckpointError: if there is no such embedding model.
        """
        options = self.options
        self.processor, self.sampling = processor, sampling
        self.limits = Limits(
            vocab_size=model.language_model.args.vocab_size,
            context=model.language_model.args.max_position_embeddings,
            longest_token=max(map(len, processor.tokenizer.get_vocab())),
            max_images=options.max_images,
            max_pixels=options.max_pixels,
        )
        self.formats = ResponseFormats(processor.tokenizer, self.limits.vocab_size)
        self.engine = Engine(model, processor, prefixes, options.concurrency, options.step_size)
        try:
            self.embedder = options.embedding_model and Embedder(options.embedding_model, self.engine.run)
            self.library = options.library and self._open_library()
            self.server_activate()
        except BaseException:
            self.engine.stop()
            raise

    def _open_library(self) -> ServedLibrary:
        options, embedder = self.options, self.embedder
        if options.library_model not in (None, options.embedding_model):
            embedder = Embedder(options.library_model, self.engine.run)
        return ServedLibrary(options.library, options.library_index, embedder)

    def close(self, seconds: float = 0.0) -> None:
        """Stop accepting connections, wait for running answers up to `seconds`, then fail the rest."""
        self.stopping = True
        if self.library is not None:
            self.library.indexer.stop()
        self.shutdown()
        self.server_close()
        self._wait_until_done(seconds)
        self.engine.stop()
        self._wait_until_done(1.0)

    def _wait_until_done(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._running and time.monotonic() < end:
            time.sleep(0.01)

    def process_request(self, request: socket.socket, client_address) -> None:
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._connections.release()
            raise

    def process_request_thread(self, request: socket.socket, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request, client_address) -> None:
        log.exception("a connection failed")

    def begin_request(self) -> None:
        with self._lock:
            if self.stopping:
                raise RequestError(503, "the server is shutting down", "shutting_down")
            self._running += 1

    def end_request(self) -> None:
        with self._lock:
            self._running -= 1

    def host_is_allowed(self, host: str, local: str) -> bool:
        """Whether `Host` names this server, which defends against DNS rebinding.

        Args:
            host: the header.
            local: the address that the client connected to.
        """
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        allowed = {self.options.host.lower(), "localhost", *map(str.lower, self.options.allowed_hosts)}
        if name in allowed and name not in ("0.0.0.0", "::"):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        reached = ipaddress.ip_address(local.partition("%")[0])
        return address.is_loopback or address in (reached, getattr(reached, "ipv4_mapped", None))

    def origin_is_allowed(self, origin: str, host: str) -> bool:
        """Whether pages of an origin are admitted: our own page, or an origin named by an option."""
        return origin == f"http://{host}" or bool({origin, "*"} & set(self.options.allowed_origins))


class _TimedReader(io.RawIOBase):
    """Reader of a socket with a deadline for the whole request."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.deadline = time.monotonic() + RECEIVE_SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._connection.settimeout(max(0.001, self.deadline - time.monotonic()))
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(RECEIVE_SECONDS)


class Handler(BaseHTTPRequestHandler):
    """A connection."""

    server: App
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "llama3v_mlx", ""
    disable_nagle_algorithm = True
    timeout = RECEIVE_SECONDS

    def setup(self) -> None:
        super().setup()
        self._reader = _TimedReader(self.connection)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        self._reader.deadline = time.monotonic() + RECEIVE_SECONDS
        self._streaming = False
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    # http.server calls these by their names.

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_OPTIONS(self) -> None:
        self._answer(self._preflight)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer requests that http.server refuses: malformed request lines or headers, unknown methods."""
        self.close_connection = True
        status = 405 if code == 501 else code
        self._send_failure(RequestError(status, message or "malformed request", "invalid_http"))

    def log_message(self, format: str, *args) -> None:
        log.info("%s %s", self.address_string(), printable(format % args))

    def _answer(self, method) -> None:
        if self.command == "POST" or self.headers.get("Content-Length", "0") != "0" or self._is_chunked():
            # Until it is read, a body would be taken for the next request.
            self.close_connection = True
        try:
            self._check_client()
            method()
        except RequestError as e:
            self._send_failure(e)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as e:
            self._send_failure(internal_error(e))

    def _is_chunked(self) -> bool:
        return "Transfer-Encoding" in self.headers

    def _check_client(self) -> None:
        self.path_only = self.path.partition("?")[0]
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self.server.host_is_allowed(hosts[0], self.connection.getsockname()[0]):
            raise RequestError(403, "Host does not name this server; see --allowed-host", "host_not_allowed")
        self._host, self._origin = hosts[0], self.headers.get("Origin")
        if self._origin is not None and not self.server.origin_is_allowed(self._origin, self._host):
            raise RequestError(403, "this Origin is not admitted; see --allow-origin", "origin_not_allowed")

    def _check_key(self) -> None:
        key = self.server.options.api_key
        if key is None:
            return
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise RequestError(401, "wrong or missing API key", "invalid_api_key")

    def _preflight(self) -> None:
        """Answer a CORS preflight of an origin that `_check_client` has admitted."""
        asked = self.headers.get("Access-Control-Request-Headers", "")
        allowed = asked if re.fullmatch(r"[\w\-, ]{1,500}", asked, re.ASCII) else "authorization, content-type"
        headers = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": allowed}
        self._send(200, b"", "text/plain", headers)

    def _get(self) -> None:
        if self.path_only == "/":
            self._send(200, self.server.page, "text/html; charset=utf-8", page_headers(self.server.page))
        elif self.path_only == "/health":
            self._send(200, {"status": "ok"})
        elif self.path_only == "/v1/models" or self.path_only.startswith("/v1/models/"):
            self._check_key()
            self._models()
        elif self.path_only in self.POSTS:
            raise RequestError(405, f"{self.path_only} takes POST", "method_not_allowed")
        elif self.path_only == "/v1/library" or self.path_only.startswith("/v1/library/"):
            self._check_key()
            self._get_library()
        else:
            raise self._no_endpoint()

    def _no_endpoint(self) -> RequestError:
        return RequestError(404, f"{self.path_only[:200]}: there is no such endpoint", "not_found")

    def _models(self) -> None:
        server, options = self.server, self.server.options
        sampling = dataclasses.asdict(server.sampling)
        model = {"id": options.name, "object": "model", "created": server.created, "owned_by": "llama3v_mlx"}
        model["context_length"] = server.limits.context
        model["max_image_tiles"] = 1 + server.processor.image_config.max_slice_nums
        model["max_images"] = options.max_images
        model["library"] = server.library and server.library.name
        model["defaults"] = {**sampling, "max_tokens": options.max_tokens}
        if self.path_only == "/v1/models":
            self._send(200, {"object": "list", "data": [model]})
        elif urllib.parse.unquote(self.path_only.removeprefix("/v1/models/")) == options.name:
            self._send(200, model)
        else:
            raise RequestError(404, f"there is no such model; this server has {options.name}", "model_not_found")

    def _post(self) -> None:
        if self.path_only not in self.POSTS:
            raise self._no_endpoint()
        self._check_key()
        length = self._check_length()
        self.server.begin_request()
        try:
            if not self.server._bodies.acquire(timeout=RECEIVE_SECONDS):
                raise RequestError(503, "too many requests are being received", "busy")
            try:
                body = self._read_body(length)
            finally:
                self.server._bodies.release()
            kind, method = self.POSTS[self.path_only]
            method(self, parse(kind, body))
        finally:
            self.server.end_request()

    def _check_length(self) -> int:
        if self.headers.get_content_type() != "application/json":
            raise RequestError(415, "Content-Type must be application/json", "unsupported_media_type")
        if self._is_chunked():
            raise RequestError(411, "Transfer-Encoding is not supported; give Content-Length", "length_required")
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch(r"\d{1,15}", lengths[0], re.ASCII):
            raise RequestError(411, "Content-Length is required", "length_required")
        if int(lengths[0]) > self.server.options.max_body:
            most = self.server.options.max_body
            raise RequestError(413, f"the body of {int(lengths[0]):,} bytes is over {most:,}", "body_too_large")
        return int(lengths[0])

    def _read_body(self, length: int):
        try:
            data = self.rfile.read(length)
        except TimeoutError:
            raise RequestError(408, f"the body did not come within {RECEIVE_SECONDS:.0f} s", "timeout") from None
        if len(data) < length:
            raise ConnectionResetError("the client has gone")
        self.close_connection = (
            self.headers.get("Connection", "").lower() == "close" or self.request_version < "HTTP/1.1"
        )
        return read_json(data)

    # Endpoints.

    def _chat(self, request: ChatRequest) -> None:
        request.check(self.server.limits)
        prompt = chat_prompt(request, self.server.processor, self.server.limits)
        self._generate(request, prompt, Chat(request), self.server.formats.matcher(request.response_format))

    def _complete(self, request: CompletionRequest) -> None:
        request.check(self.server.limits)
        prompt = completion_prompt(request, self.server.processor, self.server.limits)
        self._generate(request, prompt, Completion(request))

    def _embed(self, request: EmbeddingRequest) -> None:
        """Answer with embeddings of texts and of images given as data: URIs."""
        embedder = self.server.embedder
        if embedder is None:
            raise RequestError(404, "this server has no embedding model", "not_found")
        results, count = embedder.embed(request.input, self.server.limits)
        if concurrent.futures.wait(results, self.server.options.timeout).not_done:
            raise self._too_late()
        data = []
        for i, result in enumerate(results):
            row = result.result()
            packed = request.encoding_format == "base64"
            value = base64.b64encode(row.astype("<f4")).decode() if packed else row.tolist()
            data.append({"object": "embedding", "index": i, "embedding": value})
        usage = {"prompt_tokens": count, "total_tokens": count}
        self._send(200, {"object": "list", "data": data, "model": embedder.name, "usage": usage})

    def _tiles(self, request: TilesRequest) -> None:
        """Answer with the tiling of an image, for the page."""
        processor = self.server.processor
        image = plan_image(read_image(request.image, "image"), processor, request.max_image_tiles)
        (width, height), tiling = image.source.size, image.tiling
        seen = {"width": width, "height": height, "overview": tiling.overview, "grid": tiling.grid}
        self._send(200, seen | {"slice": tiling.cell, "tokens": num_tokens(image, processor)})

    def _library(self) -> ServedLibrary:
        if self.server.library is None:
            raise RequestError(404, "this server has no library; start it with --library FOLDER", "no_library")
        return self.server.library

    def _get_library(self) -> None:
        """Answer with the state of the library, or with one of its pictures."""
        library = self._library()
        # Other sites can show images without asking first, and would learn whether a picture is there.
        if self._origin is None and self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise RequestError(403, "pictures are not for other sites; see --allow-origin", "origin_not_allowed")
        kind, slash, id = self.path_only.removeprefix("/v1/library").removeprefix("/").partition("/")
        if kind in SIDE and slash:
            headers = {"Cache-Control": "private, max-age=3600", "Cross-Origin-Resource-Policy": "same-origin"}
            self._send(200, library.jpeg(kind, id), "image/jpeg", headers)
        elif kind or slash:
            raise self._no_endpoint()
        else:
            self._send(200, library.status())

    def _search_library(self, request: LibrarySearchRequest) -> None:
        found = self._library().search(request, self.server.limits, self.server.options.timeout)
        self._send(200, {"object": "list", "data": found})

    def _update_library(self, request: LibraryUpdateRequest) -> None:
        """Start an update of the index, unless one is running."""
        self._library().indexer.start()
        self._send(200, self._library().status())

    POSTS = {
        "/v1/chat/completions": (ChatRequest, _chat),
        "/chat/completions": (ChatRequest, _chat),
        "/v1/completions": (CompletionRequest, _complete),
        "/v1/embeddings": (EmbeddingRequest, _embed),
        "/v1/tiles": (TilesRequest, _tiles),
        "/v1/library/search": (LibrarySearchRequest, _search_library),
        "/v1/library/update": (LibraryUpdateRequest, _update_library),
    }

    def _generate(self, request: ChatRequest | CompletionRequest, prompt, form: "Form", matcher=None) -> None:
        options, limits = self.server.options, self.server.limits
        settings = Settings(
            max_tokens=min(request.most_tokens or options.max_tokens, limits.context - len(prompt.ids)),
            sampling=sampling_of(request, self.server.sampling),
            seed=request.seed,
            choices=request.n,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=request.logit_bias,
            stops=request.stop,
            num_logprobs=request.num_logprobs,
            matcher=matcher,
        )
        job = Job(prompt, settings)
        form.name, form.created = options.name, int(time.time())
        self.server.engine.submit(job)
        try:
            (self._stream if request.stream else self._collect)(job, form, request)
        finally:
            self.server.engine.cancel(job)

    def _events(self, job: Job) -> Iterator[Token | None]:
        """Yield a job's tokens, and None at intervals while there is none.

        Raises:
            RequestError: if the job failed, or took too long.
            ConnectionError: if the client has gone.
        """
        end = time.monotonic() + self.server.options.timeout
        left = job.settings.choices
        while left:
            try:
                event = job.events.get(timeout=HEARTBEAT if self._streaming else 0.1)
            except queue.Empty:
                event = None
            if self._has_gone():
                raise ConnectionResetError("the client has gone")
            if time.monotonic() > end:
                raise self._too_late()
            if isinstance(event, RequestError):
                raise event
            if isinstance(event, NeedImages):
                for i in event.indices:
                    job.tiles[i] = job.prompt.images[i].tile(self.server.processor)
                self.server.engine.submit(job)
                continue
            left -= event is not None and event.finish_reason is not None
            yield event

    def _too_late(self) -> RequestError:
        return RequestError(504, f"no answer within {self.server.options.timeout:.0f} s", "timeout")

    def _has_gone(self) -> bool:
        try:
            poll = select.poll()
            poll.register(self.connection, select.POLLIN)
            return bool(poll.poll(0)) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def _collect(self, job: Job, form: "Form", request) -> None:
        answers: list[list[Token]] = [[] for _ in range(job.settings.choices)]
        for token in self._events(job):
            if token is not None:
                answers[token.choice].append(token)
        usage = usage_of(job, sum(map(len, answers)))
        choices = [form.choice(i, tokens) for i, tokens in enumerate(answers)]
        self._send(200, {**form.head(form.kind), "choices": choices, "usage": usage})

    def _stream(self, job: Job, form: "Form", request) -> None:
        count, start = 0, time.monotonic()
        begun: set[int] = set()
        for token in self._events(job):
            if token is None:
                # An error before this still gets a status of its own.
                if time.monotonic() - start >= HEARTBEAT:
                    self._begin_stream()
                    self.wfile.write(f": {job.progress}\n\n".encode())
                continue
            self._begin_stream()
            count += 1
            for choice in form.chunks(token, token.choice not in begun):
                head = form.head(form.chunk_kind) | ({"usage": None} if request.include_usage else {})
                self._write_event({**head, "choices": [choice]})
            begun.add(token.choice)
        if request.include_usage:
            self._write_event({**form.head(form.chunk_kind), "choices": [], "usage": usage_of(job, count)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin_stream(self) -> None:
        if self._streaming:
            return
        self._streaming = self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self._send_common_headers()
        self.end_headers()

    def _write_event(self, event: dict) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def _send(
        self, status: int, value: dict | bytes, kind: str = "application/json", headers: dict | None = None
    ) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, content in (headers or {}).items():
            self.send_header(name, content)
        if self.close_connection:
            self.send_header("Connection", "close")
        self._send_common_headers()
        self.end_headers()
        self.wfile.write(data)

    def _send_common_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        if getattr(self, "_origin", None) is not None:
            self.send_header("Access-Control-Allow-Origin", self._origin)
            self.send_header("Vary", "Origin")

    def _send_failure(self, error: RequestError) -> None:
        kinds = {401: "authentication_error", 403: "permission_error"}
        kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
        body = {"error": {"message": str(error), "type": kind, "code": error.code, "param": error.param}}
        try:
            if getattr(self, "_streaming", False):
                self._write_event(body)
                return
            self._send(error.status, body)
            if self.close_connection:
                self._linger()
        except OSError:  # the client has gone
            self.close_connection = True

    def _linger(self) -> None:
        """Read what a client is still sending; closing at once would reset the connection."""
        self.connection.shutdown(socket.SHUT_WR)
        self._reader.deadline = time.monotonic() + 2
        while self.rfile.read1(1 << 16):
            pass


class Form:
    """Answer in OpenAI's format."""

    kind = chunk_kind = prefix = ""
    name, created = "", 0

    def __init__(self, request):
        self.request = request
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}


class Chat(Form):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, tokens: list[Token]) -> dict:
        message = {"role": "assistant", "content": "".join(token.text for token in tokens), "refusal": None}
        finish = tokens[-1].finish_reason
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def chunks(self, token: Token, first: bool) -> Iterator[dict]:
        """Chunks of a token: the role comes with the first one, the finish reason in a chunk of its own."""
        start = {"role": "assistant"} if first else {}
        if first or token.text or token.logprob:
            delta = start | {"content": token.text}
            logprobs = self._logprobs([token])
            yield {"index": token.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        if token.finish_reason:
            yield {"index": token.choice, "delta": {}, "logprobs": None, "finish_reason": token.finish_reason}

    def _logprobs(self, tokens: list[Token]) -> dict | None:
        if not self.request.logprobs:
            return None
        content = [
            {**_as_json(token.logprob), "top_logprobs": list(map(_as_json, token.top_logprobs))} for token in tokens
        ]
        return {"content": content, "refusal": None}


class Completion(Form):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, request):
        super().__init__(request)
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def choice(self, index: int, tokens: list[Token]) -> dict:
        text = "".join(token.text for token in tokens)
        finish = tokens[-1].finish_reason
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def chunks(self, token: Token, first: bool) -> Iterator[dict]:
        if token.text or token.finish_reason or token.logprob:
            yield self.choice(token.choice, [token])

    def _logprobs(self, tokens: list[Token]) -> dict | None:
        if self.request.logprobs is None:
            return None
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            offset = self._offsets.get(token.choice, 0)
            self._offsets[token.choice] = offset + len(token.text)
            found["tokens"].append(token.logprob.text)
            found["token_logprobs"].append(token.logprob.logprob)
            found["top_logprobs"].append({each.text: each.logprob for each in token.top_logprobs})
            found["text_offset"].append(offset)
        return found


def _as_json(logprob: Logprob) -> dict:
    whole = "\ufffd" not in logprob.text
    of_bytes = list(logprob.text.encode()) if whole else None
    return {"id": logprob.token, "token": logprob.text, "logprob": logprob.logprob, "bytes": of_bytes}


def usage_of(job: Job, completion_tokens: int) -> dict:
    prompt_tokens = len(job.prompt.ids)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    usage["total_tokens"] = prompt_tokens + completion_tokens
    return usage | {"prompt_tokens_details": {"cached_tokens": job.cached}}


def sampling_of(request: ChatRequest | CompletionRequest, default: Sampling) -> Sampling:
    """Sampling of a request, over the server's defaults."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    chosen = {name: value for name in names if (value := getattr(request, name)) is not None}
    if request.top_p == 0:  # only the most likely token
        chosen |= {"temperature": 0.0, "top_p": 1.0}
    return dataclasses.replace(default, **chosen)


def page_headers(page: bytes) -> dict[str, str]:
    """Security headers of the page: only its own scripts run, and it connects to this server only."""
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
    policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    policy += "require-trusted-types-for 'script'"
    return {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

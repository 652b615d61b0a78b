"""The HTTP server: it owns the engine and what the endpoints need, and bounds connections and requests."""

import contextlib
import ipaddress
import logging
import socket
import socketserver
import threading
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

from ..models.llama3v import Model
from ..prompt import Processor
from ..sampling import Sampling
from .checks import RequestError
from .embeddings import Embedder
from .endpoints import PAGE, Endpoints
from .engine import Engine
from .json_schema import ResponseFormats
from .library import ServedLibrary
from .prefix_cache import PrefixCache
from .requests import Limits

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
MAX_BODIES = 8  # of the largest size, at once
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # hosts that stand for all addresses, and one of these


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


class Room:
    """A number of bytes that threads share."""

    def __init__(self, nbytes: int):
        self._free, self._changed = nbytes, threading.Condition()

    def acquire(self, nbytes: int, seconds: float) -> bool:
        """Take bytes, waiting up to `seconds` for them; return False if they did not become free."""
        with self._changed:
            if not self._changed.wait_for(lambda: nbytes <= self._free, seconds):
                return False
            self._free -= nbytes
        return True

    def release(self, nbytes: int) -> None:
        with self._changed:
            self._free += nbytes
            self._changed.notify_all()


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
        self.bodies = Room(MAX_BODIES * options.max_body)
        self._idle: dict[socket.socket, None] = {}  # connections without a request, the longest first
        self._running = 0  # requests that are being answered
        self._lock = threading.Lock()
        self.stopping = False
        self.page = PAGE.read_bytes()
        self.library: ServedLibrary | None = None
        super().__init__((options.host, options.port), Endpoints, bind_and_activate=False)
        try:
            self.server_bind()
        except BaseException:
            self.server_close()
            raise

    def server_bind(self) -> None:
        with self._explained():
            socketserver.TCPServer.server_bind(self)  # not HTTPServer's, which looks up the host's name
        self.server_name, self.server_port = self.server_address[:2]

    def server_activate(self) -> None:
        with self._explained():
            super().server_activate()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            address = _shown(self.options.host, self.options.port)
            raise OSError(f"cannot listen at {address} ({e.strerror}); choose another --port or --host") from e

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
        if not self._connections.acquire(blocking=False) and not self._replace_idle():
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._connections.release()
            raise

    def _replace_idle(self) -> bool:
        """Close the connection that has been without a request for longest, and take its place."""
        with self._lock:
            idle = next(iter(self._idle), None)
            if idle is None:
                return False
            del self._idle[idle]
            with contextlib.suppress(OSError):
                idle.shutdown(socket.SHUT_RDWR)
        return self._connections.acquire(timeout=1.0)

    def note_idle(self, connection: socket.socket, is_idle: bool) -> None:
        """Note that a connection is, or is no longer, one that may be closed for another one."""
        with self._lock:
            self._idle.pop(connection, None)
            if is_idle:
                self._idle[connection] = None

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


def announcement(options: Options, address: str, port: int) -> str:
    """Return what is said when the server listens at `address`, which `options.host` was resolved to."""
    said = f"serving {options.name} at http://{_shown(options.host, port)}"
    if options.host in EVERYWHERE:
        said += ", and at the other addresses of this machine"
    if options.api_key is None and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        said += "\nnote: whoever reaches this address may use it; --api-key-env NAME requires a key"
    return said


def _shown(host: str, port: int) -> str:
    host = EVERYWHERE.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

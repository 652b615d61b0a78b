"""HTTP as the server speaks it: access checks, bodies bounded in size and time, answers and errors as JSON."""

import contextlib
import hmac
import io
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from email.errors import FirstHeaderLineIsContinuationDefect, MissingHeaderBodySeparatorDefect
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING

from ..files import printable
from .checks import RequestError, internal_error, read_json

if TYPE_CHECKING:
    from .app import App

log = logging.getLogger(__name__)

RECEIVE_SECONDS = 30.0  # for a request to arrive, in all
SMALL_BODY = 1 << 20  # bytes; smaller ones wait for no others
MALFORMED = (MissingHeaderBodySeparatorDefect, FirstHeaderLineIsContinuationDefect)


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


class Connection(BaseHTTPRequestHandler):
    """Connection of a client: who may ask, what is read, and how answers and errors are sent."""

    server: "App"
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "llama3v_mlx", ""
    disable_nagle_algorithm = True
    timeout = RECEIVE_SECONDS
    _origin: str | None = None  # of an admitted page
    _streaming = False

    def setup(self) -> None:
        super().setup()
        self._reader = _TimedReader(self.connection)
        self.rfile = io.BufferedReader(self._reader)

    def handle_one_request(self) -> None:
        self._reader.deadline = time.monotonic() + RECEIVE_SECONDS
        self._streaming = False
        self.server.note_idle(self.connection, True)
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        finally:
            self.server.note_idle(self.connection, False)

    # http.server calls these by their names.

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        self.server.note_idle(self.connection, False)
        if self.request_version < "HTTP/1.1":
            self.close_connection = True
        folded = any("\n" in value for value in self.headers.values())
        if folded or any(isinstance(defect, MALFORMED) for defect in self.headers.defects):
            # In lines that continue others, or follow one that is no header, a proxy may see a Content-Length.
            self.send_error(400, "malformed header")
            return False
        return True

    def handle_expect_100(self) -> bool:
        return True  # `_read_body` says it, to a request that was not refused

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

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
        self._is_kept = not self.close_connection
        if self.command == "POST" or self.headers.get_all("Content-Length", ["0"]) != ["0"] or self._is_chunked():
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
        self.path_only, self._origin = self.path.partition("?")[0], None
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self.server.host_is_allowed(hosts[0], self.connection.getsockname()[0]):
            raise RequestError(403, "Host does not name this server; see --allowed-host", "host_not_allowed")
        origin = self.headers.get("Origin")
        if origin is not None and not self.server.origin_is_allowed(origin, hosts[0]):
            raise RequestError(403, "this Origin is not admitted; see --allow-origin", "origin_not_allowed")
        self._origin = origin

    def _check_key(self) -> None:
        key = self.server.options.api_key
        if key is None:
            return
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")  # as it was decoded
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise RequestError(401, "wrong or missing API key", "invalid_api_key")

    def _get(self) -> None:
        """Answer a GET of `path_only`."""
        raise NotImplementedError

    def _post(self) -> None:
        """Answer a POST to `path_only`."""
        raise NotImplementedError

    def _preflight(self) -> None:
        """Answer a CORS preflight of an origin that `_check_client` has admitted."""
        asked = self.headers.get("Access-Control-Request-Headers", "")
        allowed = asked if re.fullmatch(r"[\w\-, ]{1,500}", asked, re.ASCII) else "authorization, content-type"
        headers = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": allowed}
        self._send(200, b"", "text/plain", headers)

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

    @contextlib.contextmanager
    def _room_for(self, length: int) -> Iterator[None]:
        """Hold room for a body and what is made of it, until the request has been answered."""
        held = length if length > SMALL_BODY else 0
        if not self.server.bodies.acquire(held, self.server.options.timeout):
            raise RequestError(503, "too many large requests are being answered", "busy")
        self._reader.deadline = time.monotonic() + RECEIVE_SECONDS
        try:
            yield
        finally:
            self.server.bodies.release(held)

    def _read_body(self, length: int):
        """Read and parse a JSON body."""
        if self.headers.get("Expect", "").lower() == "100-continue" and self.request_version >= "HTTP/1.1":
            self.send_response_only(100)
            self.end_headers()
        try:
            data = self.rfile.read(length)
        except TimeoutError:
            raise RequestError(408, f"the body did not come within {RECEIVE_SECONDS:.0f} s", "timeout") from None
        if len(data) < length:
            raise ConnectionResetError("the client has gone")
        self.close_connection = not self._is_kept
        return read_json(data)

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
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_common_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        if self._origin is not None:
            self.send_header("Access-Control-Allow-Origin", self._origin)
            self.send_header("Vary", "Origin")

    def _send_failure(self, error: RequestError) -> None:
        kinds = {401: "authentication_error", 403: "permission_error"}
        kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
        body = {"error": {"message": str(error), "type": kind, "code": error.code, "param": error.param}}
        try:
            if self._streaming:
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

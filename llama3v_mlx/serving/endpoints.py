"""What the server answers at each path."""

import base64
import dataclasses
import hashlib
import queue
import re
import select
import socket
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from ..sampling import Sampling
from .batch import Settings
from .checks import RequestError, parse
from .connection import Connection
from .forms import Chat, Completion, Form, usage_of
from .images import read_image
from .jobs import Job, NeedImages, Token
from .library import SIDE, ServedLibrary
from .prompts import chat_prompt, completion_prompt, num_tokens, plan_image
from .requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    LibrarySearchRequest,
    LibraryUpdateRequest,
    TilesRequest,
)

PAGE = Path(__file__).parent / "page.html"
HEARTBEAT = 0.5  # seconds without a token after which a stream says what it is at


class Endpoints(Connection):
    """Answer the requests of a connection."""

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

    def _post(self) -> None:
        if self.path_only not in self.POSTS:
            raise self._no_endpoint()
        self._check_key()
        length = self._check_length()
        self.server.begin_request()
        try:
            kind, method = self.POSTS[self.path_only]
            with self._room_for(length):
                method(self, parse(kind, self._read_body(length)))
        finally:
            self.server.end_request()

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
        rows, count = embedder.embed(request.input, self.server.limits, self.server.options.timeout)
        data = []
        for i, row in enumerate(rows):
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

    def _generate(self, request: ChatRequest | CompletionRequest, prompt, form: Form, matcher=None) -> None:
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
            (self._stream if request.stream else self._collect)(job, form)
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

    def _collect(self, job: Job, form: Form) -> None:
        answers: list[list[Token]] = [[] for _ in range(job.settings.choices)]
        for token in self._events(job):
            if token is not None:
                answers[token.choice].append(token)
        usage = usage_of(job, sum(map(len, answers)))
        choices = [form.choice(i, tokens) for i, tokens in enumerate(answers)]
        self._send(200, {**form.head(form.kind), "choices": choices, "usage": usage})

    def _stream(self, job: Job, form: Form) -> None:
        include_usage = form.request.include_usage
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
                head = form.head(form.chunk_kind) | ({"usage": None} if include_usage else {})
                self._write_event({**head, "choices": [choice]})
            begun.add(token.choice)
        if include_usage:
            self._write_event({**form.head(form.chunk_kind), "choices": [], "usage": usage_of(job, count)})
        self.wfile.write(b"data: [DONE]\n\n")

    POSTS = {
        "/v1/chat/completions": (ChatRequest, _chat),
        "/chat/completions": (ChatRequest, _chat),
        "/v1/completions": (CompletionRequest, _complete),
        "/v1/embeddings": (EmbeddingRequest, _embed),
        "/v1/tiles": (TilesRequest, _tiles),
        "/v1/library/search": (LibrarySearchRequest, _search_library),
        "/v1/library/update": (LibraryUpdateRequest, _update_library),
    }


def sampling_of(request: ChatRequest | CompletionRequest, default: Sampling) -> Sampling:
    """Sampling of a request, over the server's defaults."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling = default.override(**{name: getattr(request, name) for name in names})
    if request.top_p == 0:  # only the most likely token
        return sampling.override(temperature=0.0, top_p=1.0)
    return sampling


def page_headers(page: bytes) -> dict[str, str]:
    """Security headers of the page: only its own scripts run, and it connects to this server only."""
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
    policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    policy += "require-trusted-types-for 'script'"
    return {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

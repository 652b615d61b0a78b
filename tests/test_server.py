"""The server, as its clients see it: right answers, and one clear error for whatever else is sent."""

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import os
import signal
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, serving, tolerance
from PIL import Image

from llama3v_mlx import generation, stream_generate
from llama3v_mlx import server as servers
from llama3v_mlx.conversation import Conversation
from llama3v_mlx.demo import IMAGES, SIGLIP
from llama3v_mlx.evaluate import served
from llama3v_mlx.features.encoder import load_encoder
from llama3v_mlx.server import main, stop_signals
from llama3v_mlx.serving import app as apps
from llama3v_mlx.serving import connection, endpoints, prompts
from llama3v_mlx.serving import engine as engines
from llama3v_mlx.serving.app import App, Options, announcement
from llama3v_mlx.serving.prefix_cache import PrefixCache

STARS, CROSS = IMAGES / "two-red-stars.jpg", IMAGES / "one-purple-cross.jpg"
STARS_ANSWER = "Two red stars on a yellow background."
CHAT, COMPLETIONS, EMBEDDINGS, TILES = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/tiles"
JSON = "application/json"


def request(
    port: int,
    path: str,
    body: object = None,
    key: str = "secret",
    method: str | None = None,
    headers: dict | None = None,
) -> tuple[int, str]:
    """Ask as a client does; `body` is sent as JSON unless it is bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    sent = {"Authorization": f"Bearer {key}", "Content-Type": JSON, **(headers or {})}
    connection.request(method, path, data, {name: value for name, value in sent.items() if value is not None})
    response = connection.getresponse()
    said = response.read().decode()
    connection.close()
    return response.status, said


def raw(port: int, data: bytes) -> bytes:
    """Send bytes as they are, and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(data)
        return b"".join(iter(lambda: client.recv(1 << 16), b""))


def uri(data: bytes | Path) -> str:
    data = data.read_bytes() if isinstance(data, Path) else data
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image(data: bytes | Path, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": uri(data), **more}}


def chat(*parts: dict | str, **options) -> dict:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, **options}


def ask(port: int, *parts: dict | str, **options) -> tuple[int, str]:
    return request(port, CHAT, chat(*parts, **options))


def answer(said: tuple[int, str]) -> dict:
    assert said[0] == 200, said
    return json.loads(said[1])


def text(said: tuple[int, str]) -> str:
    return answer(said)["choices"][0]["message"]["content"]


def events_of(said: str) -> list[dict]:
    return [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]


def streamed(said: str) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events_of(said) if event["choices"])


def png(width: int, height: int) -> bytes:
    """A PNG of any size; a large one has a header alone."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = bytes((1 + (width + 7) // 8) * height) if width * height < 10**6 else b""
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class TestAnswers:
    def test_are_generates(self, port: int, demo) -> None:
        for path, question in ((STARS, "What is this image?"), (CROSS, "What color is the background?")):
            greedy = {"temperature": 0, "repetition_penalty": 1}
            expected = "".join(r.text for r in stream_generate(*demo, question, path, **greedy))
            assert text(ask(port, image(path), question)) == expected
        body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
        assert "Show me an image" in text(request(port, CHAT, body))

    def test_in_a_stream(self, port: int) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        status, said = ask(port, image(STARS), "What is this image?", **options)
        assert status == 200 and streamed(said) == STARS_ANSWER and said.endswith("data: [DONE]\n\n")
        *events, last = events_of(said)
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 9
        assert all(event["usage"] is None for event in events)
        assert events[0]["choices"][0]["delta"]["role"] == "assistant"
        assert [e["choices"][0]["finish_reason"] for e in events] == [None] * (len(events) - 1) + ["stop"]

    def test_the_same_tokens_in_every_way(self, port: int, demo, run_main) -> None:
        """A conversation about two images by Python, chat's own, both commands, and the server, also streamed."""
        turns = (
            ("What is this image?", [STARS]),
            ("What color is the background?", []),
            ("Which shape is it?", [CROSS]),
        )
        greedy = {"temperature": 0, "repetition_penalty": 1}
        talk, messages, sent, said = Conversation(*demo, options=greedy), [], [], []
        for question, images in turns:
            messages.append({"role": "user", "content": [*images, question]})
            sent.append({"role": "user", "content": [*map(image, images), {"type": "text", "text": question}]})
            expected = list(stream_generate(*demo, messages, **greedy))
            tokens, words = [r.token for r in expected], "".join(r.text for r in expected)
            assert [r.token for r in talk.ask(question, images)] == tokens
            body = {"messages": sent, "temperature": 0, "repetition_penalty": 1, "logprobs": True}
            choice = answer(request(port, CHAT, body))["choices"][0]
            assert [part["id"] for part in choice["logprobs"]["content"]] == tokens
            assert choice["message"]["content"] == words
            assert streamed(request(port, CHAT, {**body, "stream": True})[1]) == words
            messages.append({"role": "assistant", "content": words})
            sent.append({"role": "assistant", "content": words})
            said.append(words)
        options = ["--temp", "0", "--repetition-penalty", "1"]
        lines = [f"/image {CROSS}\n{question}" if images == [CROSS] else question for question, images in turns]
        done = run_main("llama3v_mlx.chat", "--image", STARS, *options, input="\n".join(lines))
        assert [line for line in done.stdout.splitlines() if line in said] == said
        done = run_main("llama3v_mlx.generate", "--image", STARS, "-p", turns[0][0], "--no-verbose", *options)
        assert done.stdout == f"{said[0]}\n"

    def test_together_as_one_by_one(self, port: int) -> None:
        """Requests with images share batches; each gets what it would get alone."""
        paths = sorted(IMAGES.glob("[!.]*"))
        questions = [(path, question) for path in paths for question in ("What is this image?", "What color is it?")]

        def one(asked: tuple[Path, str]) -> str:
            return text(ask(port, image(asked[0]), asked[1], max_tokens=30))

        with ThreadPoolExecutor(len(questions)) as pool:
            together = list(pool.map(one, questions))
        assert together == [one(asked) for asked in questions]
        assert len(set(together)) > len(paths)

    def test_cached_tokens(self, demo) -> None:
        with serving(*demo) as app:
            port = app.server_port
            first = answer(ask(port, image(STARS), "What is this image?"))
            again = answer(ask(port, image(STARS), "What color is the background?"))
            fewer = answer(ask(port, image(STARS), "What is this image?", max_image_tiles=1))
            messages = chat(image(STARS), "What is this image?")["messages"]
            messages += [{"role": "assistant", "content": STARS_ANSWER}, {"role": "user", "content": "Which color?"}]
            more = answer(request(port, CHAT, {"messages": messages, "temperature": 0}))
        cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (first, again, fewer, more)]
        assert cached[0] == 0 and cached[1] >= 73 and cached[2] < 12 and cached[3] >= 89

    def test_detail_and_tiles(self, port: int) -> None:
        """OpenAI's `detail: low` and our `max_image_tiles` look at the overview alone."""
        tokens = [
            answer(ask(port, image(STARS, detail=detail), "What is it?", max_tokens=1, **more))["usage"][
                "prompt_tokens"
            ]
            for detail, more in (("auto", {}), ("high", {}), ("low", {}), ("auto", {"max_image_tiles": 1}))
        ]
        assert tokens[0] == tokens[1] > tokens[2] == tokens[3]

    def test_models_health_and_completions(self, port: int) -> None:
        model = answer(request(port, "/v1/models"))["data"][0]
        assert model["id"] == "llama3v-demo" and model["context_length"] == 2048 and model["max_image_tiles"] == 5
        assert model["defaults"]["temperature"] == 0 and model["defaults"]["max_tokens"] == 1024
        assert answer(request(port, "/v1/models/llama3v-demo")) == model
        assert request(port, "/v1/models/other")[0] == 404
        assert request(port, "/health", key="")[0] == 200
        said = answer(request(port, COMPLETIONS, {"prompt": "Hello", "max_tokens": 3, "temperature": 0}))
        ids = answer(
            request(port, COMPLETIONS, {"prompt": [490, 457], "max_tokens": 3, "temperature": 0, "stop": None})
        )
        assert said["usage"] == {**ids["usage"], "prompt_tokens_details": {"cached_tokens": 0}}
        assert said["choices"][0]["text"] == ids["choices"][0]["text"] and said["usage"]["completion_tokens"] == 3
        status, streamed = request(
            port, COMPLETIONS, {"prompt": "Hello", "max_tokens": 3, "logprobs": 1, "stream": True}
        )
        assert status == 200
        assert "".join(event["choices"][0]["text"] for event in events_of(streamed)) == said["choices"][0]["text"]

    def test_tiles(self, port: int) -> None:
        seen = answer(request(port, TILES, {"image": uri(STARS)}))
        assert (seen["width"], seen["height"], seen["grid"], seen["tokens"]) == (505, 433, [2, 2], 73)
        assert answer(request(port, TILES, {"image": uri(STARS), "max_image_tiles": 1}))["grid"] is None

    def test_a_rotated_photo_is_planned_upright(self, port: int) -> None:
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (400, 100)).save(file, "JPEG", exif=exif)
        seen = answer(request(port, TILES, {"image": uri(file.getvalue())}))
        assert (seen["width"], seen["height"]) == (100, 400)
        assert ask(port, image(file.getvalue()), "What is it?", max_tokens=1)[0] == 200


class TestFields:
    def test_stop(self, port: int) -> None:
        whole = text(ask(port, image(STARS), "What is this image?"))
        for stop in (" on a", ["nowhere", "stars on", "on a yellow"]):
            choice = answer(ask(port, image(STARS), "What is this image?", stop=stop))["choices"][0]
            cut = min(whole.find(s) for s in ([stop] if isinstance(stop, str) else stop) if s in whole)
            assert choice["message"]["content"] == whole[:cut] and choice["finish_reason"] == "stop"
            _, said = ask(port, image(STARS), "What is this image?", stop=stop, stream=True)
            assert streamed(said) == whole[:cut]
        assert text(ask(port, image(STARS), "What is this image?", stop="background.!")) == whole

    def test_length(self, port: int) -> None:
        for name in ("max_tokens", "max_completion_tokens"):
            said = answer(ask(port, image(STARS), "What is this image?", **{name: 3}))
            assert said["choices"][0]["finish_reason"] == "length" and said["usage"]["completion_tokens"] == 3
        assert answer(ask(port, "Hello", max_tokens=10**9))["choices"][0]["finish_reason"] == "stop"

    def test_seed(self, port: int) -> None:
        """The same seed, the same answer, whatever else is answered meanwhile; and other seeds, other answers."""
        hot = {"prompt": [490, 17, 300, 45, 6], "temperature": 2, "top_p": 1, "top_k": 0, "max_tokens": 12, "n": 2}
        seeds = (0, -1, 2**64 - 1, -(2**63), 7)

        def draw(seed: int | None) -> list[str]:
            said = answer(request(port, COMPLETIONS, {**hot, "seed": seed}))
            return [choice["text"] for choice in said["choices"]]

        alone = [draw(seed) for seed in seeds]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(draw, [*seeds, None, None, *seeds]))
        assert together[:5] == alone == together[7:]
        texts = [text for texts in alone for text in texts]
        assert len(set(texts)) > 5 and any(first != second for first, second in alone)

    def test_sampling(self, port: int) -> None:
        """Cutoffs that keep only the most likely token are greedy at any temperature."""
        for cutoff in ({"top_k": 1}, {"top_p": 0}, {"top_p": 1e-9}, {"min_p": 1.0}):
            said = text(ask(port, image(STARS), "What is this image?", **{"temperature": 2, **cutoff}))
            assert said == STARS_ANSWER, cutoff

    def test_penalties_and_bias(self, port: int, demo) -> None:
        prompt = {"prompt": "Hello", "max_tokens": 6, "temperature": 0}

        def complete(**options) -> str:
            return answer(request(port, COMPLETIONS, prompt | options))["choices"][0]["text"]

        plain = complete(max_tokens=60)
        for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 5}):
            assert complete(max_tokens=60, **penalty) != plain, penalty
        assert complete(logit_bias={"457": -100}).count("Hello") == 0
        assert complete(logit_bias={"0": 100}) == "!" * 6

    def test_logprobs(self, port: int) -> None:
        said = answer(ask(port, image(STARS), "What is this image?", logprobs=True, top_logprobs=3))
        content = said["choices"][0]["logprobs"]["content"]
        assert len(content) == said["usage"]["completion_tokens"]
        for part in content:
            best = part["top_logprobs"]
            assert len(best) == 3 and best[0]["token"] == part["token"] and best[0]["logprob"] == part["logprob"] <= 0
            assert best[0]["logprob"] >= best[1]["logprob"] >= best[2]["logprob"]
            assert bytes(part["bytes"]).decode() == part["token"]
        bare = answer(ask(port, "Hello", logprobs=True, max_tokens=1))["choices"][0]["logprobs"]["content"]
        assert bare[0]["top_logprobs"] == []
        biased = ask(port, "Hello", logprobs=True, top_logprobs=20, max_tokens=2, logit_bias={"0": 100})
        assert "Infinity" not in biased[1] and text(biased) == "!!"

    def test_what_openai_sends_and_means_nothing(self, port: int) -> None:
        more = {
            "user": "me",
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "tools": [],
            "model": "gpt",
        }
        more |= {"tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"}, "stop": None}
        assert text(ask(port, image(STARS), "What is this image?", **more)) == STARS_ANSWER
        messages = [{"role": "developer", "content": "Answer."}, {"role": "user", "content": "Hello", "name": "me"}]
        messages += [{"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}]
        messages += [{"role": "user", "content": "Hello"}]
        assert request(port, CHAT, {"messages": messages, "max_tokens": 1})[0] == 200

    def test_what_clients_send_by_default(self, port: int) -> None:
        """Defaults of OpenAI's API, hints to caches, and what is left of other models in messages sent again."""
        more = {"reasoning_effort": "medium", "verbosity": "medium", "prompt_cache_options": {"mode": "implicit"}}
        more |= {"logprobs": False, "top_logprobs": 0, "stream_options": None, "functions": [], "logit_bias": {}}
        cached = {"cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "explicit"}}
        question = {"type": "input_text", "text": "What is this image?", **cached}
        messages = [
            {"role": "user", "content": [image(STARS, detail="original") | cached, question], "id": 7},
            {"role": "assistant", "content": STARS_ANSWER, "reasoning_content": "?", "reasoning": "?", "parsed": None},
            {
                "role": "user",
                "content": "What color is the background?",
                "copilot_cache_control": {},
                "cache_control": {},
            },
        ]
        said = request(port, CHAT, {"messages": messages, "temperature": 0, **more})
        assert text(said) == "The background is yellow."

    @pytest.mark.parametrize(
        "path, body, param",
        [
            (CHAT, {}, "messages"),
            (CHAT, {"messages": []}, "messages"),
            (CHAT, {"messages": "Hello"}, "messages"),
            (CHAT, {"messages": [1]}, "messages[0]"),
            (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
            (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
            (CHAT, {"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
            (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
            (CHAT, {"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
            (CHAT, {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0].type"),
            (CHAT, {"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages[0].content[0].type"),
            (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
            (CHAT, chat("x", temperature=-1), "temperature"),
            (CHAT, chat("x", temperature="hot"), "temperature"),
            (CHAT, chat("x", temperature=True), "temperature"),
            (CHAT, chat("x", top_p=1.1), "top_p"),
            (CHAT, chat("x", top_k=-1), "top_k"),
            (CHAT, chat("x", min_p=2), "min_p"),
            (CHAT, chat("x", repetition_penalty=0), "repetition_penalty"),
            (CHAT, chat("x", presence_penalty=3), "presence_penalty"),
            (CHAT, chat("x", frequency_penalty=-3), "frequency_penalty"),
            (CHAT, chat("x", max_tokens="many"), "max_tokens"),
            (CHAT, chat("x", max_tokens=0), "max_tokens"),
            (CHAT, chat("x", max_tokens=-(10**30)), "max_tokens"),
            (CHAT, chat("x", max_completion_tokens=1.5), "max_completion_tokens"),
            (CHAT, chat("x", n=0), "n"),
            (CHAT, chat("x", n=10**6), "n"),
            (CHAT, chat("x", seed=2**64), "seed"),
            (CHAT, chat("x", seed=-(2**63) - 1), "seed"),
            (CHAT, chat("x", seed="7"), "seed"),
            (CHAT, chat("x", stop=5), "stop"),
            (CHAT, chat("x", stop=[5]), "stop[0]"),
            (CHAT, chat("x", stop=[""]), "stop[0]"),
            (CHAT, chat("x", stop=["a"] * 17), "stop"),
            (CHAT, chat("x", logit_bias={"100000000": 5}), "logit_bias"),
            (CHAT, chat("x", logit_bias={"512": 5}), "logit_bias"),
            (CHAT, chat("x", logit_bias={"-1": 5}), "logit_bias"),
            (CHAT, chat("x", logit_bias={"²": 5}), "logit_bias"),
            (CHAT, chat("x", logit_bias={"1": 101}), "logit_bias.1"),
            (CHAT, chat("x", logit_bias=[1]), "logit_bias"),
            (CHAT, chat("x", logprobs=3), "logprobs"),
            (CHAT, chat("x", logprobs=True, top_logprobs=21), "top_logprobs"),
            (CHAT, chat("x", top_logprobs=2), "top_logprobs"),
            (CHAT, chat("x", stream="yes"), "stream"),
            (CHAT, chat("x", stream=True, stream_options=3), "stream_options"),
            (CHAT, chat("x", stream=True, stream_options={"usage": True}), "stream_options.usage"),
            (CHAT, chat("x", stream_options={"include_usage": True}), "stream_options"),
            (CHAT, chat("x", max_image_tiles=0), "max_image_tiles"),
            (CHAT, chat("x", max_image_tiles=11), "max_image_tiles"),
            (CHAT, chat("x", response_format="json"), "response_format"),
            (CHAT, chat("x", response_format={"type": "xml"}), "response_format"),
            (CHAT, chat("x", response_format={"type": "json_schema"}), "response_format"),
            (CHAT, chat("x", tools=[{"type": "function"}]), "tools"),
            (CHAT, chat("x", tool_choice="required"), "tool_choice"),
            (CHAT, chat("x", reasoning_effort="high"), "reasoning_effort"),
            (CHAT, chat("x", functions=[{}]), "functions"),
            (CHAT, chat("x", modalities=["audio"]), "modalities"),
            (CHAT, chat("x", chat_template="{% for i in range(10**9) %}{% endfor %}"), "chat_template"),
            (CHAT, chat("x", chat_template_kwargs={"a": 1}), "chat_template_kwargs"),
            (CHAT, chat("x", prompt_embeds="AAAA"), "prompt_embeds"),
            (CHAT, chat("x", adapter="/etc"), "adapter"),
            (CHAT, chat("x", draft_model="/etc"), "draft_model"),
            (CHAT, chat("x", **{"a" * 300: 1}), "a" * 200),
            (CHAT, chat("\ud800"), "messages[0].content[0].text"),
            (CHAT, chat("x", user=1, model="\udfff"), "model"),
            (CHAT, {"messages": [{"role": "user", "content": "red " * 3000}]}, "messages"),
            (COMPLETIONS, {"prompt": ""}, "prompt"),
            (COMPLETIONS, {"prompt": []}, "prompt"),
            (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
            (COMPLETIONS, {"prompt": [512]}, "prompt"),
            (COMPLETIONS, {"prompt": [-1]}, "prompt[0]"),
            (COMPLETIONS, {"prompt": [1] * 2048}, "prompt"),
            (COMPLETIONS, {"prompt": "x" * 10**6}, "prompt"),
            (COMPLETIONS, {"prompt": [490, 492, 0]}, "prompt"),
            (COMPLETIONS, {"prompt": "What is this? <unk>"}, "prompt"),
            (COMPLETIONS, {"prompt": "x", "echo": True}, "echo"),
            (COMPLETIONS, {"prompt": "x", "best_of": 2}, "best_of"),
            (COMPLETIONS, {"prompt": "x", "suffix": "y"}, "suffix"),
            (COMPLETIONS, {"prompt": "x", "logprobs": 6}, "logprobs"),
            (COMPLETIONS, {"prompt": "x", "messages": []}, "messages"),
            (EMBEDDINGS, {}, "input"),
            (EMBEDDINGS, {"input": ["x", 3]}, "input[1]"),
            (EMBEDDINGS, {"input": ""}, "input[0]"),
            (EMBEDDINGS, {"input": ["x"] * 257}, "input"),
            (EMBEDDINGS, {"input": "x" * 40_000}, "input[0]"),
            (EMBEDDINGS, {"input": "x", "encoding_format": "text"}, "encoding_format"),
            (EMBEDDINGS, {"input": "x", "dimensions": 64}, "dimensions"),
            (EMBEDDINGS, {"input": "data:image/png;base64,AAAA"}, "input[0]"),
            (TILES, {"image": 3}, "image"),
            (TILES, {"image": "/etc/passwd"}, "image"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_what_is_refused(self, port: int, path: str, body: object, param: str) -> None:
        status, said = request(port, path, body)
        error = json.loads(said)["error"]
        assert status == 400 and error["param"] == param and error["type"] == "invalid_request_error", said
        assert error["message"].startswith(param) and error["code"] and len(error["message"]) < 1000
        assert "Traceback" not in said and " at 0x" not in said


class TestImages:
    @pytest.mark.parametrize(
        "url",
        [
            "file:///etc/passwd",
            "/etc/passwd",
            "http://127.0.0.1/x.png",
            "https://example.com/x.png",
            "http://[::ffff:127.0.0.1]/x.png",
            "http://good.example\\@127.0.0.1/x.png",
            "http://2130706433/x.png",
            "DATA:image/png,AAAA",
            "data:image/png;base64,AAAA",
            "data:image/png;base64,????",
            "data:image/png;base64,",
            "data:",
            "data:;base64," + base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode(),
            "data:;base64," + base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg"/>').decode(),
        ],
        ids=lambda url: url[:40],
    )
    def test_what_is_no_image(self, port: int, url: str) -> None:
        """Nothing is fetched, no file is read, and formats that would start other programs are not known."""
        body = chat({"type": "image_url", "image_url": {"url": url}})
        status, said = request(port, CHAT, body)
        error = json.loads(said)["error"]
        assert (status, error["code"]) == (400, "invalid_image") and " at 0x" not in said

    @pytest.mark.parametrize(
        "part", [{}, {"image_url": {}}, {"image_url": 3}, {"image_url": {"url": None}}, {"image": "x"}]
    )
    def test_a_part_without_an_image(self, port: int, part: dict) -> None:
        assert ask(port, {"type": "image_url", **part})[0] == 400

    @pytest.fixture
    def no_decoding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def decode(*args):
            raise AssertionError("an image was decoded")

        monkeypatch.setattr(prompts, "tile_image", decode)

    def test_bounds_come_before_decoding(self, port: int, no_decoding: None) -> None:
        """Eight PNGs of 89 million pixels, and 2,200 small ones: refused by their headers."""
        status, said = ask(port, *[image(png(9400, 9400))] * 8)
        assert status == 400 and json.loads(said)["error"]["code"] == "too_many_pixels"
        status, said = ask(port, image(png(20_000, 20_000)))
        assert status == 400 and json.loads(said)["error"]["code"] == "invalid_image"
        status, said = ask(port, *[image(png(1, 1))] * 2200)
        assert status == 400 and json.loads(said)["error"]["code"] == "too_many_images"
        status, said = request(port, EMBEDDINGS, {"input": [uri(png(9400, 9400))] * 2})
        assert status == 400 and json.loads(said)["error"]["code"] == "too_many_pixels"

    def test_the_context_comes_before_decoding(self, port: int, no_decoding: None) -> None:
        many = [image(png(400, 400 + i)) for i in range(16)]
        status, said = ask(port, *many, "red " * 1500)
        assert status == 400 and json.loads(said)["error"]["code"] == "context_length_exceeded"

    def test_a_long_thin_image(self, port: int, no_decoding: None) -> None:
        """Its overview would have nine times as many pixels as a tile of the model."""
        status, said = ask(port, image(png(2000, 1)))
        assert status == 400 and "long and thin" in json.loads(said)["error"]["message"]

    def test_one_pixel(self, port: int) -> None:
        assert ask(port, image(png(1, 1)), "What is it?", max_tokens=1)[0] == 200

    def test_a_header_without_pixels(self, port: int) -> None:
        """It is planned, and then cannot be decoded: the request alone fails."""
        whole = CROSS.read_bytes()
        status, said = ask(port, image(whole[: len(whole) // 2]), "What is it?")
        assert status == 400 and json.loads(said)["error"]["code"] == "invalid_image"

    def test_images_are_decoded_one_at_a_time(self, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
        decode, inside, most = prompts.tile_image, [], []

        def watched(*args):
            inside.append(1)
            most.append(len(inside))
            try:
                return decode(*args)
            finally:
                inside.pop()

        monkeypatch.setattr(prompts, "tile_image", watched)
        with ThreadPoolExecutor(6) as pool:
            done = list(pool.map(lambda i: ask(app.server_port, image(png(300 + i, 200)), "?", max_tokens=1), range(6)))
        assert {status for status, _ in done} == {200} and len(most) == 6 and max(most) == 1


class TestBodies:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{bad",
            b"\xff\xfe",
            b'{"messages": "\xff"}',
            b"\xef\xbb\xbf{}",
            json.dumps({}).encode("utf-16"),
            b"[" * 100_000,
            b"[" * 100_000 + b"]" * 100_000,
            b'{"messages": ' * 1000 + b"1" + b"}" * 1000,
            b"[" + b"1," * 300_000 + b"1]",
            b'{"temperature": NaN}',
            b'{"temperature": -Infinity}',
            b'{"seed": ' + b"9" * 5000 + b"}",
            b'{"messages": "' + b"\\" * 999,
        ],
        ids=lambda body: str(body)[:30],
    )
    def test_no_json(self, port: int, body: bytes) -> None:
        status, said = request(port, CHAT, body)
        assert status == 400 and json.loads(said)["error"]["code"] == "invalid_json"

    @pytest.mark.parametrize("body", [[1], 1, "x", {"temperature": 1e999}, None])
    def test_no_object(self, port: int, body: object) -> None:
        data = b'{"temperature": 1e999, "messages": []}' if isinstance(body, dict) else json.dumps(body).encode()
        assert request(port, CHAT, data)[0] == 400

    def test_too_large_is_said_at_once(self, port: int) -> None:
        """Before the client has sent any of it, and also if it sends all of it."""
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\nContent-Type: {JSON}\r\n"
        head += "Content-Length: 2000001\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(head.encode())
            assert client.recv(100).startswith(b"HTTP/1.1 413")
        status, said = request(port, CHAT, b" " * 2_000_001)
        assert status == 413 and json.loads(said)["error"]["code"] == "body_too_large"

    @pytest.mark.parametrize(
        "headers, status",
        [
            ({"Content-Type": "text/plain"}, 415),
            ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
            ({"Content-Type": None}, 415),
            ({"Content-Length": "-1"}, 411),
            ({"Content-Length": "1e3"}, 411),
            ({"Transfer-Encoding": "chunked"}, 411),
        ],
    )
    def test_headers(self, port: int, headers: dict, status: int) -> None:
        found, said = request(port, CHAT, json.dumps(chat("x")).encode(), headers=headers)
        assert found == status and json.loads(said)["error"]["message"]

    def test_what_is_refused_is_not_the_next_request(self, port: int) -> None:
        """The body of a request that is refused before it is read is never taken for a request."""
        inner = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for path in (b"/v1/nothing", CHAT.encode()):
            head = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(inner)
            assert raw(port, head + inner).count(b"HTTP/1.1") == 1
        head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(inner)
        assert raw(port, head + inner).count(b"HTTP/1.1") == 1

    @pytest.mark.parametrize(
        "lines",
        [
            b"Content-Length: 0\r\nContent-Length: %d",
            b"Content-Length: 00%d",
            b"Content-Length : %d",
            b"no colon\r\nContent-Length: %d",
            b"no colon\r\nX: %d\r\nTransfer-Encoding: chunked",
            b"X\0Y: 1\r\nContent-Length: %d",
            b"X: 1\r\n Content-Length: %d",
            b"Content-Length:\r\n %d",
        ],
    )
    def test_a_body_that_a_proxy_sees_is_not_the_next_request(self, port: int, lines: bytes) -> None:
        inner = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        for method in (b"GET", b"HEAD", b"OPTIONS"):
            head = method + b" /health HTTP/1.1\r\nHost: localhost\r\n" + lines % len(inner) + b"\r\n\r\n"
            assert raw(port, head + inner).count(b"HTTP/1.1") == 1

    def test_a_header_that_begins_as_a_continuation(self, port: int) -> None:
        said = raw(port, b"GET /health HTTP/1.1\r\n Content-Length: 3\r\nHost: localhost\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 400")

    def test_expect(self, port: int) -> None:
        """A body is asked for once the request is admitted, and not before it is refused."""
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\nExpect: 100-continue\r\n"
        assert raw(port, f"{head}Content-Length: 9\r\n\r\n".encode()).startswith(b"HTTP/1.1 401")
        head += "Authorization: Bearer secret\r\nConnection: close\r\n"
        assert raw(port, f"{head}Content-Length: 2000001\r\n\r\n".encode()).startswith(b"HTTP/1.1 413")
        body = json.dumps(chat("Hello", max_tokens=1))
        said = raw(port, f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert said.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")

    def test_head(self, port: int) -> None:
        for path, status in (("/", b"200"), ("/health", b"200"), ("/nothing", b"404")):
            said = raw(port, f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert said.startswith(b"HTTP/1.1 " + status) and said.endswith(b"\r\n\r\n")

    def test_slow_bodies_hold_up_nobody(self, port: int) -> None:
        body = json.dumps(chat("Hello", max_tokens=1)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\nContent-Type: {JSON}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(9)]
            for client in slow:
                client.sendall(head.encode() + body[:9])
            assert ask(port, "Hello", max_tokens=1)[0] == 200
            for client in slow:
                client.sendall(body[9:])
            assert {client.recv(12) for client in slow} == {b"HTTP/1.1 200"}

    def test_room_for_large_bodies(self, demo, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is held until they are answered; small ones need none."""
        monkeypatch.setattr(connection, "SMALL_BODY", 1000)
        free, plan = [], endpoints.chat_prompt
        with serving(*demo, max_body=10_000) as app:
            monkeypatch.setattr(endpoints, "chat_prompt", lambda *args: free.append(app.bodies._free) or plan(*args))
            large = b" " * 9000 + json.dumps(chat("Hello", max_tokens=1)).encode()
            assert request(app.server_port, CHAT, large)[0] == 200 and free == [8 * 10_000 - len(large)]
            assert app.bodies.acquire(8 * 10_000, 9)
            patient, app.options = app.options, dataclasses.replace(app.options, timeout=0.05)
            status, said = request(app.server_port, CHAT, large)
            assert status == 503 and json.loads(said)["error"]["code"] == "busy"
            app.options = patient
            assert ask(app.server_port, "Hello", max_tokens=1)[0] == 200
            app.bodies.release(8 * 10_000)
            assert request(app.server_port, CHAT, large)[0] == 200

    def test_idle_connections_make_room(self, demo, monkeypatch: pytest.MonkeyPatch) -> None:
        """The one that has been idle for longest is closed for a new one."""
        monkeypatch.setattr(apps, "MAX_CONNECTIONS", 2)
        with serving(*demo) as app, contextlib.ExitStack() as stack:
            address = ("127.0.0.1", app.server_port)
            first, second = (stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(2))
            while len(app._idle) < 2:
                time.sleep(0.001)
            assert request(app.server_port, "/health")[0] == 200
            assert first.recv(1) == b""
            second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert second.recv(12) == b"HTTP/1.1 200"

    def test_requests_share_a_connection(self, port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for _ in range(3):
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status": "ok"}'
        connection.close()

    @pytest.mark.parametrize(
        "data",
        [b"\r\n\r\n", b"GARBAGE\r\n\r\n", b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET / HTTP/9\r\n\r\n"],
    )
    def test_no_http(self, port: int, data: bytes) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert b"Traceback" not in said and (not said or b'"error"' in said)

    def test_a_body_that_never_comes(self, demo, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "RECEIVE_SECONDS", 0.2)
        with serving(*demo) as app:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\nContent-Length: 10\r\n\r\n"
            assert raw(app.server_port, head.encode() + b"{").startswith(b"HTTP/1.1 408")
            assert raw(app.server_port, b"GET / HTTP/1.1\r\nHost: lo") == b""

    def test_endpoints(self, port: int) -> None:
        for path, method, status in (
            ("/v1/nothing", "POST", 404),
            ("/v1/nothing", "GET", 404),
            ("/../../etc/passwd", "GET", 404),
            (CHAT, "GET", 405),
            (CHAT, "DELETE", 405),
            ("/", "PUT", 405),
        ):
            found, said = request(port, path, {} if method == "POST" else None, method=method)
            assert found == status and json.loads(said)["error"]["message"], (path, method)


class TestWhoMayAsk:
    def test_the_key(self, port: int) -> None:
        for key in ("guess", "", "secret ", "sécret", "secret" * 1000):
            for path, body in ((CHAT, {}), ("/v1/models", None), ("/v1/models/x", None), (EMBEDDINGS, {}), (TILES, {})):
                status, said = request(port, path, body, key=key)
                error = json.loads(said)["error"]
                assert (status, error["code"], error["type"]) == (401, "invalid_api_key", "authentication_error")

    def test_a_key_may_have_any_letters(self, demo) -> None:
        with serving(*demo, api_key="schlüssel") as app:
            for key, status in (("schlüssel", b"200"), ("schlussel", b"401")):
                sent = f"GET /v1/models HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
                assert raw(app.server_port, f"{sent}\r\n".encode()).startswith(b"HTTP/1.1 " + status)

    def test_the_key_is_compared_in_constant_time(self, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
        compared = []
        monkeypatch.setattr(connection.hmac, "compare_digest", lambda *given: compared.append(given) or False)
        assert request(port, "/v1/models")[0] == 401
        assert compared == [(b"Bearer secret", b"Bearer secret")]

    @pytest.mark.parametrize(
        "host, good",
        [
            ("localhost", True),
            ("LOCALHOST:1234", True),
            ("127.0.0.1:8080", True),
            ("127.0.0.2", True),
            ("[::1]:80", True),
            ("attacker.example", False),
            ("localhost.attacker.example", False),
            ("127.0.0.1.attacker.example", False),
            ("attacker.example#localhost", False),
            ("localhost@attacker.example", False),
            ("192.168.1.1", False),
            ("0.0.0.0", False),
            ("[::1", False),
            ("", False),
        ],
    )
    def test_the_host(self, port: int, host: str, good: bool) -> None:
        """A page whose name was rebound to this address says its own name."""
        status, said = request(port, "/v1/models", headers={"Host": host})
        assert status == (200 if good else 403), said

    def test_two_hosts_or_none(self, port: int) -> None:
        for hosts in (b"", b"Host: localhost\r\nHost: attacker.example\r\n"):
            assert raw(port, b"GET /health HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n").startswith(
                b"HTTP/1.1 403"
            )

    def test_pages_of_others(self, port: int) -> None:
        """Only our own origin may ask, and nobody else is told that they may read the answer."""
        for origin in (
            "http://attacker.example",
            "null",
            f"https://127.0.0.1:{port}",
            "http://127.0.0.1:1",
            "http://127.0.0.1",
        ):
            for path, body in (("/v1/models", None), (CHAT, chat("Hello"))):
                status, said = request(port, path, body, headers={"Origin": origin})
                assert status == 403 and json.loads(said)["error"]["code"] == "origin_not_allowed"
            sent = f"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\nConnection: close\r\n\r\n"
            assert b"Access-Control-Allow-Origin" not in raw(port, sent.encode())
            assert request(port, CHAT, method="OPTIONS", headers={"Origin": origin})[0] == 403
        assert request(port, "/v1/models", headers={"Origin": f"http://127.0.0.1:{port}"})[0] == 200

    def test_what_options_allow(self, demo) -> None:
        with serving(*demo, allowed_origins=("http://other.example",), allowed_hosts=("mac.local",)) as app:
            connection = http.client.HTTPConnection("127.0.0.1", app.server_port, timeout=30)
            headers = {"Origin": "http://other.example", "Host": "mac.local:8080"}
            asks = headers | {"Access-Control-Request-Headers": "authorization, x-stainless-os"}
            connection.request("OPTIONS", CHAT, headers=asks)
            response = connection.getresponse()
            response.read()
            assert response.headers["Access-Control-Allow-Origin"] == "http://other.example"
            assert response.headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-os"
            connection.request("GET", "/v1/models", headers=headers)
            response = connection.getresponse()
            response.read()
            assert response.status == 200 and response.headers["Access-Control-Allow-Origin"] == "http://other.example"
            assert response.headers["Vary"] == "Origin"
            connection.close()

    def test_the_page_runs_its_own_script_alone(self, port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/?q")
        response = connection.getresponse()
        page, policy = response.read(), response.headers["Content-Security-Policy"]
        connection.close()
        assert response.status == 200 and b"<title>" in page
        assert "default-src 'none'; script-src 'sha256-" in policy and "script-src 'unsafe" not in policy
        assert "frame-ancestors 'none'" in policy


class TestWork:
    def test_an_exception_is_one_requests(self, demo, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
        """While it is read: a 500 with an id that the log has, and the next request is answered."""
        encode = engines.Engine._encode

        def broken(self, job, index, image):
            if job.settings.max_tokens == 13:
                raise ZeroDivisionError("broken")
            return encode(self, job, index, image)

        monkeypatch.setattr(engines.Engine, "_encode", broken)
        with serving(*demo) as app:
            status, said = ask(app.server_port, image(STARS), "What is this image?", max_tokens=13)
            error = json.loads(said)["error"]
            assert status == 500 and error["type"] == "server_error" and "broken" not in said
            number = error["message"].split()[2].rstrip(";")
            assert number in caplog.text and "ZeroDivisionError: broken" in caplog.text
            assert text(ask(app.server_port, image(STARS), "What is this image?")) == STARS_ANSWER

    def test_an_exception_in_a_batch_is_one_requests(self, demo, monkeypatch, caplog) -> None:
        """A logits processor fails at its third token, while others are in the batch."""

        def processors(sampling, presence_penalty, frequency_penalty, logit_bias):
            def process(tokens, logits):
                if len(tokens) > 2:
                    raise ZeroDivisionError("broken")
                return logits

            return [process] if presence_penalty else []

        monkeypatch.setattr(engines.mlx_lm, "logits_processors", processors)
        with serving(*demo) as app, ThreadPoolExecutor(6) as pool:
            options = [{"presence_penalty": float(i % 2)} for i in range(6)]
            said = list(pool.map(lambda o: ask(app.server_port, image(STARS), "What is this image?", **o), options))
        assert [status for status, _ in said] == [200, 500] * 3
        assert {text(each) for each in said[::2]} == {STARS_ANSWER}

    def test_a_batch_that_fails_is_replaced(self, demo, monkeypatch, caplog) -> None:
        with serving(*demo) as app:
            batch = app.engine._decoding
            monkeypatch.setattr(batch, "next", lambda alone: 1 / 0)
            assert ask(app.server_port, "Hello")[0] == 500
            assert app.engine._decoding is not batch
            assert text(ask(app.server_port, image(STARS), "What is this image?")) == STARS_ANSWER

    def test_an_exception_in_a_handler(self, demo, monkeypatch, caplog) -> None:
        monkeypatch.setattr(endpoints, "plan_image", lambda *args: 1 / 0)
        with serving(*demo) as app:
            assert request(app.server_port, TILES, {"image": uri(STARS)})[0] == 500
            assert text(ask(app.server_port, image(STARS), "What is this image?")) == STARS_ANSWER

    def test_an_exception_in_an_embedding(self, demo, monkeypatch, caplog) -> None:
        with serving(*demo, embedding_model=SIGLIP) as app:
            with monkeypatch.context() as patch:
                patch.setattr(app.embedder.encoder, "encode", lambda things: 1 / 0)
                assert request(app.server_port, EMBEDDINGS, {"input": uri(STARS)})[0] == 500
            assert request(app.server_port, EMBEDDINGS, {"input": uri(STARS)})[0] == 200

    def test_progress_while_an_image_is_read(self, demo, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(endpoints, "HEARTBEAT", 0.01)
        seen, encode = threading.Event(), engines.Engine._encode

        def held(self, job, index, image):
            pieces = encode(self, job, index, image)
            yield next(pieces)
            assert seen.wait(30)
            return (yield from pieces)

        monkeypatch.setattr(engines.Engine, "_encode", held)
        with serving(*demo) as app, socket.create_connection(("127.0.0.1", app.server_port), timeout=30) as client:
            body = json.dumps(chat(image(STARS), "What is this image?", stream=True))
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            lines = client.makefile("r", encoding="utf-8")
            comment = next(line for line in lines if line.startswith(": reading"))
            seen.set()
            assert comment == ": reading image 1 of 1, tile 1 of 5\n"
            assert streamed("".join(lines)) == STARS_ANSWER

    def test_a_client_that_goes_away(self, demo) -> None:
        """Its answer ends with the next token, whether it streams or not, and whether it has said all or not."""
        with serving(*demo) as app:
            for stream in (False, True):
                body = json.dumps(chat("Hello", max_tokens=1900, stream=stream, logit_bias={"491": -100, "499": -100}))
                head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\n"
                head += f"Content-Length: {len(body)}\r\n\r\n"
                for sent in (head + body, head + body[:9], head[:30]):
                    with socket.create_connection(("127.0.0.1", app.server_port)) as client:
                        client.sendall(sent.encode())
            assert text(ask(app.server_port, image(STARS), "What is this image?")) == STARS_ANSWER

    def test_time(self, demo) -> None:
        with serving(*demo, timeout=0.0) as app:
            status, said = ask(app.server_port, "Hello")
            assert status == 504 and json.loads(said)["error"]["code"] == "timeout"
            events = ask(app.server_port, "Hello", stream=True)
            assert events[0] == 504

    def test_more_than_there_is_room_for(self, demo) -> None:
        with serving(*demo, concurrency=2) as app, ThreadPoolExecutor(9) as pool:
            said = pool.map(lambda n: ask(app.server_port, image(STARS), "What is this image?", n=n), range(1, 9))
            assert [len(answer(each)["choices"]) for each in said] == list(range(1, 9))


class TestEmbeddings:
    def test_find_their_image(self, port: int) -> None:
        """Texts and images in one space, as floats and as base64; the same as the encoder's own."""
        inputs = ["two red stars on a yellow background", uri(STARS), uri(CROSS)]
        said = answer(request(port, EMBEDDINGS, {"input": inputs, "model": "any"}))
        assert [each["index"] for each in said["data"]] == [0, 1, 2] and said["usage"]["prompt_tokens"] > 5
        rows = np.array([each["embedding"] for each in said["data"]])
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2]
        encoder = load_encoder(SIGLIP)
        own = np.array(encoder.encode([encoder.prepare(STARS)])[0].rows[0].astype(mx.float32))
        own /= np.linalg.norm(own)
        np.testing.assert_allclose(rows[1], own, atol=tolerance(encoder.dtype, np.abs(own).max()))
        said = answer(request(port, EMBEDDINGS, {"input": inputs[1], "encoding_format": "base64"}))
        packed = said["data"][0]["embedding"]
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), rows[1], atol=1e-5)

    def test_that_come_together_are_computed_together(self, app: App, rng: np.random.Generator) -> None:
        uris = []
        for _ in range(24):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(file, "PNG")
            uris.append(uri(file.getvalue()))
        together = answer(request(app.server_port, EMBEDDINGS, {"input": uris}))["data"]
        assert max(app.embedder.batches) > 1
        for one, row in zip(uris[::8], together[::8], strict=True):
            alone = answer(request(app.server_port, EMBEDDINGS, {"input": one}))["data"][0]
            np.testing.assert_allclose(alone["embedding"], row["embedding"], atol=1e-5)

    def test_few_images_are_in_memory(self, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
        """An image of one pixel takes as much as any other, once it has the size that the tower sees."""
        prepare, prepared, computed, most = app.embedder._prepare, [], [], []

        def counted(source):
            prepared.append(1)
            most.append(len(prepared) - len(computed))
            return prepare(source)

        def compute(chosen) -> None:
            computed.extend(chosen)
            for each in chosen:
                each.result.set_result(np.zeros(4))

        monkeypatch.setattr(app.embedder, "_prepare", counted)
        monkeypatch.setattr(app.embedder, "_compute", compute)
        said = answer(request(app.server_port, EMBEDDINGS, {"input": [uri(png(1, 1))] * 99}))
        assert len(said["data"]) == 99 and max(most) <= 16


class TestStartAndStop:
    @pytest.mark.parametrize(
        "options, name",
        [
            (["--nonsense"], "--nonsense"),
            (["--draft-model", "x"], "--draft-model"),
            (["--chat-template", "x"], "--chat-template"),
            (["--trust-remote-code"], "--trust-remote-code"),
            (["--allow-remote-images"], "--allow-remote-images"),
            (["--kv-bits", "8"], "--kv-bits"),
            (["--port", "99999"], "--port"),
            (["--host", ""], "--host"),
            (["--allow-origin", "chat.example"], "--allow-origin"),
            (["--allow-origin", "https://chat.example/page"], "--allow-origin"),
            (["--allowed-host", "http://mac.local"], "--allowed-host"),
            (["--allowed-host", "[::1"], "--allowed-host"),
            (["--prompt-cache-bytes", "many"], "--prompt-cache-bytes"),
            (["--top-p", "2"], "--top-p"),
            (["--api-key-env", "NO_SUCH_NAME"], "--api-key-env"),
        ],
    )
    def test_a_wrong_option(self, options: list[str], name: str, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit) as ended:
            main(options)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith("usage: ") and name in error.splitlines()[-1]

    def test_origins_and_hosts_are_taken_as_they_are_copied(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the slash of an address line, or a port."""
        seen = []
        monkeypatch.setattr(servers, "run", lambda command, debug: command())
        monkeypatch.setattr(servers, "serve", seen.append)
        hosts = [part for host in ("Mac.local:8080", "[::1]:80", "mac") for part in ("--allowed-host", host)]
        main(["--allow-origin", "https://chat.example/", "--allow-origin", "*", *hosts])
        assert seen[0].allow_origin == ["https://chat.example", "*"]
        assert seen[0].allowed_host == ["mac.local", "::1", "mac"]

    def test_what_cannot_be_served(self, run_main, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            for options in (
                ["--port", "0", "--model", str(tmp_path)],
                ["--port", "0", "--model", "/nowhere/at/all"],
                ["--port", str(taken.getsockname()[1])],
                ["--port", "0", "--host", "256.1.1.1"],
                ["--port", "0", "--prompt-cache-dir", str(tmp_path / "file")],
                ["--port", "0", "--embedding-model", str(tmp_path)],
            ):
                done = run_main("llama3v_mlx.server", *options)
                last = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
                assert done.returncode == 1 and len(last) == 1 and last[0].startswith("error: "), (options, done)
                if options[1] != "0":
                    assert f"127.0.0.1:{options[1]} (" in last[0] and "choose another --port" in last[0]

    def test_help_names_every_option(self, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        said = capsys.readouterr().out
        assert ended.value.code == 0
        for name in (
            "--allow-origin",
            "--allowed-host",
            "--prompt-cache-dir",
            "--max-megapixels",
            "--temp",
            "--timeout",
        ):
            assert name in said

    @pytest.mark.parametrize(
        "host, address, shown, is_open",
        [
            ("127.0.0.1", "127.0.0.1", "127.0.0.1:80", False),
            ("localhost", "127.0.0.1", "localhost:80", False),
            ("::1", "::1", "[::1]:80", False),
            ("0.0.0.0", "0.0.0.0", "127.0.0.1:80, and", True),
            ("::", "::", "[::1]:80, and", True),
            ("mac.local", "192.168.1.2", "mac.local:80", True),
            ("fe80::1%lo", "fe80::1%lo", "[fe80::1%lo]:80", True),
        ],
    )
    def test_what_is_said(self, host: str, address: str, shown: str, is_open: bool) -> None:
        """An address that the server answers at, and whether others may use it."""
        said = announcement(Options("m", host), address, 80)
        assert said.startswith(f"serving m at http://{shown}") and ("--api-key-env" in said) == is_open
        assert "--api-key-env" not in announcement(Options("m", host, api_key="x"), address, 80)

    def test_an_address_that_is_taken_while_the_model_is_loaded(self) -> None:
        """Two may bind it; the second one to listen fails."""
        with contextlib.ExitStack() as stack:

            def bound(port: int) -> App:
                app = App(Options("m", port=port))
                stack.callback(app.server_close)
                return app

            first = bound(0)
            with pytest.raises(OSError, match=rf"127.0.0.1:{first.server_port} \(.*; choose another --port"):
                second = bound(first.server_port)
                first.server_activate()
                second.server_activate()

    def test_a_signal_that_a_library_swallows(self, demo, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*args, **options):
            with contextlib.suppress(SystemExit):
                signal.raise_signal(signal.SIGTERM)
            return demo

        monkeypatch.setattr(generation, "load", load)
        monkeypatch.setattr(servers, "run", lambda command, debug: command())
        late = threading.Timer(30, os.kill, (os.getpid(), signal.SIGTERM))
        late.start()
        main(["--port", "0"])
        assert late.is_alive()
        late.cancel()

    def test_nohup(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for handler, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            monkeypatch.setattr(signal, "getsignal", lambda number, handler=handler: handler)
            assert signal.SIGTERM in stop_signals() and (signal.SIGHUP in stop_signals()) == stops

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
    def test_a_signal_lets_running_answers_end(self, number: signal.Signals, tmp_path: Path) -> None:
        """And a server whose prefix cache was on disk does not decode the image again."""
        options = ("--temp", "0", "--prompt-cache-dir", tmp_path)
        with served("llama3v_mlx.server", *options, cwd=ROOT, start_new_session=True) as (server, port, said):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            body = chat(image(STARS), "What is this image?", stream=True, max_tokens=60)
            body["logit_bias"] = {"491": -100, "499": -100}
            connection.request("POST", CHAT, json.dumps(body), {"Content-Type": JSON})
            response = connection.getresponse()
            first = response.readline()
            tasks = Path(f"/proc/{server.pid}/task")  # not the main thread, if a thread can be chosen
            os.kill(max(map(int, os.listdir(tasks))) if tasks.exists() else server.pid, number)
            rest = (first + response.read()).decode()
            assert server.wait(30) == 0, said
        assert rest.endswith("data: [DONE]\n\n") and events_of(rest)[-1]["choices"][0]["finish_reason"] == "length"
        assert "Traceback" not in "".join(said) and list(tmp_path.glob("*/*.safetensors"))

    def test_what_does_not_end_in_time_is_told(self, demo) -> None:
        with serving(*demo) as app, ThreadPoolExecutor(1) as pool:
            endless = {"max_tokens": 1900, "logit_bias": {"491": -100, "499": -100}}
            running = pool.submit(ask, app.server_port, "Hello", **endless)
            while not app.engine._answers:
                assert not running.done()
            app.close(0)
            status, said = running.result()
            assert status == 503 and json.loads(said)["error"]["code"] == "shutting_down"
            app.shutdown = app.close = lambda *args: None

    def test_a_restart_keeps_the_images(self, demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A second question about an image seen before reads its own text alone, and decodes nothing."""
        with serving(*demo, PrefixCache(10**8, tmp_path, "model")) as app:
            assert text(ask(app.server_port, image(STARS), "What is this image?")) == STARS_ANSWER
        monkeypatch.setattr(prompts, "tile_image", lambda *args: 1 / 0)
        with serving(*demo, PrefixCache(10**8, tmp_path, "model")) as app:
            said = ask(app.server_port, image(STARS), "What color is the background?")
        assert text(said) == "The background is yellow."
        usage = answer(said)["usage"]
        assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] < 20


def test_soak(run_main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    done = run_main("soak", "--requests", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 requests of 8 clients" in done.stdout and "0 wrong, traceback: False" in done.stdout

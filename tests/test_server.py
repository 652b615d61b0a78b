"""The server, as its clients see it: right answers, and one clear error for whatever else is sent."""

import base64
import http.client
import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import tolerance
from PIL import Image

from llama3v_mlx import stream_generate
from llama3v_mlx.conversation import Conversation
from llama3v_mlx.demo import IMAGES, SIGLIP
from llama3v_mlx.features.encoder import load_encoder
from llama3v_mlx.serving.embeddings import Embedder
from llama3v_mlx.serving.validate import RequestError, fetch

STARS, CROSS = IMAGES / "two-red-stars.jpg", IMAGES / "one-purple-cross.jpg"
CHAT = "/v1/chat/completions"


def request(
    port: int, path: str, body: object = None, key: str = "secret", method: str | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    method = method or ("GET" if body is None else "POST")
    connection.request(method, path, data, {"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def image(path: Path) -> dict:
    uri = f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}


def ask(port: int, *parts: dict | str, **options) -> tuple[int, str]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **options}
    return request(port, CHAT, body)


def text(answer: tuple[int, str]) -> str:
    assert answer[0] == 200, answer
    return json.loads(answer[1])["choices"][0]["message"]["content"]


def test_the_answers_are_generates(port: int, demo) -> None:
    for path, question in ((STARS, "What is this image?"), (CROSS, "What color is the background?")):
        greedy = {"temperature": 0, "repetition_penalty": 1}
        expected = "".join(r.text for r in stream_generate(*demo, question, path, **greedy))
        assert text(ask(port, image(path), question)) == expected
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    assert "Show me an image" in text(request(port, CHAT, body))


def test_a_stream_says_the_same(port: int) -> None:
    status, said = ask(port, image(STARS), "What is this image?", stream=True, stream_options={"include_usage": True})
    assert status == 200
    events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
    assert streamed(said) == "Two red stars on a yellow background."
    assert events[-1]["usage"]["completion_tokens"] == 9 and said.rstrip().endswith("data: [DONE]")


def test_the_same_tokens_in_every_way(port: int, demo, run_main) -> None:
    """A conversation about two images by Python, chat's own, both commands, and the server, at once and streamed."""
    turns = (("What is this image?", [STARS]), ("What color is the background?", []), ("Which shape is it?", [CROSS]))
    greedy = {"temperature": 0, "repetition_penalty": 1}
    talk, messages, sent, said = Conversation(*demo, options=greedy), [], [], []
    for question, images in turns:
        messages.append({"role": "user", "content": [*images, question]})
        sent.append({"role": "user", "content": [*map(image, images), {"type": "text", "text": question}]})
        expected = list(stream_generate(*demo, messages, **greedy))
        tokens, words = [r.token for r in expected], "".join(r.text for r in expected)
        assert [r.token for r in talk.ask(question, images)] == tokens
        body = {"messages": sent, "temperature": 0, "repetition_penalty": 1, "logprobs": True}
        choice = json.loads(request(port, CHAT, body)[1])["choices"][0]
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


def streamed(said: str) -> str:
    events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])


def test_turns_images_and_the_cache(port: int) -> None:
    messages = [{"role": "user", "content": [image(STARS), {"type": "text", "text": "What is this image?"}]}]
    messages.append({"role": "assistant", "content": "Two red stars on a yellow background."})
    messages.append({"role": "user", "content": [image(CROSS), {"type": "text", "text": "What is this image?"}]})
    status, said = request(port, CHAT, {"messages": messages, "temperature": 0})
    assert "One purple cross" in text((status, said))
    messages = [*messages[:2], {"role": "user", "content": "What color is the background?"}]
    status, said = request(port, CHAT, {"messages": messages, "temperature": 0})
    assert text((status, said)) == "The background is yellow."
    assert json.loads(said)["usage"]["prompt_tokens_details"]["cached_tokens"] > 80


def test_together_as_one_by_one(port: int) -> None:
    """Requests with images share batches; each gets what it would get alone."""
    paths = sorted(IMAGES.iterdir())
    questions = [(path, question) for path in paths for question in ("What is this image?", "What color is it?")]

    def answer(asked: tuple[Path, str]) -> str:
        return text(ask(port, image(asked[0]), asked[1], max_tokens=30))

    with ThreadPoolExecutor(len(questions)) as pool:
        together = list(pool.map(answer, questions))
    assert together == [answer(asked) for asked in questions]
    assert len(set(together)) > len(paths)


def test_models_and_health(port: int) -> None:
    status, said = request(port, "/v1/models")
    assert status == 200 and json.loads(said)["data"][0]["id"] == "llama3v-demo"
    assert request(port, "/health", key="")[0] == 200
    status, said = request(port, "/v1/completions", {"prompt": "Hello", "max_tokens": 3, "temperature": 0})
    assert status == 200 and json.loads(said)["usage"]["completion_tokens"] == 3


def test_embeddings_find_their_image(port: int) -> None:
    """Texts and images in one space, as floats and as base64; the same as the encoder's own."""
    inputs = ["two red stars on a yellow background", *(image(path)["image_url"]["url"] for path in (STARS, CROSS))]
    status, said = request(port, "/v1/embeddings", {"input": inputs, "model": "any"})
    assert status == 200
    answer = json.loads(said)
    assert [each["index"] for each in answer["data"]] == [0, 1, 2] and answer["usage"]["prompt_tokens"] > 5
    rows = np.array([each["embedding"] for each in answer["data"]])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2]
    encoder = load_encoder(SIGLIP)
    own = np.array(encoder.encode([encoder.prepare(STARS)])[0].rows[0].astype(mx.float32))
    own /= np.linalg.norm(own)
    np.testing.assert_allclose(rows[1], own, atol=tolerance(encoder.dtype, np.abs(own).max()))
    status, said = request(port, "/v1/embeddings", {"input": inputs[1], "encoding_format": "base64"})
    packed = json.loads(said)["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), rows[1], atol=1e-5)


def test_embeddings_that_come_together_are_computed_together(rng: np.random.Generator) -> None:
    embedder = Embedder(SIGLIP)
    embedder.embed(["warm up"])
    uris = []
    for _ in range(24):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(file, "PNG")
        uris.append(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda uri: embedder.embed([uri])[0][0], uris))
    assert max(embedder.batches) > 1
    for uri, row in zip(uris, together, strict=True):
        np.testing.assert_allclose(embedder.embed([uri])[0][0], row, atol=1e-5)


def part(url: object) -> dict:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    "path, body, status, code",
    [
        (CHAT, b"{bad", 400, "invalid_json"),
        (CHAT, b"\xff\xfe", 400, "invalid_json"),
        (CHAT, [1], 400, "invalid_json"),
        (CHAT, {}, 400, "invalid_messages"),
        (CHAT, {"messages": []}, 400, "invalid_messages"),
        (CHAT, {"messages": [1]}, 400, "invalid_role"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "invalid_role"),
        (CHAT, {"messages": [{"role": "user", "content": 7}]}, 400, "invalid_content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "invalid_content"),
        (CHAT, part(None), 400, "invalid_image"),
        (CHAT, part("file:///etc/passwd"), 400, "invalid_image"),
        (CHAT, part("http://127.0.0.1/x.png"), 400, "invalid_image"),
        (CHAT, part("data:image/png;base64,AAAA"), 400, "invalid_image"),
        (CHAT, part("data:image/png,AAAA"), 400, "invalid_image"),
        (CHAT, {"messages": [{"role": "user", "content": "red " * 3000}]}, 400, "context_length_exceeded"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "temperature": -1}, 400, "invalid_request"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}, 400, "invalid_request"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "stream_options": 3}, 400, "invalid_request"),
        ("/v1/completions", {"prompt": [1, 2]}, 400, "invalid_prompt"),
        ("/v1/embeddings", {}, 400, "invalid_input"),
        ("/v1/embeddings", {"input": ["x", 3]}, 400, "invalid_input"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "text"}, 400, "invalid_input"),
        ("/v1/embeddings", {"input": "data:image/png;base64,AAAA"}, 400, "invalid_image"),
        ("/v1/nothing", {}, 404, "not_found"),
        (CHAT, b" " * 2_000_001, 413, "body_too_large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(port: int, path: str, body: object, status: int, code: str) -> None:
    found, said = request(port, path, body)
    error = json.loads(said)["error"]
    assert (found, error["code"]) == (status, code)
    assert error["message"] and error["type"] == "invalid_request_error" and "Traceback" not in said


def test_the_key(port: int) -> None:
    for path, body in ((CHAT, {}), ("/v1/models", None)):
        status, said = request(port, path, body, key="guess")
        assert status == 401 and json.loads(said)["error"]["code"] == "invalid_api_key"


def test_a_client_that_goes_away_stops_nobody(port: int) -> None:
    for stream in (False, True):
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1500, "stream": stream})
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST {CHAT} HTTP/1.1\r\nAuthorization: Bearer secret\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall((head + body).encode())
    assert text(ask(port, image(STARS), "What is this image?")) == "Two red stars on a yellow background."


@pytest.mark.parametrize(
    "url", ["http://localhost/a.png", "http://10.0.0.1/a.png", "http://[::1]/a.png", "ftp://a.b/c"]
)
def test_no_private_address_is_fetched(url: str) -> None:
    with pytest.raises(RequestError, match="not a public address|only http and https"):
        fetch(url, 1000)


def test_soak(run_python) -> None:
    done = run_python("benchmarks/soak.py", "--requests", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 requests of 8 clients" in done.stdout and "0 wrong, traceback: False" in done.stdout

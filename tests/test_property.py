"""Bodies drawn from what the server accepts, most of them broken somewhere: each gets its answer or one clear error.

Run by `pytest -m property`; it takes minutes.
"""

import base64
import dataclasses
import json
import typing

import pytest
from conftest import serving
from test_server import CHAT, STARS, STARS_ANSWER, ask, image, request, text

from llama3v_mlx.demo import IMAGES, SIGLIP
from llama3v_mlx.serving.endpoints import Endpoints

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.property

BODIES = 5000
URI = f"data:image/jpeg;base64,{base64.b64encode((IMAGES / 'two-red-stars.jpg').read_bytes()).decode()}"
KINDS = {path: kind for path, (kind, _) in Endpoints.POSTS.items() if path != "/chat/completions"}

uris = st.sampled_from(
    [URI, URI[:-400], "data:image/png;base64,AAAA", "data:,x", "http://127.0.0.1/", "/etc/passwd", ""]
)
words = st.text(max_size=40) | st.sampled_from(
    ["Hello", "What is this image?", "<unk>", "<|eot_id|>", "\x00", "\ud800"]
)
parts = st.fixed_dictionaries({"type": st.just("text"), "text": words}) | st.builds(
    lambda uri, detail: {"type": "image_url", "image_url": {"url": uri, "detail": detail}},
    uris,
    st.sampled_from(["auto", "low", "high"]),
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": words | st.lists(parts, max_size=3)}
    ),
    min_size=1,
    max_size=4,
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
GOOD = {  # what a field may be; others are absent or null
    "messages": messages,
    "prompt": words | st.lists(st.integers(0, 511), min_size=1, max_size=30),
    "input": uris | words | st.lists(uris | words, max_size=4),
    "image": uris,
    "model": st.text(max_size=10),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(0, 600),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 10),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 520).map(str), st.floats(-100, 100), max_size=5),
    "logprobs": st.booleans() | st.integers(0, 5),
    "top_logprobs": st.integers(0, 20),
    "n": st.integers(1, 3),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "stop": st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "max_image_tiles": st.integers(1, 10),
    "encoding_format": st.sampled_from(["float", "base64"]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}, {"type": "xml"}]),
    "tools": st.just([]),
    "tool_choice": st.sampled_from(["none", "auto"]),
    "service_tier": st.just("auto"),
    "echo": st.just(False),
    "best_of": st.just(1),
}


def fields_of(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


@st.composite
def requests(draw) -> tuple[str, bytes]:
    """A path and a body: right, with a field broken, with a strange field, or cut and flipped as bytes."""
    path = draw(st.sampled_from([CHAT, CHAT, *KINDS]))
    names = fields_of(KINDS[path])
    required = [name for name in ("messages", "prompt", "input", "image") if name in names]
    named = st.sampled_from(names) if names else st.nothing()
    chosen = required + draw(st.lists(named, max_size=6 if names else 0))
    body = {name: draw(GOOD.get(name, st.none())) for name in chosen}
    if "max_tokens" in names:
        body["max_tokens"] = draw(st.integers(1, 3))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        body[draw(named | st.text(max_size=20))] = draw(junk)
    data = json.dumps(body).encode()
    if draw(st.sampled_from([False] * 9 + [True])):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 3)) :]
    return path, data


def fail(constant: str) -> None:
    raise AssertionError(f"{constant} in an answer")


def test_whatever_comes(demo, caplog: pytest.LogCaptureFixture) -> None:
    """5,000 bodies get an answer or a 4xx with an error object; after each hundred a good request is answered."""
    statuses: typing.Counter[int] = typing.Counter()
    with serving(*demo, embedding_model=SIGLIP, max_tokens=3) as app:
        port = app.server_port

        @hypothesis.settings(
            max_examples=BODIES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(requests())
        def each(drawn: tuple[str, bytes]) -> None:
            path, body = drawn
            status, said = request(port, path, body)
            statuses[status] += 1
            assert status == 200 or 400 <= status < 500, (status, said)
            if status != 200:
                error = json.loads(said)["error"]
                assert error["message"] and error["code"] and error["type"] == "invalid_request_error"
            for event in [line[6:] for line in said.splitlines() if line.startswith("data: {")] or [said]:
                value = json.loads(event, parse_constant=fail)
                assert value.get("error", {}).get("code") != "internal_error"
            if statuses.total() % 100 == 0:
                assert text(ask(port, image(STARS), "What is this image?", max_tokens=20)) == STARS_ANSWER

        each()
    assert statuses.total() >= BODIES and statuses[200] > BODIES / 20 and "llama3v_mlx" not in caplog.text, statuses

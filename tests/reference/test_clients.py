"""The server with independent clients: OpenAI's own Python package, and curl."""

import base64
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llama3v_mlx.demo import IMAGES, SIGLIP

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.reference

STARS, CROSS = IMAGES / "two-red-stars.jpg", IMAGES / "one-purple-cross.jpg"


def uri(path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def ask(text: str, *images) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": uri(path)}} for path in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def client(port: int):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)


def test_openai_answers(client) -> None:
    model = client.models.list().data[0].id
    said = client.chat.completions.create(model=model, messages=ask("What is this image?", STARS), temperature=0)
    assert said.choices[0].message.content == "Two red stars on a yellow background."
    assert said.choices[0].finish_reason == "stop" and said.usage.completion_tokens > 5
    said = client.chat.completions.create(model=model, messages=ask("Hello"), temperature=0)
    assert said.choices[0].message.content.startswith("Hello!")


def test_openai_stream(client) -> None:
    events = client.chat.completions.create(
        model="any", messages=ask("What is this image?", CROSS), temperature=0, stream=True
    )
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert len(pieces) > 3 and "".join(pieces).startswith("One purple cross")


def test_openai_embeddings(client) -> None:
    """The package requests base64 and decodes it."""
    inputs = [uri(STARS), "two red stars on a yellow background", "one purple cross on an orange background"]
    said = client.embeddings.create(model=SIGLIP.name, input=inputs)
    rows = np.array([row.embedding for row in said.data])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert rows[0] @ rows[1] > rows[0] @ rows[2]


def test_openai_json_schema(client) -> None:
    """The demo never learned JSON, but its output matches the schema, in a batch with an unconstrained request."""
    pytest.importorskip("llguidance")
    colors = ["red", "green", "yellow"]
    schema = {
        "type": "object",
        "properties": {"shapes": {"type": "integer", "minimum": 1, "maximum": 4}, "color": {"enum": colors}},
        "required": ["shapes", "color"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema, "strict": True}}

    def answer(response_format: dict) -> str:
        messages = ask("What is this image?", STARS)
        options = {"model": "any", "temperature": 0, "max_tokens": 60}
        said = client.chat.completions.create(messages=messages, response_format=response_format, **options)
        return said.choices[0].message.content

    with ThreadPoolExecutor(3) as pool:
        free, *formed = pool.map(answer, [{"type": "text"}, form, form])
    assert free == "Two red stars on a yellow background."
    assert formed[0] == formed[1]
    seen = json.loads(formed[0])
    assert seen.keys() == {"shapes", "color"} and 1 <= seen["shapes"] <= 4 and seen["color"] in colors
    for wrong in ({"type": "xml"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no"}}}):
        with pytest.raises(openai.BadRequestError) as error:
            answer(wrong)
        assert error.value.code == "invalid_response_format"


def test_openai_errors(client, port: int) -> None:
    broken = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]
    with pytest.raises(openai.BadRequestError, match="image") as error:
        client.chat.completions.create(model="any", messages=broken)
    assert error.value.code == "invalid_image"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0).models.list()


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_curl(port: int, tmp_path) -> None:
    (tmp_path / "request.json").write_text(
        json.dumps({"messages": ask("What is this image?", STARS), "temperature": 0})
    )
    command = ["curl", "-sf", f"http://127.0.0.1:{port}/v1/chat/completions", "-H", "Authorization: Bearer secret"]
    command += ["-H", "Content-Type: application/json", "-d", f"@{tmp_path / 'request.json'}"]
    said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert said["choices"][0]["message"]["content"] == "Two red stars on a yellow background."

"""mlx-lm's own tools on our checkpoints, after `register()`: the contract that its minor versions may move."""

import base64
import http.client
import io
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image

import llama3v_mlx
from llama3v_mlx import generate
from llama3v_mlx.convert import convert
from llama3v_mlx.demo import CHECKPOINT

QUESTION = "What is this image?"
ANSWER = "Three blue circles on a white background."


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """In float32, for mlx-lm computes in the checkpoint's dtype, and half precision is slow on a CPU."""
    folder = tmp_path_factory.mktemp("converted") / "demo"
    convert(str(CHECKPOINT), str(folder), dtype="float32")
    return folder


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    llama3v_mlx.register()


def test_load_and_stream_generate(converted: Path, circles: Image.Image) -> None:
    import mlx_lm
    import numpy as np
    from mlx_lm.processors import load_processor

    model, tokenizer, config = mlx_lm.load(str(converted), return_config=True)
    processor = load_processor(model, config)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    text, pixel_values = processor(text, images=[np.asarray(circles)])
    ids = mx.array(tokenizer.encode(text, add_special_tokens=False))
    embeddings = model.embed_inputs(ids, pixel_values=pixel_values)
    mx.eval(embeddings)
    stream = mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=50, input_embeddings=embeddings)
    theirs = [response.token for response in stream]
    ours = llama3v_mlx.stream_generate(
        *llama3v_mlx.load(converted), QUESTION, image=circles, temperature=0, repetition_penalty=1, max_tokens=50
    )
    assert [response.token for response in ours] == theirs
    assert tokenizer.decode(theirs[:-1]) == ANSWER


def test_text_alone(converted: Path) -> None:
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(converted))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=30) == generate(
        *llama3v_mlx.load(converted), "Hello", temperature=0, repetition_penalty=1
    )


def test_generate_command(converted: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """`mlx_lm.generate --image`, its main called after `register()`."""
    from mlx_lm.generate import main

    flags = ["--model", converted, "--image", picture, "--prompt", QUESTION, "--verbose", "False", "--max-tokens", "50"]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.generate", *map(str, flags)])
    main()
    assert capsys.readouterr().out.strip().splitlines()[-1] == ANSWER


def test_server(converted: Path, circles: Image.Image) -> None:
    """`mlx_lm.server` answers data-URI images, and finds a repeated image's tokens in its prefix cache."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import llama3v_mlx; llama3v_mlx.register(); from mlx_lm.server import main; main()"
    flags = ["--model", str(converted), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-c", code, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        file = io.BytesIO()
        circles.save(file, "PNG")
        uri = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

        def ask(text: str) -> dict:
            content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": text}]
            body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 30}
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())

        for _ in range(120):
            try:
                first = ask(QUESTION)
                break
            except ConnectionError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        assert first["choices"][0]["message"]["content"] == ANSWER
        second = ask("How many circles are there?")
        assert "three" in second["choices"][0]["message"]["content"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 60
    finally:
        server.terminate()
        server.wait(timeout=30)

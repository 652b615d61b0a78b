"""The generate command, run as users run it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama3v_mlx import generate
from llama3v_mlx.demo import IMAGES
from llama3v_mlx.generate import main
from llama3v_mlx.generation import print_answer
from llama3v_mlx.image import ImageError

COMMAND = ("-m", "llama3v_mlx.generate")


def test_answer_and_statistics(run_python, picture: Path, tmp_path: Path) -> None:
    """In a process of its own, where torch is installed and ends whoever imports it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "torch-2.13.0.dist-info").mkdir()
    (tmp_path / "torch-2.13.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = run_python(*COMMAND, "--image", picture, "--prompt", "What is this image?", "--temp", "0", env=env)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0] == lines[2] == "=" * 10
    assert lines[1] == "Three blue circles on a white background."
    assert [line.split(":")[0] for line in lines[3:]] == ["Prompt", "Generation", "Peak memory", "Image"]
    assert "5 tiles, 60 visual tokens" in lines[6]
    # Only the note about the demo model, and no library's warning.
    assert len(done.stderr.splitlines()) == 1
    assert "bundled demo" in done.stderr


def test_no_verbose_prints_the_answer_alone(run_main, picture: Path) -> None:
    done = run_main(COMMAND[1], "--image", picture, "--temp", "0", "--no-verbose")
    assert done.stdout == "Three blue circles on a white background.\n"


def test_json_is_one_object(run_main, picture: Path) -> None:
    done = run_main(COMMAND[1], "--image", picture, picture, "-p", "-", "--temp", "0", "--json", input="What is it?")
    figures = json.loads(done.stdout)
    assert figures["prompt"] == "What is it?"
    assert figures["num_tiles"] == 10
    assert {"text", "model", "images", "prompt_tokens", "generation_tps", "vision_seconds"} <= figures.keys()


def test_mlx_lms_warning_is_no_part_of_an_answer(run_python, picture: Path) -> None:
    """As on a Mac whose memory is nearly full: JSON and chat output stay clean, and stderr has the warning once."""
    code = """
import sys, mlx.core as mx
from llama3v_mlx.chat import main as chat
from llama3v_mlx.generate import main as generate
info = mx.device_info()
mx.device_info = lambda *args: {**info, "max_recommended_working_set_size": 5_000_000}
mx.set_wired_limit = lambda size: 0
generate(["--image", sys.argv[1], "--temp", "0", "--json", "--force"])
chat(["--image", sys.argv[1], "--temp", "0", "--force"])
"""
    done = run_python("-c", code, picture, input="What is this image?\nWhat color is the background?\n")
    answer, *lines = done.stdout.splitlines()
    assert json.loads(answer)["text"] == lines[1] == "Three blue circles on a white background."
    assert lines[3] == "The background is white."
    assert "[WARNING]" not in done.stdout
    assert done.stderr.count("[WARNING] Generating with a model that requires") == 1


def test_all_flags(run_main, picture: Path) -> None:
    flags = shlex.split(
        "--max-tokens 5 --temp 0.5 --top-p 0.9 --top-k 20 --min-p 0.1 --seed 1 --repetition-penalty 1.1 --no-verbose "
        "--kv-bits 8 --kv-group-size 64 --quantized-kv-start 0 --max-image-tiles 1 --system-prompt 'Answer briefly.'"
    )
    runs = [run_main(COMMAND[1], "--image", picture, *flags) for _ in range(2)]
    assert runs[0].returncode == 0
    assert runs[0].stdout == runs[1].stdout != "\n"


def test_bundled_images_are_answered_right(demo) -> None:
    """The file names contain the right answers."""
    for image in sorted(IMAGES.glob("[!.]*")):
        answer = generate(*demo, "What is this image?", image=image, temperature=0).lower()
        assert all(word in answer for word in image.stem.split("-")), (image.name, answer)


def test_help_loads_nothing_heavy(run_python) -> None:
    """This keeps it under 0.3 s."""
    for module in ("generate", "chat", "embed", "search", "convert"):
        code = f"import sys; from llama3v_mlx.{module} import main; heavy = {{'mlx', 'mlx_lm', 'numpy', 'PIL'}}"
        done = run_python("-c", f"{code} & {{*sys.modules}}; print(heavy or 'light'); main(['--help'])")
        assert done.returncode == 0
        assert done.stdout.startswith("light\nusage: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jpg", None, "no such file"),
        ("empty.png", b"", "the file is empty"),
        ("text.jpg", b"hello, I am text", "not an image"),
        (".", None, "is a folder"),
    ],
)
def test_bad_image_is_one_line(run_main, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    before = sorted(tmp_path.iterdir())
    done = run_main(COMMAND[1], "--image", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_bad_model_and_long_prompt_are_one_line(run_main, tmp_path: Path) -> None:
    for arguments, message in (
        (("--model", tmp_path, "--prompt", "Hi"), "has no config.json"),
        (("--prompt", "red " * 3000), "is too long for the context of 2048"),
    ):
        done = run_main(COMMAND[1], *arguments)
        errors = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
        assert (done.returncode, done.stdout) == (1, "")
        assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]


def test_debug_shows_the_traceback(run_main, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):  # which Python prints with its traceback, and exits with 1
        run_main(COMMAND[1], "--image", tmp_path / "gone.png", "--debug")


def test_an_image_from_stdin(run_main, picture: Path, tmp_path: Path) -> None:
    args = ("--image", "-", "--temp", "0", "--json")
    for more, stored in (((), 0), (("--features", tmp_path / "store"), 0), (("--features", tmp_path / "store"), 1)):
        done = run_main(COMMAND[1], *args, *more, input=picture.read_bytes())
        figures = json.loads(done.stdout)
        assert figures["text"] == "Three blue circles on a white background." and figures["images"] == ["-"]
        assert figures["stored_images"] == stored
    for data, message in ((b"", "the file is empty"), (b"%PDF-1.4", "is a PDF, not an image; pass the path")):
        done = run_main(COMMAND[1], "--image", "-", input=data)
        assert done.returncode == 1 and done.stderr.startswith(f"error: image data: {message}")
    for args in (("--image", "-", "--prompt", "-"), ("--image", "-", "-")):
        done = run_main(COMMAND[1], *args, input=picture.read_bytes())
        assert done.returncode == 2 and "only one of --image and --prompt can be -" in done.stderr


def test_usage_errors(run_main) -> None:
    for flags in ((), ("--prompt", "Hi", "--kv-bits", "7"), ("--prompt", "Hi", "--max-tokens", "0"), ("--nonsense",)):
        assert run_main(COMMAND[1], *flags).returncode == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seed", -1), ("--seed", 2**64), ("--temp", "inf"), ("--top-p", 2), ("--min-p", "nan"), ("--top-k", -3)],
)
def test_sampling_out_of_range(run_main, option: str, value) -> None:
    """An infinite temperature would also draw tokens that a schema does not allow."""
    done = run_main(COMMAND[1], "--prompt", "Hi", option, value)
    assert done.returncode == 2 and f"error: argument {option}" in done.stderr


def test_options_as_typed_for_mlx_vlm(run_main, picture: Path) -> None:
    """`--temperature`, `--verbose` and `--system`; a second --image adds to the first."""
    images = ("--image", picture, "--image", IMAGES / "42.png", IMAGES / "752.jpg")
    done = run_main(COMMAND[1], *images, "--temperature", "0", "--verbose", "--system", "x", "--max-tokens", "1")
    assert done.returncode == 0 and "Prompt: " in done.stdout
    done = run_main(COMMAND[1], *images, "--temp", "0", "--json")
    assert json.loads(done.stdout)["images"] == list(map(str, (picture, IMAGES / "42.png", IMAGES / "752.jpg")))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temp", "hot", "'hot' is not a number"),
        ("--max-tokens", "many", "'many' is not a whole number"),
        ("--quantized-kv-start", "-1", "-1 is below 0"),
    ],
)
def test_a_usage_error_is_two_lines(capsys, option: str, value: str, message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--prompt", "Hi", option, value])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: llama3v generate [") and error.endswith(message)


@pytest.mark.parametrize("option", ["--schema", "--adapter-path"])
def test_a_missing_file_is_named(run_main, tmp_path: Path, option: str) -> None:
    done = run_main(COMMAND[1], "--prompt", "Hi", option, tmp_path / "no")
    assert done.returncode == 1
    assert re.fullmatch(rf"error: {tmp_path}/no(/adapter_config.json)?: no such file", done.stderr.splitlines()[-1])


@pytest.mark.parametrize("option", ["--schema", "--draft-model"])
def test_an_empty_path_is_not_ignored(run_main, option: str) -> None:
    """As from a shell variable that is not set."""
    done = run_main(COMMAND[1], "--prompt", "Hi", option, "")
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_is_130(picture: Path) -> None:
    """Interrupt the command while it waits for the prompt on stdin, so that the timing is certain."""
    process = subprocess.Popen(
        [sys.executable, *COMMAND, "--image", picture, "--prompt", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b" " * 300_000)  # more than a pipe holds: returns once the other side is reading
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (130, b"")
    assert b"Traceback" not in err


def test_an_answer_is_printed_harmlessly(capsys: pytest.CaptureFixture) -> None:
    assert print_answer([SimpleNamespace(text="a\x1b[2J\n"), SimpleNamespace(text="\u202eb")], frame=False)
    assert capsys.readouterr().out == "a\\x1b[2J\n\\u202eb\n"


def test_a_pipe_is_no_image(tmp_path: Path, run_main) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    done = run_main("llama3v_mlx.generate", "--image", tmp_path / "pipe.png")
    assert (
        done.returncode == 1 and done.stderr == f"error: {tmp_path}/pipe.png: cannot be read (is not a regular file)\n"
    )

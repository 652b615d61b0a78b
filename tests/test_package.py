"""The installed package: its commands, its metadata, and that it imports only what it declares."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

import llama3v_mlx
from llama3v_mlx.__main__ import COMMANDS
from llama3v_mlx.demo import CHECKPOINT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = [name for name in COMMANDS if name != "mlx-lm"]
NOT_CONVERTED = "this checkpoint is not converted; llama3v convert --hf-path … --mlx-path … does it"
NO_STORE = "no such folder of pictures or feature store"
HEAVY = ("mlx.core", "mlx_lm", "numpy", "transformers", "PIL.Image")


def imported(folder: Path) -> set[str]:
    """Top-level names that the files of a folder import, anywhere in them."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def declared(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line)[0].lower() for line in requirements}


def test_imports_are_declared() -> None:
    """What the package imports is a dependency or belongs to an extra, and every dependency is imported."""
    packages = {"PIL": "pillow", "huggingface_hub": "huggingface-hub", "mlx_lm": "mlx-lm"}
    packages |= {"pillow_heif": "pillow-heif", "lmms_eval": "", "llama3v_mlx": ""}
    names = {packages.get(name, name) for name in imported(ROOT / "llama3v_mlx")} - {""}
    extras = declared([line for extra in PROJECT["optional-dependencies"].values() for line in extra])
    dependencies = declared(PROJECT["dependencies"])
    assert names <= dependencies | extras
    assert dependencies - {"pillow-heif"} <= names


@pytest.mark.parametrize("name", OURS)
def test_help_is_instant(run_main, name: str) -> None:
    """`--help` names the command as it is typed, and what takes its time to import is not imported for it."""
    done = run_main(f"llama3v_mlx.{name}", "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: llama3v {name} ")
    assert max(map(len, done.stdout.splitlines())) < 80 and done.stdout.isascii()  # in any terminal


def test_closed_streams_and_an_ascii_terminal() -> None:
    """What is printed lands on stdout, escaped, and no file in place of a closed stream."""
    printed = "'\\u2026', open(0).fileno(), sys.stderr.write('x')"
    code = f"import sys; from llama3v_mlx.cli import run; run(lambda: print({printed}))"
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" "$@" <&- 2>&-', sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "\\u2026 0 1\n")


def test_nothing_heavy_is_imported_for_help() -> None:
    modules = ", ".join(f"llama3v_mlx.{name}" for name in OURS)
    code = f"import sys, llama3v_mlx.__main__, {modules}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(HEAVY) & set(done.stdout.split())


def test_siglip_needs_no_mlx_lm() -> None:
    """Importing it, and transformers with it, takes most of a second: longer than a search of an unchanged folder."""
    code = "import sys, llama3v_mlx.features.library, llama3v_mlx.sheet; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"mlx_lm", "transformers"} & set(done.stdout.split())


def test_every_command_has_its_scripts() -> None:
    scripts = {"llama3v": "llama3v_mlx.__main__:main"}
    assert PROJECT["scripts"] == scripts | {f"llama3v.{name}": f"llama3v_mlx.{name}:main" for name in OURS}


def test_llama3v(run_main) -> None:
    def said(*args: str) -> tuple[int, str]:
        done = run_main("llama3v_mlx.__main__", *args)
        return done.returncode, done.stdout + done.stderr

    assert said("--version") == (0, f"llama3v-mlx {llama3v_mlx.__version__}\n")
    assert all(name in said("--help")[1] for name in COMMANDS)
    assert said()[0] == 2 and "commands:" in said()[1]
    assert said("genrate")[0] == 2 and "invalid choice: 'genrate'" in said("genrate")[1]
    code, text = said("search", "--help")
    assert code == 0 and text.startswith("usage: llama3v search ")
    assert said("search", "nowhere", "a red star") == (1, f"error: nowhere: {NO_STORE}\n")


def test_llama3v_mlx_lm(run_main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)

    def said(*args: str) -> tuple[int, str]:
        done = run_main("llama3v_mlx.__main__", "mlx-lm", *args)
        return done.returncode, done.stdout + done.stderr

    code, text = said("generate", "--help")
    assert code == 0 and "--max-tokens" in text
    assert said()[0] == 2 and said("frob")[0] == 2 and "mlx-lm has no such command" in said("frob")[1]
    generate = ("generate", "--prompt", "Hi", "--model")
    assert said(*generate, CHECKPOINT) == (1, f"error: {NOT_CONVERTED}\n")
    assert said("fuse")[0] == 2 and "without their vision part" in said("fuse")[1]

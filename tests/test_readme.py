"""What the README shows is what happens."""

import importlib
import re
import shlex
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = (ROOT / "tools" / "demo" / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a README's bash blocks, one line each."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    return re.sub(r"\\\n\s+", "", blocks).splitlines()


OURS = [line for line in commands(README) if line.startswith("llama3v ")]
# What these commands name is not in a clone: a download, or what an earlier one of them wrote.
ELSEWHERE = ("4bit", "google/", "openbmb/", "--model new")
HERE = [line for line in OURS if not any(name in line for name in ELSEWHERE)]
RECIPE = [line for line in commands(DEMO) if "world" in line or " mine" in line or "fresh" in line]


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(capsys: pytest.CaptureFixture, code: str) -> None:
    """Also where the command `llama3v_mlx.generate` has been imported: the function is what a user gets."""
    importlib.import_module("llama3v_mlx.generate")
    exec(code, {})
    assert "hree blue circles" in capsys.readouterr().out


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder that looks like the clone: what commands write stays out of that."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("llama3v_mlx", "tools"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def results(run_main, workplace: Path) -> dict[str, CompletedProcess]:
    """Of all commands, one after another: what one writes another reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        return {line: run_main("llama3v_mlx.__main__", *shlex.split(line)[1:]) for line in dict.fromkeys(HERE)}


@pytest.mark.parametrize("command", dict.fromkeys(HERE))
def test_commands_run(results: dict[str, CompletedProcess], command: str) -> None:
    assert results[command].returncode == 0, results[command].stderr


@pytest.mark.parametrize("command", [line for line in OURS if line not in HERE])
def test_other_commands_are_understood(run_main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str) -> None:
    """They end because something is not there (1), not because an option is wrong (2)."""
    monkeypatch.chdir(tmp_path)
    done = run_main("llama3v_mlx.__main__", *shlex.split(command)[1:])
    assert done.returncode == 1 and "error: " in done.stderr


def test_the_recipe_on_a_small_scale(run_main, run_python, monkeypatch, workplace: Path) -> None:
    """The commands of the recipe, with few rows and steps: what one writes is what the next one reads."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(workplace)
    for line in RECIPE:
        small = re.sub(r"--train \d+", "--train 24 --val 8", line.replace("--plot loss.png", ""))
        small = re.sub(r"--iters \d+", "--iters 2", small).replace("--batch-size 32", "--batch-size 8")
        program, *args = shlex.split(small + (" --count 5" if "evaluate" in line else ""))
        if "tools.demo.rows" in line:  # it forks, which this process should not
            run_python(*args, cwd=workplace).check_returncode()
            continue
        module, args = ("llama3v_mlx.__main__", args) if program == "llama3v" else (args[1], args[2:])
        done = run_main(module, *args)
        assert done.returncode == 0, (line, done.stderr)
    assert done.stdout.splitlines()[0].split()[:4] == ["all", done.stdout.split()[1], "of", "5"]


def test_quick_start_output_is_the_real_one(results: dict[str, CompletedProcess]) -> None:
    """But for the figures, which differ from run to run."""
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1].splitlines()
    real = (results[HERE[0]].stderr + results[HERE[0]].stdout).splitlines()
    assert [re.sub(r"[\d.]+", "0", line) for line in shown] == [re.sub(r"[\d.]+", "0", line) for line in real]


def test_files_that_the_readmes_name_exist() -> None:
    for name in re.findall(r"(?:llama3v_mlx|benchmarks|tools|tests)/[\w/.-]+\.\w+", README + DEMO):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_contents() -> None:
    """The README's contents name its sections, and it stays short."""
    headings = {
        f"#{re.sub('[^a-z ]', '', line.lower()).strip().replace(' ', '-')}"
        for line in re.findall(r"^## (.*)$", README, re.M)
    }
    assert headings == set(re.findall(r"\]\((#[\w-]+)\)", README))
    assert len(README.splitlines()) <= 250

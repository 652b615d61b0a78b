"""What the README shows is what happens."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# Commands that need no download and no other folder than the clone.
ALL_COMMANDS = re.findall(r"^llama3v \w+.*$", README, re.MULTILINE)
ELSEWHERE = ("4bit", "google/", "server", "--model new")
RECIPE = next(block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "demo.rows" in block)
COMMANDS = [line for line in ALL_COMMANDS if not any(name in line for name in ELSEWHERE) and line not in RECIPE]


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(run_python, code: str) -> None:
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "hree blue circles" in done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder for the commands one after another: what they write stays out of the clone."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "llama3v_mlx").symlink_to(ROOT / "llama3v_mlx")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(run_main, monkeypatch: pytest.MonkeyPatch, workplace: Path, command: str) -> None:
    monkeypatch.chdir(workplace)
    done = run_main(*shlex.split(command)[2:])
    assert done.returncode == 0, done.stderr


def test_the_recipe_on_a_small_scale(run_main, run_python, monkeypatch, workplace: Path) -> None:
    """The commands of the recipe, with few rows and steps: what one writes is what the next one reads."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(workplace)
    small = re.sub(r"--train \d+", "--train 24 --val 8", RECIPE.replace("\\\n", "").replace("--plot loss.png", ""))
    small = re.sub(r"--iters \d+", "--iters 2", small).replace("--batch-size 32", "--batch-size 8")
    rows, *others = small.splitlines()
    run_python(*shlex.split(rows)[1:], cwd=workplace).check_returncode()  # it forks, which this process should not
    for line in others:
        args = shlex.split(line + (" --count 5" if "demo.evaluate" in line else ""))
        module = "llama3v_mlx.convert" if args[1] == "convert.py" else args[2]
        done = run_main(module, *args[2 + (args[1] == "-m") :])
        assert done.returncode == 0, (line, done.stderr)
    assert done.stdout.splitlines()[0].split()[:4] == ["all", done.stdout.split()[1], "of", "5"]


def test_quick_start_output_is_the_real_one(run_python) -> None:
    """But for the figures, which differ from run to run."""
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1].splitlines()
    command = re.search(r"python (-m llama3v_mlx.generate --image \S+ --temp 0)$", README, re.MULTILINE)[1]
    done = run_python(*shlex.split(command))
    real = (done.stderr + done.stdout).splitlines()
    assert [re.sub(r"[\d.]+", "0", line) for line in shown] == [re.sub(r"[\d.]+", "0", line) for line in real]


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"(?:llama3v_mlx|benchmarks)/[\w/.-]+\.\w+", README):
        assert (ROOT / name).is_file(), name

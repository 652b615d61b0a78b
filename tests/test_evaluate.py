"""Benchmarks: the rules and reports, and (marked `eval`) lmms-eval itself on tiny copies of the five, and on the demo.

The marked ones need an environment with lmms-eval, whose Python LMMS_EVAL_PYTHON names.
"""

import contextlib
import http.server
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from llama3v_mlx import evaluate
from llama3v_mlx.demo import CHECKPOINT
from llama3v_mlx.evaluation.report import Scores, comparison, mcnemar, table
from llama3v_mlx.evaluation.tasks import extract
from llama3v_mlx.locks import hold

LMMS_EVAL = os.environ.get("LMMS_EVAL_PYTHON", sys.executable)


@pytest.mark.parametrize(("lost", "won", "p"), [(0, 0, 1), (3, 3, 1), (1, 0, 1), (0, 6, 0.03125), (2, 10, 0.0385742)])
def test_mcnemar(lost: int, won: int, p: float) -> None:
    """By hand: 2·(1 + 12 + 66)/2¹² for two against ten."""
    assert mcnemar(lost, won) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize(
    ("response", "kind", "answer_type", "extracted"),
    [
        ("(B) 8/11", "multi_choice", "text", "B"),
        ("B", "multi_choice", "text", "B"),
        ("The answer is C.", "multi_choice", "text", "C"),
        ("Not Osaka, it is tokyo", "multi_choice", "text", "tokyo"),
        ("There are 12 of 1,400.", "free_form", "integer", "1400"),
        ("about -0.5 m", "free_form", "float", "-0.5"),
        ("between [2006, 2007] and [2007, 2008]", "free_form", "list", "[2007, 2008]"),
        ("a triangle", "free_form", "text", "a triangle"),
        ("none", "free_form", "integer", "none"),
    ],
)
def test_answers_are_found(response: str, kind: str, answer_type: str, extracted: str) -> None:
    assert extract(response, kind, answer_type, ["hong kong", "osaka", "tokyo"]) == extracted


def test_reports() -> None:
    def scores(name: str, *right: float) -> Scores:
        answers = {i: (value, f"question {i}", f"{name} {i}", "truth") for i, value in enumerate(right)}
        return Scores(name, 0.5, 10.0, tokens=50, answers={"chartqa": answers})

    one, other = scores("one", 1, 1, 0, 0.7), scores("other", 1, 0, 0, 0)
    lines = table([one, other], ["chartqa"]).splitlines()
    assert lines[1].split() == ["chartqa", "4", "-", "67.5", "25.0"]
    assert [line.split()[-1] for line in lines[2:]] == ["0.500", "0.4", "5.0"]
    said = comparison(one, other, "chartqa").splitlines()
    assert said[0] == "chartqa: other lost 2 and won 0 against one; McNemar's p = 0.5"
    assert said[1] == "  lost: 'question 1': 'one 1' became 'other 1', right is 'truth'" and len(said) == 3


def test_bad_input(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    def said(*args: str) -> str:
        with pytest.raises(SystemExit) as end:
            evaluate.main([*args, "--output", str(tmp_path / "out")])
        assert end.value.code
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "'mmu_val' is not a task; close to it: mmmu_val" in said("--tasks", "demo_world,mmu_val")
    assert said("--lmms-eval", "/no/python").startswith("error: /no/python: not a Python interpreter")
    if importlib.util.find_spec("lmms_eval") is None:
        assert "pip install lmms-eval" in said("--lmms-eval", sys.executable)
    assert not (tmp_path / "out").exists()


SERVE = """
import os, signal
from llama3v_mlx.evaluate import served
with served("listening") as (server, port, said):
    print(server.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_one_evaluation_in_a_folder(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch) -> None:
    """The tasks and results of another must not be removed while it runs."""
    monkeypatch.setattr(evaluate, "find_harness", lambda python: tmp_path)
    (tmp_path / "out" / "tasks").mkdir(parents=True)
    held = hold(tmp_path / "out")
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(["--output", str(tmp_path / "out")])
    os.close(held)
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: is being written by another process\n"
    assert (tmp_path / "out" / "tasks").exists()


def test_a_server_ends_with_a_killed_command(run_python, tmp_path: Path) -> None:
    lines = "import socket, sys, time", "s = socket.create_server(('127.0.0.1', int(sys.argv[-1])))", "time.sleep(600)"
    (tmp_path / "listening.py").write_text("\n".join(lines))
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    done = run_python("-c", SERVE, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL, done.stderr
    # A zombie of a parent that reaps nothing has ended as well.
    state = Path(f"/proc/{done.stdout.strip()}/stat") if sys.platform == "linux" else None
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(int(done.stdout), 0)
            if state and state.read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.01)
    os.kill(int(done.stdout), signal.SIGKILL)
    pytest.fail("the server goes on")


# Rows by task: what is asked for, what the model says, and its score by the benchmark's published rule.
MMMU = {"options": "['red', 'green', 'blue']", "question_type": "multiple-choice"}
OPEN = {"options": "[]", "question_type": "open"}
CHOICE = {"question_type": "multi_choice", "answer_type": "text", "precision": None}
NUMBER = {"question_type": "free_form", "answer_type": "float", "precision": 1.0, "choices": None}
CITIES = {"choices": ["osaka", "tokyo", "kobe"]}
ROWS = {
    "mmmu_val": [  # the letter or the choice told; open: the number or the words
        ({**MMMU, "answer": "B"}, "B", 1),
        ({**MMMU, "answer": "C"}, "The answer is (C) blue.", 1),
        ({**MMMU, "answer": "B"}, "A", 0),
        ({**OPEN, "answer": "12"}, "It is 12", 1),
        ({**OPEN, "answer": "7"}, "3.5", 0),
    ],
    "mathvista_testmini": [  # the choice, or the number at the precision asked for
        ({**CHOICE, **CITIES, "answer": "tokyo"}, "(B)", 1),
        ({**CHOICE, **CITIES, "answer": "osaka"}, "It is kobe.", 0),
        ({**NUMBER, "answer": "0.6"}, "It is 0.58.", 1),
        ({**NUMBER, "answer_type": "integer", "answer": "14"}, "There are 14.", 1),
        ({**NUMBER, "answer_type": "list", "answer": "[1, 2]"}, "[1, 2]", 1),
        ({**NUMBER, "answer_type": "integer", "answer": "3"}, "None", 0),
    ],
    "ai2d": [  # the letter
        ({"options": ["leaf", "root", "stem"], "answer": "0"}, "A", 1),
        ({"options": ["leaf", "root", "stem"], "answer": "1"}, "B. root", 1),
        ({"options": ["leaf", "root", "stem"], "answer": "2"}, "c", 1),
        ({"options": ["leaf", "root", "stem"], "answer": "2"}, "B", 0),
        ({"options": ["leaf", "root", "stem"], "answer": "2"}, "It is the stem", 0),
    ],
    "chartqa": [  # within 5 % of a number, else the same text
        ({"type": "human_test", "answer": "10"}, "10.4", 1),
        ({"type": "human_test", "answer": "10"}, "10.6", 0),
        ({"type": "augmented_test", "answer": "Yes"}, "yes", 1),
        ({"type": "augmented_test", "answer": "0.5"}, "50%", 1),
        ({"type": "augmented_test", "answer": "Norway"}, "Sweden", 0),
    ],
    "docvqa_val": [  # 1 - edit distance / length of the longer, 0 below 0.5; the best of the answers
        ({"answers": ["Paris"]}, "paris", 1),
        ({"answers": ["Paris"]}, "Parish", 1 - 1 / 6),
        ({"answers": ["12 May", "May 12"]}, "may 12", 1),
        ({"answers": ["London"]}, "Rome", 0),
        ({"answers": ["1,000"]}, "1000", 1 - 1 / 5),
    ],
}
WRITE = """
import json, sys
from datasets import Dataset, Image
for name, rows in json.load(open(sys.argv[1])).items():
    data = Dataset.from_list(rows)
    for column in ("image", "image_1", "decoded_image"):
        if column in data.column_names:
            data = data.cast_column(column, Image())
    data.to_parquet(f"{sys.argv[2]}/{name}/rows.parquet")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory, circles) -> Path:
    """Tiny copies of the five, in their published columns."""
    folder = tmp_path_factory.mktemp("data")
    circles.resize((80, 60)).save(folder / "image.png")
    image, tables = str(folder / "image.png"), {}
    for task, rows in ROWS.items():
        (folder / task).mkdir()
        tables[task] = []
        for i, (row, _, _) in enumerate(rows):
            common = {"question": f"Question {i} of {task}?"}
            common |= {
                "mmmu_val": {"id": f"validation_Math_{i}", "question": f"Question {i} of {task}? <image 1>"},
                "mathvista_testmini": {"pid": str(i), "query": "", "unit": None, "metadata": {"split": "testmini"}},
                "docvqa_val": {"questionId": str(i)},
            }.get(task, {})
            column = {"mmmu_val": "image_1", "mathvista_testmini": "decoded_image"}.get(task, "image")
            tables[task].append({**common, column: image, **row})
    (folder / "tables.json").write_text(json.dumps(tables))
    command = [LMMS_EVAL, "-c", WRITE, str(folder / "tables.json"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@contextlib.contextmanager
def scripted(*_: str):
    """In the place of our server: one that says what `ROWS` has, so that scores are known."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            assert "data:image/" in asked
            known = [row[1] for task, rows in ROWS.items() for i, row in enumerate(rows) if f"{i} of {task}?" in asked]
            message = {"role": "assistant", "content": known[0]}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            body = {"id": "x", "object": "chat.completion", "created": 0, "model": "x", "choices": [choice]}
            sent = json.dumps({**body, "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield sleeper, server.server_port, []
    finally:
        sleeper.kill()
        sleeper.wait()
        server.shutdown()


class TestWithLmmsEval:
    pytestmark = pytest.mark.eval

    @pytest.fixture(autouse=True)
    def lmms_eval(self) -> None:
        script = "import importlib.util as u, sys; sys.exit(u.find_spec('lmms_eval') is None)"
        if subprocess.run([LMMS_EVAL, "-c", script]).returncode:
            pytest.skip(f"{LMMS_EVAL} has no lmms-eval")

    def test_scores_are_those_of_the_published_rules(self, data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
        monkeypatch.setattr(evaluate, "served", scripted)
        out = ["--output", str(tmp_path / "out"), "--lmms-eval", os.path.relpath(LMMS_EVAL, data.parent)]
        out += ["--plot", str(tmp_path / "bars.png")]
        monkeypatch.chdir(data.parent)  # as the README has it, paths start from here
        evaluate.main(["--tasks", ",".join(ROWS), "--data", data.name, *out])
        lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
        for task, rows in ROWS.items():
            assert lines[task][1] == str(len(rows))
            assert float(lines[task][-1]) == pytest.approx(100 * sum(row[2] for row in rows) / len(rows), abs=0.06), (
                task
            )
        assert lines["mmmu_val"][2] == "45.8" and (tmp_path / "bars.png").stat().st_size > 5000

    def test_the_demo_world(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        pytest.importorskip("sklearn")
        from llama3v_mlx.convert import convert
        from tools.demo.evaluate import evaluate as directly
        from tools.demo.evaluate import write_questions

        convert(CHECKPOINT, tmp_path / "q4", quantize=True)
        models = ["--model", str(CHECKPOINT), str(tmp_path / "q4")]
        write_questions(tmp_path / "world", 20)
        asked = ["--tasks", "demo_world", "--data", str(tmp_path / "world")]
        evaluate.main([*models, *asked, "--output", str(tmp_path / "out"), "--lmms-eval", LMMS_EVAL])
        said = capsys.readouterr().out
        right = [directly(model, 20)["all"][0] for model in models[1:]]
        assert next(line.split()[-2:] for line in said.splitlines() if line.startswith("demo_world")) == [
            f"{100 * n / 20:.1f}" for n in right
        ]
        assert "demo_world: q4 lost " in said and "McNemar" in said

    def test_a_server_that_dies(self, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
        pytest.importorskip("sklearn")
        from tools.demo.evaluate import write_questions

        served, audit = evaluate.served, tmp_path / "out" / "1-checkpoint" / "cache"

        @contextlib.contextmanager
        def mortal(*command: str):
            with served(*command) as (server, port, said):

                def kill() -> None:
                    while not any(path.stat().st_size for path in audit.rglob("*.jsonl")):
                        time.sleep(0.01)
                    server.kill()

                threading.Thread(target=kill, daemon=True).start()
                yield server, port, said

        write_questions(tmp_path / "world", 40)
        command = ["--tasks", "demo_world", "--data", str(tmp_path / "world"), "--concurrency", "1"]
        command += ["--output", str(tmp_path / "out"), "--lmms-eval", LMMS_EVAL]
        monkeypatch.setattr(evaluate, "served", mortal)
        with pytest.raises(SystemExit):
            evaluate.main(command)
        assert "died" in capsys.readouterr().err
        monkeypatch.setattr(evaluate, "served", served)
        evaluate.main(command)
        assert "demo_world                  40" in capsys.readouterr().out

    def test_data_in_another_schema(self, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        def said(task: str, folder: Path) -> str:
            options = ["--data", str(folder), "--output", str(tmp_path / "out"), "--lmms-eval", LMMS_EVAL]
            with pytest.raises(SystemExit):
                evaluate.main(["--tasks", task, *options])
            return capsys.readouterr().err

        assert "tools.demo.evaluate --write" in said("demo_world", tmp_path)
        assert "has no .parquet files of ai2d" in said("ai2d", tmp_path)
        (tmp_path / "chartqa").mkdir()
        (tmp_path / "chartqa" / "a.parquet").write_bytes((data / "ai2d" / "rows.parquet").read_bytes())
        assert "has no column type, which chartqa's published data have" in said("chartqa", tmp_path)
        (tmp_path / "chartqa" / "a.parquet").write_bytes(b"no parquet")
        assert "not a parquet file" in said("chartqa", tmp_path)

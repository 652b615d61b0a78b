"""Score checkpoints on the original README's benchmarks: `llama3v evaluate --model DIR [DIR…] --tasks …`.

lmms-eval runs them, in an environment of its own, against `llama3v server`.
"""

import argparse
import contextlib
import difflib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .cli import FOLLOWING, check_plot, positive, run
from .demo import CHECKPOINT
from .evaluation.report import BENCHMARKS, PREFIX, Scores, comparison, plot, read_results, table
from .files import list_folder
from .locks import hold

INSTALL = "python3 -m venv lmms && lmms/bin/pip install lmms-eval==0.7.3 'filelock<4', then --lmms-eval lmms/bin/python"
# All but the bundled model's own benchmark.
PUBLISHED = [task for task in BENCHMARKS if task != "demo_world"]
SCORING = Path(__file__).parent / "evaluation" / "tasks.py"


class EvaluationError(ValueError):
    """Raised when an evaluation cannot run or did not finish."""


def evaluate(args: argparse.Namespace) -> None:
    """Write the tasks, run lmms-eval against each checkpoint, and print the report."""
    # lmms-eval runs in --output, so relative paths must be absolute; links to a Python must stay, or a venv is lost.
    args.lmms_eval = os.path.abspath(shutil.which(args.lmms_eval) or args.lmms_eval)
    args.data = args.data and os.path.abspath(args.data)
    if args.plot:
        check_plot(args.plot)
    harness = find_harness(args.lmms_eval)
    out = Path(args.output).absolute()
    out.mkdir(parents=True, exist_ok=True)
    held = hold(out)
    try:
        write_tasks(out / "tasks", args, harness)
        folders = [out / f"{i}-{Path(model).name}" for i, model in enumerate(args.model, 1)]
        results = [score(*pair, out / "tasks", args) for pair in zip(args.model, folders, strict=True)]
    finally:
        os.close(held)
    print(table(results, args.tasks))
    for other in results[1:]:
        for task in args.tasks:
            print(comparison(results[0], other, task))
    if args.plot:
        plot(results, args.tasks, args.plot)
    if failed := sum(scores.failed for scores in results):
        raise EvaluationError(f"{failed} requests failed and count as wrong; {out} has the samples")


def find_harness(python: str) -> Path:
    """lmms-eval's tasks folder in an interpreter's environment."""
    script = "import importlib.util as u; print(u.find_spec('lmms_eval').submodule_search_locations[0])"
    try:
        done = subprocess.run([python, "-c", script], capture_output=True, text=True)
    except OSError as e:
        raise EvaluationError(f"{python}: not a Python interpreter ({e.strerror}); {INSTALL}") from e
    if done.returncode:
        raise EvaluationError(f"{python} has no lmms-eval; install it by: {INSTALL}")
    return Path(done.stdout.strip()) / "tasks"


def write_tasks(folder: Path, args: argparse.Namespace, harness: Path) -> None:
    """Write task files for lmms-eval: its own, included, with our scoring where it pays a judge, and local data.

    Raises:
        EvaluationError: if a benchmark's data are missing, or not in the published schema.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copyfile(SCORING, folder / "scoring.py")
    for task in args.tasks:
        benchmark = BENCHMARKS[task]
        lines = [f"include: {harness / benchmark.included}\n"] if benchmark.included else []
        lines += [f"task: {PREFIX}{task}\n", benchmark.more]
        if task == "demo_world":
            questions = Path(args.data or "", task, "test.jsonl")
            if args.data is None or not questions.is_file():
                raise EvaluationError(
                    f"{questions}: no such file; in a clone, python -m tools.demo.evaluate --write DIR writes the "
                    "questions of demo_world, then --data DIR"
                )
            lines.append(dataset("json", [questions], "test"))
        elif args.data is not None:
            files = list_folder(Path(args.data, task), "*.parquet")
            if not files:
                raise EvaluationError(f"{Path(args.data, task)}: has no .parquet files of {task}")
            check_columns(files[0], task, args.lmms_eval)
            lines.append(dataset("parquet", files, benchmark.split))
        (folder / f"{task}.yaml").write_text("".join(lines), encoding="utf-8")


def dataset(kind: str, files: list[Path], split: str) -> str:
    named = json.dumps({"data_files": {split: [str(path) for path in files]}})
    return f"dataset_path: {kind}\ndataset_name: null\ndataset_kwargs: {named}\n"


def check_columns(path: Path, task: str, python: str) -> None:
    script = "import json, sys, pyarrow.parquet as p; print(json.dumps(p.read_schema(sys.argv[1]).names))"
    done = subprocess.run([python, "-c", script, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise EvaluationError(f"{path}: not a parquet file ({done.stderr.strip().splitlines()[-1]})")
    if missing := [name for name in BENCHMARKS[task].columns if name not in json.loads(done.stdout)]:
        raise EvaluationError(f"{path}: has no column {', '.join(missing)}, which {task}'s published data have")


@contextlib.contextmanager
def served(*command: str | Path, **options) -> Iterator[tuple[subprocess.Popen, int, list[str]]]:
    """Start `python -m COMMAND…`, a server, on a free port of 127.0.0.1; yield process, port and lines of stderr.

    It ends with this process, even if that is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", FOLLOWING, *map(str, command), "--port", str(port)]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    server = subprocess.Popen(command, text=True, **streams, **options)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(iter(server.stderr.readline, "")), daemon=True)
    reader.start()
    try:
        while server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield server, port, said
    finally:
        server.terminate()
        server.wait()
        server.stdin.close()
        reader.join()


def score(model: str, out: Path, tasks: Path, args: argparse.Namespace) -> Scores:
    """Run lmms-eval against a served checkpoint; answers of an earlier run are reused.

    Raises:
        EvaluationError: if the server or lmms-eval dies.
    """
    out.mkdir(exist_ok=True)
    fresh = not (out / "cache").exists()
    names = ",".join(PREFIX + task for task in args.tasks)
    command = [args.lmms_eval, "-c", FOLLOWING, "lmms_eval", "--model", "openai", "--tasks", names]
    command += ["--include_path", str(tasks), "--output_path", str(out / "results"), "--log_samples"]
    command += ["--use_cache", str(out / "cache"), "--verbosity", "ERROR"]
    command += ["--limit", str(args.limit)] if args.limit else []
    shutil.rmtree(out / "results", ignore_errors=True)
    with (
        served("llama3v_mlx.server", "--model", model) as (server, port, said),
        (out / "lmms-eval.log").open("w") as log,
    ):
        options = {"model": Path(model).name, "base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none"}
        options |= {"num_concurrent": args.concurrency, "timeout": 600, "httpx_trust_env": False}
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in options.items())]
        # Its judges need a key even if unused; with this address no request can leave the machine.
        env = {**os.environ, "OPENAI_API_KEY": "none", "OPENAI_BASE_URL": options["base_url"]}
        env |= {"HF_HUB_OFFLINE": "1"} if args.data else {}
        streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
        harness = subprocess.Popen(command, cwd=out, env=env, **streams)
        try:
            while harness.poll() is None and server.poll() is None:
                time.sleep(0.1)
            if server.poll() is not None:
                reason = "".join(said).strip().splitlines()[-1:] or [f"exit code {server.returncode}"]
                raise EvaluationError(f"the server of {model} died: {reason[0]}; its answers so far are in {out}")
        finally:
            harness.terminate()
            harness.wait()
            harness.stdin.close()
    if harness.returncode or not list_folder(out / "results", "**/*_results.json"):  # it may fail with status 0
        reason = re.findall(
            r"Error during evaluation: (.*?)\.* Please set",
            (out / "lmms-eval.log").read_text(encoding="utf-8", errors="replace"),
        )
        raise EvaluationError(f"lmms-eval failed on {model}: {' '.join(reason)} ({out / 'lmms-eval.log'})")
    return read_results(model, out / "results", args.tasks, fresh)


def task_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, cutoff=0.4) or list(BENCHMARKS)
            raise argparse.ArgumentTypeError(f"{name!r} is not a task; close to it: {', '.join(near)}")
    return names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="llama3v evaluate",
        usage="llama3v evaluate --model MODEL ... --lmms-eval PYTHON [options]",
        description="Score checkpoints on benchmarks with lmms-eval, which runs in an environment of its own.",
    )
    parser.add_argument("--model", nargs="+", default=[str(CHECKPOINT)], help="checkpoints (default: the bundled demo)")
    parser.add_argument(
        "--tasks",
        type=task_names,
        default=PUBLISHED,
        help=f"some of {', '.join(BENCHMARKS)} (default: the published five)",
    )
    parser.add_argument("--data", metavar="DIR", help="local data, DIR/TASK/*.parquet as published, instead of the Hub")
    parser.add_argument("--limit", type=positive, help="questions per task (default: all)")
    parser.add_argument("--concurrency", type=positive, default=8, help="requests at once (default: 8)")
    parser.add_argument(
        "--lmms-eval", default=sys.executable, metavar="PYTHON", help="Python interpreter that has lmms-eval"
    )
    parser.add_argument(
        "--output", default="evaluation", metavar="DIR", help="folder of samples and logs (default: evaluation)"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw the scores; needs matplotlib")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    args = parser.parse_args(argv)
    run(lambda: evaluate(args), args.debug, awake=True)


if __name__ == "__main__":
    main()

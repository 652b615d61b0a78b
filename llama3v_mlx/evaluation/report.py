"""Benchmarks and reports of scores: tables, comparisons, bar charts."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

RIGHT = 0.5  # lowest score that counts as right when checkpoints are compared
FAILED = "[LMMS_EVAL_REQUEST_FAILED"  # lmms-eval's substitute for a missing answer
PREFIX = "llama3v_"  # of our task names, because lmms-eval has tasks of the same names
TEST = "doc_to_text: question\ndoc_to_target: answer\ntest_split: test\noutput_type: generate_until\n"


@dataclass(frozen=True)
class Benchmark:
    """One of lmms-eval's tasks and our changes to it."""

    included: str | None  # task file in lmms-eval's tasks folder; None: entirely ours
    metric: str  # name of the score in results and samples
    split: str = "test"
    columns: tuple[str, ...] = ()  # required columns of the published data
    more: str = ""  # further lines of our task file
    published: float | None = None  # percent, MiniCPM-Llama3-V-2.5's authors (arXiv 2408.01800)


SCORED = (
    "process_results: !function scoring.{}\n"
    "metric_list:\n- {{metric: score, aggregation: mean, higher_is_better: true}}\n"
)
BENCHMARKS = {
    "demo_world": Benchmark(
        None,
        "score",
        more=f"{TEST}doc_to_visual: !function scoring.demo_visual\n"
        "generation_kwargs: {max_new_tokens: 40, temperature: 0, do_sample: false}\n" + SCORED.format("demo"),
    ),
    "mmmu_val": Benchmark(
        "mmmu/mmmu_val.yaml",
        "score",
        "validation",
        ("id", "question", "options", "answer", "question_type", "image_1"),
        SCORED.format("mmmu"),
        45.8,
    ),
    "mathvista_testmini": Benchmark(
        "mathvista/mathvista_testmini_format.yaml",
        "score",
        "testmini",
        ("pid", "question", "decoded_image", "choices", "answer", "question_type", "answer_type", "precision"),
        "generation_kwargs: {max_new_tokens: 512, temperature: 0, do_sample: false}\n" + SCORED.format("mathvista"),
        54.3,
    ),
    "ai2d": Benchmark("ai2d/ai2d.yaml", "exact_match", "test", ("question", "options", "answer", "image")),
    "chartqa": Benchmark("chartqa/chartqa.yaml", "relaxed_overall", "test", ("type", "question", "answer", "image")),
    "docvqa_val": Benchmark(
        "docvqa/docvqa_val.yaml", "anls", "validation", ("questionId", "question", "image", "answers")
    ),
}


@dataclass
class Scores:
    """Scores of one checkpoint."""

    name: str
    gigabytes: float
    seconds: float = 0.0  # duration of lmms-eval's evaluation; 0 if answers were reused
    tokens: int = 0
    failed: int = 0
    # By task and question number: score, question, answer, right answer.
    answers: dict[str, dict[int, tuple[float, str, str, str]]] = field(default_factory=dict)

    def percent(self, task: str) -> float:
        scores = [answer[0] for answer in self.answers[task].values()]
        return 100 * sum(scores) / len(scores)


def read_results(model: str, folder: Path, tasks: list[str], fresh: bool) -> Scores:
    """Read lmms-eval's log of every question."""
    from ..checkpoint import find_checkpoint
    from ..files import list_folder

    weights = sum(path.stat().st_size for path in list_folder(find_checkpoint(model), "*.safetensors"))
    (summary,) = list_folder(folder, "**/*_results.json")
    seconds = float(json.loads(summary.read_text(encoding="utf-8"))["total_evaluation_time_seconds"]) if fresh else 0.0
    scores = Scores(Path(model).name, weights / 1e9, seconds)
    for task in tasks:
        rows = [
            json.loads(line)
            for path in list_folder(folder, f"**/*_samples_{PREFIX}{task}.jsonl")
            for line in path.open(encoding="utf-8")
        ]
        metric = BENCHMARKS[task].metric
        answers = {
            r["doc_id"]: (float(r[metric]), r["input"], said(r["filtered_resps"]), str(r["target"])) for r in rows
        }
        scores.answers[task] = dict(sorted(answers.items()))
        scores.failed += sum(answer[2].startswith(FAILED) for answer in answers.values())
        scores.tokens += sum(count["output_tokens"] for r in rows for count in r["token_counts"] or () if count)
    return scores


def said(responses: str | list) -> str:
    return responses if isinstance(responses, str) else str(responses[0])


def table(results: list[Scores], tasks: list[str]) -> str:
    """Table of scores in percent beside the published ones, with size and speed of each checkpoint."""
    width = max(10, *(len(scores.name) for scores in results))
    line = f"{{:20}} {{:>9}} {{:>9}}  {'  '.join([f'{{:>{width}}}'] * len(results))}"
    lines = [line.format("task", "questions", "published", *(scores.name for scores in results))]
    for task in tasks:
        count, published = len(results[0].answers[task]), BENCHMARKS[task].published
        percents = (f"{scores.percent(task):.1f}" for scores in results)
        lines.append(line.format(task, count, published or "-", *percents))
    for name, figures in (
        ("GB of weights", [f"{scores.gigabytes:.3f}" for scores in results]),
        ("questions/s", [rate(sum(map(len, scores.answers.values())), scores.seconds) for scores in results]),
        ("tokens/s", [rate(scores.tokens, scores.seconds) for scores in results]),
    ):
        lines.append(line.format(name, "", "", *figures))
    return "\n".join(lines)


def rate(count: int, seconds: float) -> str:
    return f"{count / seconds:.1f}" if seconds else "-"


def comparison(one: Scores, other: Scores, task: str) -> str:
    """List the questions that only one of two checkpoints answered rightly, with the p-value of McNemar's test."""
    pairs = [(one.answers[task][i], other.answers[task][i]) for i in one.answers[task].keys() & other.answers[task]]
    lost = [(a, b) for a, b in pairs if a[0] >= RIGHT > b[0]]
    won = [(a, b) for a, b in pairs if b[0] >= RIGHT > a[0]]
    p = mcnemar(len(lost), len(won))
    lines = [f"{task}: {other.name} lost {len(lost)} and won {len(won)} against {one.name}; McNemar's p = {p:.3g}"]
    for word, changed in (("lost", lost), ("won", won)):
        lines += [f"  {word}: {a[1]!r}: {a[2]!r} became {b[2]!r}, right is {a[3]!r}" for a, b in changed]
    return "\n".join(lines)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p-value of McNemar's test (a binomial test of `lost` against `won` at 1/2)."""
    n, k = lost + won, min(lost, won)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def plot(results: list[Scores], tasks: list[str], picture: str) -> None:
    """Draw a bar chart of all scores, the published ones first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    published = [BENCHMARKS[task].published or 0 for task in tasks]
    bars = [("published", published)] if any(published) else []
    bars += [(scores.name, [scores.percent(task) for task in tasks]) for scores in results]
    figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(tasks), 4), layout="constrained")
    for i, (name, heights) in enumerate(bars):
        drawn = axes.bar(
            [t + 0.8 * (i / len(bars) - 0.5) for t in range(len(tasks))], heights, 0.8 / len(bars), label=name
        )
        axes.bar_label(drawn, [f"{h:.1f}" if h else "" for h in heights], fontsize=8)
    axes.set(ylabel="percent", ylim=(0, 105))
    axes.set_xticks(range(len(tasks)), tasks)
    figure.legend(loc="outside upper left", ncols=3)
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)

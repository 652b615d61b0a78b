"""Passes through Llama per token with drafts, on the demo's world; `generate.py` runs it.

Three sets, in which drafts find more or less:

- `json`: an image is described in words, then asked for as JSON of a schema (the demo learned neither JSON nor to
  copy, so fewer n-grams are found than a larger model would give);
- `repeated`: a question that was answered before in the conversation;
- `plain`: single questions, whose answers are nowhere in the prompt.

Passes per token do not depend on the hardware. What they save does: by published measurements, a pass of four tokens
takes 1.14 to 3.3 times as long as a pass of one on Macs. A chip's seconds are estimated at both bounds.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from llama3v_mlx import stream_generate
from llama3v_mlx.checkpoint import read_tensors
from llama3v_mlx.demo import CHECKPOINT
from llama3v_mlx.drafting.draft_model import load_draft_model

GREEDY = {"temperature": 0, "repetition_penalty": 1, "max_tokens": 64}
FOUR_TOKENS = (1.14, 3.3)  # seconds of a pass of four tokens over those of one, the fastest and the slowest published
# Published memory bandwidth in GB/s over the bytes of Llama-3-8B in 4 bits that a token reads: at best tokens/s.
BYTES = 4.22e9
BANDWIDTH = {"M2": 100, "M2 Pro": 200, "M2 Max": 400, "M3": 100, "M3 Pro": 150, "M3 Max": 400}
BANDWIDTH |= {"M4": 120, "M4 Pro": 273, "M4 Max": 546, "M5": 153, "M5 Pro": 307, "M5 Max": 614}
SCHEMA = {
    "type": "object",
    "properties": {
        "description": {"type": "string", "pattern": "^[A-Z][a-z ]{8,60}\\.$"},
        "background": {"type": "string", "pattern": "^The background is [a-z]+\\.$"},
    },
    "required": ["description", "background"],
    "additionalProperties": False,
}


def questions(count: int) -> Iterator[tuple[str, list[dict], dict]]:
    """(set, messages, options) of `count` held-out pictures of each set."""
    from tools.demo.evaluate import held_out

    for _, image, _, question, answer in held_out(count):
        asked = [{"role": "user", "content": [image, question]}]
        again = [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        yield "plain", asked, {}
        yield "repeated", again, {}
        as_json = [*again[:2], {"role": "user", "content": "The same as JSON."}]
        yield "json", as_json, {"schema": SCHEMA}


def blind_llama(folder: Path) -> None:
    """Write the demo's Llama in Hugging Face's layout: a draft model of the same vocabulary that sees no image."""
    tensors = {n.removeprefix("llm."): t for n, t in read_tensors(CHECKPOINT).items() if n.startswith("llm.")}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("vision_config", "slice_config", "query_num")}
    (folder / "config.json").write_text(json.dumps({**kept, "model_type": "llama"}))
    (folder / "tokenizer.json").write_bytes((CHECKPOINT / "tokenizer.json").read_bytes())


def measure(model, processor, count: int) -> list[dict]:
    """Figures of each set with each kind of drafts; answers are checked to be the same tokens."""
    with tempfile.TemporaryDirectory() as temporary:
        blind_llama(Path(temporary))
        small = load_draft_model(temporary, processor, model.language_model.args.vocab_size)
    kinds: dict[str, dict] = {"none": {"draft": None}, "n-grams and schema": {}}
    kinds["draft model"] = {"draft": None, "draft_model": small}
    kinds["all"] = {"draft_model": small}
    rows: dict[tuple[str, str], dict] = {}
    for name, messages, options in questions(count):
        try:
            expected = None
            for kind, drafts in kinds.items():
                answer = _answer(model, processor, messages, {**options, **drafts})
                expected = expected or answer["tokens"]
                row = rows.setdefault((name, kind), {"set": name, "drafts": kind, "differ": 0, "answers": []})
                row["differ"] += answer["tokens"] != expected
                row["answers"].append(answer)
        except ValueError as e:  # no llguidance
            rows[name, "none"] = {"set": name, "drafts": "none", "missing": str(e)}
    return [_summary(row) for row in rows.values()]


def _answer(model, processor, messages: list[dict], options: dict) -> dict:
    """Tokens, passes and times of an answer; without drafts at all for `draft=None`."""
    start, cpu = time.perf_counter(), time.process_time()
    first = 0.0
    tokens, blocks = [], []
    for response in stream_generate(model, processor, messages, **GREEDY, **options):
        first = first or time.perf_counter() - start
        tokens.append(response.token)
        blocks.append(response.passes)
    end = time.perf_counter()
    return {
        "tokens": tokens,
        "passes": response.passes,
        "first_token_seconds": first,
        "seconds": end - start - first,
        "cpu_seconds": time.process_time() - cpu,
        "sizes": [blocks.count(number) for number in sorted(set(blocks))],
    }


def _summary(row: dict) -> dict:
    if "missing" in row:
        return row
    answers = row.pop("answers")
    tokens, passes = (sum(len(a["tokens"]) for a in answers), sum(a["passes"] for a in answers))
    row |= {"tokens": tokens, "passes": passes, "passes_per_token": passes / tokens}
    row["first_token_seconds"] = statistics.median(a["first_token_seconds"] for a in answers)
    row["tokens_per_second"] = (tokens - len(answers)) / sum(a["seconds"] for a in answers)
    row["cpu_seconds_per_token"] = sum(a["cpu_seconds"] for a in answers) / tokens
    # A pass that added tokens from a draft read about as many; at the two published bounds of what these cost.
    single = sum(size == 1 for a in answers for size in a["sizes"])
    row["time_per_token"] = [(single + (passes - single) * each) / tokens for each in FOUR_TOKENS]
    return row


def say_estimates(rows: list[dict], say) -> None:
    """Print the estimated seconds of 100 tokens on Macs, at both bounds of a four-token pass."""
    say("estimated seconds for 100 tokens of Llama-3-8B in 4 bits, at best (bandwidth); not measured on a Mac;")
    say(f"drafts at {FOUR_TOKENS[0]} to {FOUR_TOKENS[1]} single passes for a pass of four tokens, without adapting:")
    chosen = {r["set"]: r["time_per_token"] for r in rows if r["drafts"] == "n-grams and schema" and "tokens" in r}
    say(f"{'':8}{'no drafts':>10}" + "".join(f"{name:>16}" for name in chosen))
    for chip, rate in BANDWIDTH.items():
        plain = 100 * BYTES / rate / 1e9
        cells = "".join(f"{f'{plain * low:.1f} to {plain * high:.1f}':>16}" for low, high in chosen.values())
        say(f"{chip:8}{plain:10.1f}{cells}")


def say_rows(rows: list[dict], say) -> None:
    say(f"{'set':10}{'drafts':20}{'tokens':>7}{'passes':>7}{'per token':>10}{'first s':>9}{'tokens/s':>9}{'differ':>7}")
    for row in rows:
        if "missing" in row:
            say(f"{row['set']:10}not measured: {row['missing']}")
            continue
        say(
            f"{row['set']:10}{row['drafts']:20}{row['tokens']:7}{row['passes']:7}{row['passes_per_token']:10.2f}"
            f"{row['first_token_seconds']:9.3f}{row['tokens_per_second']:9.1f}{row['differ']:7}"
        )

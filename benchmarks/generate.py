"""Time to the first token and tokens per second, with and without each lane: ours beside mlx-lm and mlx-vlm.

    python benchmarks/generate.py                  # the demo, and two layers of Llama-3-8B's width
    python benchmarks/generate.py --layers 32      # a whole Llama-3-8B of random weights (16 GB in half precision)
    python benchmarks/generate.py --drafts 100     # and what drafts save on 100 pictures of each set, see drafts.py

All have the same Llama with the same weights, and write equally many tokens, greedily and in turn; medians. Ours reads
an image and a question. mlx-lm and mlx-vlm (where it is installed) read as many tokens of text: neither has this tower
and resampler, whose time is in our first token and not in theirs, so compare prefills; mlx-vlm's tower is compared by
embed.py. The last line is one JSON object.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from embed import machine, say  # first: it loads OpenBLAS before MLX

# isort: split
import drafts
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache
from train import LLAMA_8B

from llama3v_mlx import load, stream_generate
from llama3v_mlx.demo import CHECKPOINT, IMAGES
from llama3v_mlx.models.llama3v import Model, ModelArgs

sys.path.append(str(Path(__file__).parents[1]))  # for tools.demo
STREAMS = [mx.default_stream(mx.default_device()), generation_stream]
IMAGE = IMAGES / "two-red-stars.jpg"
QUESTION = "What is this image? " + "Describe the image in one sentence. " * 8
KV = {"kv_bits": 8, "kv_group_size": 64, "quantized_kv_start": 0}


@dataclass(frozen=True)
class Lane:
    """Way to generate; `peers` are their arguments, None if they have no such lane."""

    name: str
    ours: dict
    peers: dict | None
    quantized: bool = False


LANES = (
    Lane("plain", {"draft": None}, {}),
    Lane("with drafts", {}, None),
    Lane("8-bit cache", {"draft": None, **KV}, KV),
    Lane("4-bit Llama", {"draft": None}, {}, quantized=True),  # last: the weights are replaced
)


def wide(small: Model, layers: int, dtype: mx.Dtype) -> Model:
    """Llama-3-8B's width with random weights behind the demo's tower."""
    args = small.args
    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type=args.model_type,
            text_config={**args.text_config, **LLAMA_8B, "num_hidden_layers": layers},
            vision_config=args.vision_config,
            projector_config={**args.projector_config, "hidden_size": 4096, "num_attention_heads": 32},
            prompt_tokens=args.prompt_tokens,
            image_config=args.image_config,
        )
    )
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def never(tokens: list[int]):
    """Logits processor that bans `tokens`, so that every answer reaches its full length."""

    def process(_, logits: mx.array) -> mx.array:
        logits[:, tokens] = -mx.inf
        return logits

    return process


def timed(answer: Iterable[int]) -> dict:
    """The tokens of an answer, seconds to the first one, and tokens per second after it."""
    for stream in STREAMS:  # the answer before has begun a token that nobody needs
        mx.synchronize(stream)
    start, times, tokens = time.perf_counter(), [], []
    for token in answer:
        times.append(time.perf_counter())
        tokens.append(token)
    return {
        "tokens": tokens,
        "first_token_seconds": times[0] - start,
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]),
    }


def ours(model: Model, processor, options: dict) -> dict:
    response = None

    def answer() -> Iterator[int]:
        nonlocal response
        for response in stream_generate(model, processor, QUESTION, str(IMAGE), temperature=0, **options):
            yield response.token

    figures = timed(answer())
    for name in ("preprocess_seconds", "vision_seconds", "prefill_seconds"):
        figures[name] = getattr(response, name)
    return figures | {"passes_per_token": response.passes / len(figures["tokens"])}


def mlx_vlm_llama(llama: nn.Module) -> Callable[[mx.array, dict], Iterator[int]]:
    """Token generator of mlx-vlm's Llama with the weights of mlx-lm's; ImportError if it is not installed."""
    from mlx_vlm.generate import generate_step, wired_limit
    from mlx_vlm.generate.common import generation_stream as their_stream
    from mlx_vlm.models.llama import Model as Theirs
    from mlx_vlm.models.llama import ModelConfig

    model = Theirs(ModelConfig.from_dict(vars(llama.args)))
    tensors = {f"language_model.{name}": tensor for name, tensor in tree_flatten(llama.parameters())}
    nn.quantize(model, 64, 4, class_predicate=lambda path, _: f"{path}.scales" in tensors)
    model.load_weights(list(tensors.items()))
    model.eval()
    if their_stream not in STREAMS:
        STREAMS.append(their_stream)

    def answer(ids: mx.array, options: dict) -> Iterator[int]:
        with wired_limit(model):
            for token, _ in generate_step(ids[None], model, None, None, temperature=0, **options):
                yield token

    return answer


def follow_up(model: Model, processor, options: dict) -> tuple[float, int]:
    """Seconds to the first token of a second question, and its tokens, which alone are read."""
    cache = make_prompt_cache(model)
    list(stream_generate(model, processor, QUESTION, str(IMAGE), temperature=0, prompt_cache=cache, **options))
    ids = processor.encode([{"role": "user", "content": "What color is the background?"}]).ids[1:]
    answer = stream_generate(model, processor, ids, temperature=0, prompt_cache=cache, **options)
    return timed(response.token for response in itertools.islice(answer, 2))["first_token_seconds"], len(ids)


def measure(name: str, model: Model, processor, length: int, repeats: int) -> list[dict]:
    """Median figures of each lane and each contender."""
    llama, tokenizer = model.language_model, processor.tokenizer
    common = {"max_tokens": length, "logits_processors": [never(list(tokenizer.eos_token_ids))]}
    size = len(processor.encode(QUESTION, [str(IMAGE)]).ids)
    text = mx.array(np.random.default_rng(0).integers(0, 200, size))
    say(f"{name}, a prompt of {size} tokens, {length} written:")
    say(f"  {'lane':13}{'':9}{'first token':>12}{'prefill':>9}{'tokens/s':>10}{'passes/token':>14}")
    rows: list[dict] = []
    for lane in LANES:
        if lane.quantized:
            nn.quantize(llama, 64, 4)
        runs: dict[str, Callable[[], dict]] = {"ours": lambda lane=lane: ours(model, processor, common | lane.ours)}
        if lane.peers is not None:
            runs["mlx-lm"] = lambda options=common | lane.peers: timed(
                response.token for response in mlx_lm.stream_generate(llama, tokenizer, text, **options)
            )
            try:
                vlm = mlx_vlm_llama(llama)
                runs["mlx-vlm"] = lambda vlm=vlm, options=common | lane.peers: timed(vlm(text, options))
            except ImportError as e:
                if lane is LANES[0]:
                    say(f"  mlx-vlm is not measured: {e}")
        results: dict[str, list[dict]] = {contender: [] for contender in runs}
        for i in range(repeats + 1):  # the first warms up; each comes first in turn, after another's caches and clocks
            turn = i % len(runs)
            for contender, run in [*runs.items()][turn:] + [*runs.items()][:turn]:
                results[contender] += [run()][: min(i, 1)]
        for contender, given in results.items():
            row = {key: statistics.median(each[key] for each in given) for key in given[0] if key != "tokens"}
            rows.append({"model": name, "lane": lane.name, "who": contender, "prompt_tokens": size, **row})
            if contender == "mlx-vlm":
                rows[-1]["tokens_of_mlx_lm"] = given[0]["tokens"] == results["mlx-lm"][0]["tokens"]
            say_row(rows[-1])
        if lane is LANES[0]:
            seconds, read = follow_up(model, processor, common | lane.ours)
            rows[0]["follow_up_seconds"] = seconds
            say(f"  a follow-up's first token, with {read} tokens to read: {seconds:.3f} s")
    say_faster_peers(rows)
    return rows


def prefill(row: dict) -> float:
    """Seconds that Llama reads the prompt; a peer has nothing else to do before its first token."""
    return row.get("prefill_seconds", row["first_token_seconds"])


def say_row(row: dict) -> None:
    first = f"{row['first_token_seconds']:.3f}" if row["who"] == "ours" else "-"
    passes = f"{row['passes_per_token']:.2f}" if "passes_per_token" in row else "-"
    other = "" if row.get("tokens_of_mlx_lm", True) else "  (other tokens than mlx-lm's)"
    figures = f"{first:>12}{prefill(row):9.3f}{row['tokens_per_second']:10.1f}{passes:>14}"
    say(f"  {row['lane']:13}{row['who']:9}{figures}{other}")


def say_faster_peers(rows: list[dict]) -> None:
    """Print where a peer's median is better than ours of the same lane."""
    own = {row["lane"]: row for row in rows if row["who"] == "ours"}
    faster = []
    for row in rows:
        for what, ratio in (
            ("prefill", prefill(own[row["lane"]]) / prefill(row)),
            ("tokens/s", row["tokens_per_second"] / own[row["lane"]]["tokens_per_second"]),
        ):
            if ratio > 1:
                faster.append(f"{row['who']} {ratio:.2f}x in {what}, {row['lane']}")
    say(f"  faster than ours: {'; '.join(faster) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers of the wide Llama; 0: the demo only (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: 5)")
    parser.add_argument(
        "--drafts",
        type=int,
        default=0,
        metavar="N",
        help="pictures to try drafts on, first; needs the demo and json extras (default: 0)",
    )
    args = parser.parse_args()
    small, processor = load(CHECKPOINT)
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    rows = []
    peers = {name: version(name) for name in ("mlx-lm", "mlx-vlm") if importlib.util.find_spec(name.replace("-", "_"))}
    report = {"benchmark": "generate", "machine": machine(), "peers": peers, "rows": rows}
    if args.drafts:
        report["drafts"] = drafts.measure(small, processor, args.drafts)
        drafts.say_rows(report["drafts"], say)
        drafts.say_estimates(report["drafts"], say)
    rows += measure("demo", small, processor, args.tokens, args.repeats)
    if args.layers:
        model = wide(small, args.layers, dtype)
        rows += measure(f"4096 wide, {args.layers} layers", model, processor, args.tokens, args.repeats)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

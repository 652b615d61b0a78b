"""Time to the first token and tokens per second: ours with an image, and mlx-lm's with as many tokens of text.

    python benchmarks/generate.py                  # the demo, and two layers of Llama-3-8B's width
    python benchmarks/generate.py --layers 32      # a whole Llama-3-8B of random weights (16 GB in half precision)
    python benchmarks/generate.py --drafts 100     # and what drafts save, see drafts.py; needs the demo and json extras

Both read a prompt of one length with the same Llama weights and write as many tokens, in turn; medians. What remains
beside mlx-lm is our cost. A follow-up question reads its own tokens alone. The last line is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from embed import machine, say  # first: it loads OpenBLAS before MLX

# isort: split
import drafts
import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from train import LLAMA_8B

from llama3v_mlx import load, stream_generate
from llama3v_mlx.demo import CHECKPOINT, IMAGES
from llama3v_mlx.models.llama3v import Model, ModelArgs

sys.path.append(str(Path(__file__).parents[1]))  # for tools.demo
IMAGE = IMAGES / "two-red-stars.jpg"
QUESTION = "What is this image? " + "Describe the image in one sentence. " * 8


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


def measure(name: str, model: Model, processor, length: int, repeats: int) -> dict:
    """Seconds to the first token, and tokens per second after it, of both."""
    options = {"max_tokens": length, "logits_processors": [never(list(processor.tokenizer.eos_token_ids))]}
    prompt = processor.encode(QUESTION, [str(IMAGE)])
    text = np.random.default_rng(0).integers(0, 200, len(prompt.ids)).tolist()
    follow_up = processor.encode([{"role": "user", "content": "What color is the background?"}]).ids[1:]
    figures: dict[str, list[float]] = {}

    def note(key: str, value: float) -> None:
        figures.setdefault(key, []).append(value)

    for i in range(repeats + 1):  # the first warms up
        cache = make_prompt_cache(model)
        start = time.perf_counter()
        for response in stream_generate(
            model, processor, QUESTION, str(IMAGE), temperature=0, prompt_cache=cache, **options
        ):
            if response.generation_tokens == 1 and i:
                note("first_token_seconds", time.perf_counter() - start)
                note("prefill_seconds", response.prefill_seconds)
                note("vision_seconds", response.vision_seconds)
                note("preprocess_seconds", response.preprocess_seconds)
        if i:
            note("tokens_per_second", response.generation_tps)
        start = time.perf_counter()
        next(stream_generate(model, processor, follow_up, temperature=0, prompt_cache=cache, **options))
        if i:
            note("follow_up_seconds", time.perf_counter() - start)
        last = list(mlx_lm.stream_generate(model.language_model, processor.tokenizer, text, **options))[-1]
        if i:
            note("mlx_lm_prefill_seconds", last.prompt_tokens / last.prompt_tps)
            note("mlx_lm_tokens_per_second", last.generation_tps)
    median = {key: statistics.median(values) for key, values in figures.items()}
    decode = median["tokens_per_second"] / median["mlx_lm_tokens_per_second"]
    prefill = median["mlx_lm_prefill_seconds"] / median["prefill_seconds"]
    say(f"{name}, a prompt of {len(prompt.ids)} tokens, {length} written:")
    say(
        f"  first token after {median['first_token_seconds']:.3f} s (preprocess {median['preprocess_seconds']:.3f}, "
        f"vision {median['vision_seconds']:.3f}, prefill {median['prefill_seconds']:.3f}); "
        f"mlx-lm's prefill {median['mlx_lm_prefill_seconds']:.3f} s, so ours is {prefill:.2f}x as fast"
    )
    say(
        f"  {median['tokens_per_second']:.1f} tokens/s; mlx-lm {median['mlx_lm_tokens_per_second']:.1f}, "
        f"so ours is {decode:.2f}x as fast"
    )
    say(f"  a follow-up's first token after {median['follow_up_seconds']:.3f} s, with {len(follow_up)} tokens to read")
    return {"name": name, "prompt_tokens": len(prompt.ids), "prefill": prefill, "decode": decode, **median}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers of the wide Llama; 0: the demo only (default: 2)")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: 5)")
    parser.add_argument("--drafts", type=int, default=0, metavar="N", help="pictures to try drafts on (default: 0)")
    args = parser.parse_args()
    small, processor = load(CHECKPOINT)
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    rows = [measure("demo", small, processor, args.tokens, args.repeats)]
    if args.layers:
        model = wide(small, args.layers, dtype)
        rows.append(measure(f"4096 wide, {args.layers} layers", model, processor, args.tokens, args.repeats))
    report = {"benchmark": "generate", "machine": machine(), "rows": rows}
    if args.drafts:
        report["drafts"] = drafts.measure(small, processor, args.drafts)
        drafts.say_rows(report["drafts"], say)
        drafts.say_estimates(report["drafts"], say)
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""Ask a question about images: `python -m llama3v_mlx.generate --image photo.jpg --prompt "What is this image?"`."""

import argparse
import json
import sys

from .cli import note_slow_cpu, run
from .demo import CHECKPOINT

DEMO_NOTE = (
    "note: this is the bundled demo model, which knows plain shapes and handwritten numbers and nothing else; for the "
    "real one: python convert.py --hf-path openbmb/MiniCPM-Llama3-V-2_5 --mlx-path llama3v-4bit -q, then --model "
    "llama3v-4bit"
)
IMAGE_PROMPT = "What is this image?"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llama3v_mlx.generate", description="Ask Llama3-V about images.")
    parser.add_argument("--model", help="folder or Hub repository of a checkpoint (default: the bundled demo)")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="image files or data: URIs")
    parser.add_argument("-p", "--prompt", help=f"the question; - reads stdin (default, with an image: {IMAGE_PROMPT})")
    parser.add_argument("--system-prompt", help="goes before the question (default: none)")
    parser.add_argument("-m", "--max-tokens", type=_positive, default=1024, help="length of the answer (default: 1024)")
    sampling = parser.add_argument_group("sampling", "defaults come from the checkpoint's generation_config.json")
    sampling.add_argument("--temp", type=_share_or_more, help="temperature; 0: always the likeliest token")
    sampling.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this probability together")
    sampling.add_argument("--top-k", type=int, help="draw from so many of the likeliest tokens; 0: all")
    sampling.add_argument("--min-p", type=float, help="draw from tokens of this share of the likeliest's probability")
    sampling.add_argument("--repetition-penalty", type=_share_or_more, help="on tokens already generated; 1: none")
    sampling.add_argument("--seed", type=int, help="of the random numbers, to repeat an answer")
    cache = parser.add_argument_group("memory")
    cache.add_argument("--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantize the key-value cache")
    cache.add_argument("--kv-group-size", type=int, choices=(32, 64, 128), default=64, help="(default: 64)")
    cache.add_argument("--quantized-kv-start", type=int, default=5000, help="from this token on (default: 5000)")
    cache.add_argument("--features", metavar="STORE", help="a store where images are looked up, and new ones kept")
    cache.add_argument("--max-image-tiles", type=_positive, help="tiles per image, the overview included, at most")
    output = parser.add_argument_group("output")
    output.add_argument("--no-verbose", action="store_true", help="print the answer alone")
    output.add_argument("--json", action="store_true", help="print one JSON object with the answer and all figures")
    output.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.prompt is None and not args.image:
        parser.error("give --image, --prompt or both")
    run(lambda: answer(args), args.debug)


def answer(args: argparse.Namespace) -> None:
    """Load, generate, print."""
    import mlx.core as mx

    from .encoder import name_of
    from .engine import load, statistics, stream_generate
    from .feature_cache import FeatureCache
    from .image import load_image

    prompt = IMAGE_PROMPT if args.prompt is None else sys.stdin.read() if args.prompt == "-" else args.prompt
    # A bad file is found before a large model is loaded; one that is in a store is not even decoded.
    images = args.image if args.features else [load_image(image) for image in args.image]
    if args.model is None:
        print(DEMO_NOTE, file=sys.stderr)
    note_slow_cpu()
    model, processor = load(args.model or CHECKPOINT, max_image_tiles=args.max_image_tiles)
    features = None
    if args.features:
        features = FeatureCache(args.features, model, processor.image_config, name_of(args.model or CHECKPOINT))
    if args.seed is not None:
        mx.random.seed(args.seed)

    quiet, text = args.no_verbose or args.json, ""
    if not quiet:
        print("=" * 10)
    for response in stream_generate(
        model,
        processor,
        [{"role": "user", "content": [*({"type": "image", "image": image} for image in images), prompt]}],
        system_prompt=args.system_prompt,
        max_tokens=args.max_tokens,
        temperature=args.temp,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        features=features,
    ):
        text += response.text
        if not args.json:
            print(response.text, end="", flush=True)
    if args.json:
        figures = {key: value for key, value in vars(response).items() if key not in ("text", "token", "logprobs")}
        asked = {"model": args.model or str(CHECKPOINT), "images": args.image, "prompt": prompt}
        print(json.dumps({"text": text.strip(), **asked, **figures}))
    else:
        print()
    if not quiet:
        print("=" * 10)
        print(statistics(response))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _share_or_more(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return value


if __name__ == "__main__":
    main()

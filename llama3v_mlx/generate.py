"""Ask a question about images: `llama3v generate --image photo.jpg --prompt "What is this image?"`."""

import argparse
import json
import sys
from pathlib import Path

from .cli import (
    DEMO_NOTE,
    add_generation_options,
    add_inputs,
    generation_options,
    loading_options,
    note_slow_cpu,
    positive,
    run,
)
from .demo import CHECKPOINT

IMAGE_PROMPT = "What is this image?"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama3v generate",
        usage="llama3v generate [--image FILE ...] [--prompt PROMPT] [options]",
        description="Ask Llama3-V about images.",
    )
    add_inputs(parser, "images, PDFs (paper.pdf#3-5: pages) or data: URIs; - reads stdin")
    parser.add_argument(
        "--images",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="ask about each image of folders, .txt or .jsonl lists, .tar archives, PDFs and files, one after another",
    )
    parser.add_argument("-p", "--prompt", help=f"the question; - reads stdin (default, with an image: {IMAGE_PROMPT})")
    parser.add_argument("--system-prompt", help="instructions before the question (default: none)")
    parser.add_argument("--schema", metavar="FILE", help="JSON schema that answers keep to; needs the json extra")
    add_generation_options(parser)
    many = parser.add_argument_group("with --images", "answers are sampled with seed 0 unless there is a --seed")
    many.add_argument(
        "--out",
        metavar="FILE",
        help="JSON lines, a line per image; the same command continues it (default: stdout)",
    )
    many.add_argument(
        "--batch-size", type=positive, metavar="N", help="answers at once (default: 16, or as many as fit in memory)"
    )
    many.add_argument("--limit", type=positive, metavar="N", help="stop after this many images")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--verbose",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="print statistics after the answer (the default), or the answer alone",
    )
    output.add_argument("--json", action="store_true", help="print one JSON object with the answer and all statistics")
    output.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.prompt is None and not (args.image or args.images):
        parser.error("give --image, --images or --prompt")
    options = ("image", "kv_bits", "draft_model", "json") if args.images else ("out", "batch_size", "limit")
    wrong = [f"--{name.replace('_', '-')}" for name in options if getattr(args, name)]
    if args.images and not args.verbose:
        wrong.append("--no-verbose")
    if wrong:
        parser.error(f"{', '.join(wrong)} cannot be used {'with' if args.images else 'without'} --images")
    if [*args.image, args.prompt].count("-") > 1:
        parser.error("only one of --image and --prompt can be - and read stdin")
    run(lambda: (answer_each if args.images else answer)(args), args.debug, awake=bool(args.images))


def read_prompt(args: argparse.Namespace) -> str:
    return IMAGE_PROMPT if args.prompt is None else sys.stdin.read() if args.prompt == "-" else args.prompt


def answer_each(args: argparse.Namespace) -> None:
    """Answer the prompt about each of many images."""
    from .ask_folder import ask_folder
    from .schema import read_schema

    schema = read_schema(Path(args.schema)) if args.schema is not None else None
    if args.model is None:
        print(DEMO_NOTE, file=sys.stderr)
    note_slow_cpu()
    ask_folder(args, read_prompt(args), schema)


def answer(args: argparse.Namespace) -> None:
    """Load the model, generate the answer and print it."""
    import mlx.core as mx

    from .checkpoint import name_of
    from .drafting.draft_model import load_draft_model
    from .features.lookup import FeatureCache
    from .generation import load, print_answer, stream_generate
    from .image import expand, load_image
    from .pdf import PdfPage
    from .schema import read_schema

    schema = read_schema(Path(args.schema)) if args.schema is not None else None
    prompt = read_prompt(args)
    # Report a bad file before loading a large model; with a feature store, stored images need no decoding.
    sources = [sys.stdin.buffer.read() if image == "-" else image for image in args.image]
    images, names = [], []
    for source, name in zip(sources, args.image, strict=True):
        for image in expand(source):
            is_page = isinstance(image, PdfPage)  # rendered later, for the model's tiles
            names.append(str(image) if is_page else name)
            images.append(image if is_page or args.features else load_image(image))
    if args.model is None:
        print(DEMO_NOTE, file=sys.stderr)
    note_slow_cpu()
    name = args.model or CHECKPOINT
    # A token is at least a byte of text; the template's few are in what is left over.
    options = loading_options(args, name, len(images), args.max_tokens + len(prompt.encode()))
    model, processor = load(name, max_image_tiles=args.max_image_tiles, adapter_path=args.adapter_path, **options)
    processor.check_pages(images, model.language_model.args.max_position_embeddings)
    draft_model = None
    if args.draft_model is not None:
        draft_model = load_draft_model(args.draft_model, processor, model.language_model.args.vocab_size)
    features = None
    if args.features:
        features = FeatureCache(args.features, model, processor.image_config, name_of(name))
    if args.seed is not None:
        mx.random.seed(args.seed)

    responses = stream_generate(
        model,
        processor,
        [{"role": "user", "content": [*({"type": "image", "image": image} for image in images), prompt]}],
        system_prompt=args.system_prompt,
        **generation_options(args),
        features=features,
        schema=schema,
        draft_model=draft_model,
    )
    if not args.json:
        print_answer(responses, frame=args.verbose)
        return
    text = ""
    for response in responses:
        text += response.text
    figures = {key: value for key, value in vars(response).items() if key not in ("text", "token", "logprobs")}
    asked = {"model": args.model or str(CHECKPOINT), "images": names, "prompt": prompt}
    print(json.dumps({"text": text.strip(), **asked, **figures}))


if __name__ == "__main__":
    main()

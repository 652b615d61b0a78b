"""Ask a question about images: `llama3v generate --image photo.jpg --prompt "What is this image?"`."""

import argparse
import json
import sys
from pathlib import Path

from .cli import DEMO_NOTE, add_generation_options, generation_options, loading_options, note_slow_cpu, run
from .demo import CHECKPOINT

IMAGE_PROMPT = "What is this image?"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llama3v generate", description="Ask Llama3-V about images.")
    parser.add_argument("--model", help="folder or Hub repository of a checkpoint (default: the bundled demo)")
    parser.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="FILE",
        help="images, PDFs (paper.pdf#3-5: pages) or data: URIs; - reads stdin",
    )
    parser.add_argument("-p", "--prompt", help=f"the question; - reads stdin (default, with an image: {IMAGE_PROMPT})")
    parser.add_argument("--system-prompt", help="instructions before the question (default: none)")
    add_generation_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--schema", metavar="FILE", help="JSON schema that the answer keeps to (with the json extra)")
    output.add_argument("--no-verbose", action="store_true", help="print only the answer")
    output.add_argument("--json", action="store_true", help="print one JSON object with the answer and all statistics")
    output.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.prompt is None and not args.image:
        parser.error("give --image, --prompt or both")
    if [*args.image, args.prompt].count("-") > 1:
        parser.error("only one of --image and --prompt can be - and read stdin")
    run(lambda: answer(args), args.debug)


def answer(args: argparse.Namespace) -> None:
    """Load the model, generate the answer and print it."""
    import mlx.core as mx

    from .checkpoint import name_of
    from .config import read_json
    from .drafting.draft_model import load_draft_model
    from .features.lookup import FeatureCache
    from .generation import load, print_answer, stream_generate
    from .image import expand, load_image
    from .pdf import PdfPage

    prompt = IMAGE_PROMPT if args.prompt is None else sys.stdin.read() if args.prompt == "-" else args.prompt
    schema = read_json(Path(args.schema)) if args.schema else None
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
    if args.draft_model:
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
        print_answer(responses, frame=not args.no_verbose)
        return
    text = ""
    for response in responses:
        text += response.text
    figures = {key: value for key, value in vars(response).items() if key not in ("text", "token", "logprobs")}
    asked = {"model": args.model or str(CHECKPOINT), "images": names, "prompt": prompt}
    print(json.dumps({"text": text.strip(), **asked, **figures}))


if __name__ == "__main__":
    main()

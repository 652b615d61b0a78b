"""How often the demo is right on images it has never seen: `python -m tools.demo.evaluate [--model DIR]`.

One question about each image, the kinds in turn; an answer counts if it is right to the letter. The pictures come from
seeds that training does not use, the handwriting from the test split. Needs the `demo` extra.
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llama3v_mlx.cli import run
from llama3v_mlx.demo import CHECKPOINT

SEED = 20_000_000
# Kinds of questions that suit pictures of shapes and of numbers, each asked equally often.
SHAPE_KINDS = ("describe", "count", "shape", "color", "background")
NUMBER_KINDS = ("describe", "number", "color", "background")


def held_out(count: int) -> Iterator[tuple[str, object, str, str, str]]:
    """`count` times (name, PIL image, kind, question, right answer), always the same; four in ten are numbers."""
    from . import world

    for i, (rng, scene) in enumerate(itertools.islice(scenes(), count)):
        is_number = scene.number is not None
        kinds = NUMBER_KINDS if is_number else SHAPE_KINDS
        kind, question, answer = world.ask(rng, scene, kinds[i // 5 % len(kinds)])
        noun = "number" if scene.number else "shapes"
        yield f"held-out {i}", scene.image, f"{kind} ({noun})" if kind in NUMBER_KINDS[:1] else kind, question, answer


def scenes() -> Iterator[tuple]:
    """Yield (generator, held-out scene) without end, always the same."""
    import numpy as np

    from . import world

    for i in itertools.count():
        rng = np.random.default_rng(SEED + i)
        yield rng, world.draw_scene(rng, world.draw_size(rng), "test", numbers=float(i % 5 < 2))


def evaluate(model: str, count: int, show: bool = False) -> dict[str, tuple[int, int]]:
    """(right, asked) by kind of question, and under "all"."""
    from tqdm import tqdm

    from llama3v_mlx.generation import generate, load

    loaded = load(model)
    right, asked = Counter(), Counter()
    for name, image, kind, question, expected in tqdm(held_out(count), total=count, unit="image", disable=None):
        answer = generate(*loaded, question, image=image, temperature=0, repetition_penalty=1, max_tokens=40)
        for key in (kind, "all"):
            asked[key] += 1
            right[key] += answer == expected
        if show and answer != expected:
            print(f"{name} {image.size}: {question} {answer!r}, not {expected!r}", file=sys.stderr)
    return {key: (right[key], n) for key, n in sorted(asked.items())}


def retrieval(model: str, count: int = 500) -> dict[str, tuple[int, int]]:
    """(right, asked) by kind of picture: whether a caption finds, first of all, the picture that it is true of.

    Asked among `count` held-out pictures, of which those with the same caption as another are left out.
    """
    import mlx.core as mx
    import numpy as np

    from llama3v_mlx.features.encoder import TextEncoder, load_encoder

    from . import world

    encoder = load_encoder(model, "pooled")
    texts = TextEncoder(model, encoder.model)
    found: dict[str, np.ndarray] = {}
    for _, scene in itertools.islice(scenes(), count):
        caption = world.answer(scene, "describe")
        features = encoder.encode([encoder.prepare(scene.image)])
        found[caption] = None if caption in found else features[0].rows
    captions = [caption for caption, rows in found.items() if rows is not None]
    images = mx.concatenate([found[caption] for caption in captions])
    logits = np.array(encoder.model.logits(images, texts.encode(captions)))
    right, asked = Counter(), Counter()
    for i, caption in enumerate(captions):
        for kind in ("number" if "number" in caption else "shapes", "all"):
            asked[kind] += 1
            right[kind] += logits[:, i].argmax() == i
    return {kind: (int(right[kind]), n) for kind, n in sorted(asked.items())}


def write_questions(folder: Path, count: int) -> None:
    """Write held-out pictures and questions as data of `llama3v evaluate --tasks demo_world --data FOLDER`."""
    folder = folder.absolute() / "demo_world"
    folder.mkdir(parents=True)
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for i, (_, image, kind, question, answer) in enumerate(held_out(count)):
            image.save(folder / f"{i:03}.png", compress_level=1)
            row = {"image": str(folder / f"{i:03}.png"), "kind": kind, "question": question, "answer": answer}
            file.write(json.dumps(row) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.evaluate", description=__doc__)
    parser.add_argument("--model", default=str(CHECKPOINT), help="a demo checkpoint (default: the bundled)")
    parser.add_argument("--count", type=int, default=500, help="images (default: 500)")
    parser.add_argument("--siglip", metavar="DIR", help="have a SigLIP find the images by their captions instead")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the questions for llama3v evaluate instead")
    parser.add_argument("--show", action="store_true", help="print wrong answers to stderr")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    def report() -> None:
        if args.write:
            write_questions(args.write, args.count)
            return
        results = retrieval(args.siglip, args.count) if args.siglip else evaluate(args.model, args.count, args.show)
        for kind, (right, asked) in results.items():
            print(f"{kind:20} {right:4} of {asked:4}  {right / asked:6.1%}")
        print(json.dumps({kind: right / asked for kind, (right, asked) in results.items()}))

    run(report, args.debug)


if __name__ == "__main__":
    main()

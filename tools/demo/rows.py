"""Write pictures of the demo world and conversations about them in LLaVA's format, as training data."""

import argparse
import json
import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np

from . import world


def draw_row(number: int, folder: Path, seed: int) -> str:
    """Row `number` as a line of JSON; its pictures (usually one, sometimes two or none) are written to `folder`."""
    rng = np.random.default_rng((seed, number))
    count = int(rng.choice([0, 1, 2], p=[0.02, 0.83, 0.15]))
    turns, images = [], []
    if rng.random() < 0.1:
        turns.append({"from": "system", "value": str(rng.choice(world.SYSTEM_PROMPTS))})
    if count == 0:
        question, answer = world.TEXT_ONLY[rng.integers(len(world.TEXT_ONLY))]
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    for i in range(count):
        max_side = 400 if rng.random() < 0.85 else world.MAX_SIDE
        scene = world.draw_scene(rng, world.draw_size(rng, max_side), "train")
        images.append(f"{number:06}-{i}.png")
        scene.image.save(folder / images[-1], compress_level=1)
        for k in range(3 if count == 1 else 2):
            _, question, answer = world.ask(rng, scene)
            mark = "<image>\n" if k == 0 else ""
            turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": f"{number:06}", "image": images, "conversations": turns}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.rows", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to be written: images/, train.jsonl, val.jsonl")
    parser.add_argument("--train", type=int, default=20000, help="rows to train with (default: 20000)")
    parser.add_argument("--val", type=int, default=500, help="rows to validate with (default: 500)")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    images = args.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw = partial(draw_row, folder=images, seed=args.seed)
    with multiprocessing.Pool(args.workers) as pool:
        rows = pool.imap(draw, range(args.val + args.train), chunksize=50)
        for name, count in (("val", args.val), ("train", args.train)):
            with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for _ in range(count):
                    file.write(next(rows))


if __name__ == "__main__":
    main()

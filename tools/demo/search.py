"""How often a caption finds its picture first, by SigLIP alone and after Llama3-V has looked at what SigLIP found.

    python -m tools.demo.search --count 500 --candidates 20

Pictures and captions are held out, see `evaluate.held_out`; captions that two pictures have are left out.
Needs the `demo` extra.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

from llama3v_mlx.cli import run
from llama3v_mlx.demo import CHECKPOINT, SIGLIP


def draw(folder: Path, count: int) -> dict[str, Path]:
    """Draw `count` held-out pictures; return the file of each caption that only one of them has."""
    from . import world
    from .evaluate import scenes

    pictures: dict[str, list] = {}
    for _, scene in itertools.islice(scenes(), count):
        pictures.setdefault(world.answer(scene, "describe"), []).append(scene.image)
    files = {}
    for caption, images in pictures.items():
        if len(images) == 1:
            files[caption] = folder / f"{len(files)}.png"
            images[0].save(files[caption])
    return files


def measure(folder: Path, count: int, candidates: int) -> dict[str, float]:
    """Return the shares of captions whose picture comes first, and of those whose picture is among the candidates."""
    from tqdm import tqdm

    from llama3v_mlx.features.grammar import Term
    from llama3v_mlx.features.library import Library
    from llama3v_mlx.features.lookup import FeatureCache
    from llama3v_mlx.features.query import embed_query
    from llama3v_mlx.generation import load
    from llama3v_mlx.rerank import CAPTION, Judge, judge_all

    (folder / "pictures").mkdir()
    files = draw(folder / "pictures", count)
    library = Library(folder / "pictures", str(SIGLIP), folder / "index")
    library.update()
    model, processor = load(CHECKPOINT)
    judge = Judge(model, processor, FeatureCache(folder / "tokens", model, processor.image_config, "demo"), CAPTION)
    first = among = reranked = 0
    for caption, path in tqdm(files.items(), unit="caption", disable=None):
        query = embed_query([Term(caption)], library.encoder, library.texts)
        names = [match.path for match in library.rank(query, candidates)]
        first += Path(names[0]).name == path.name
        among += path.name in [Path(name).name for name in names]
        reranked += Path(next(iter(judge_all(judge, names, caption)))).name == path.name
    shares = {"siglip": first, "candidates": among, "reranked": reranked}
    return {name: right / len(files) for name, right in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", type=int, default=500, help="pictures (default: 500, of which 319 have captions of their own)"
    )
    parser.add_argument("--candidates", type=int, default=20, help="pictures looked at for each caption (default: 20)")
    args = parser.parse_args()

    def command() -> None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder), args.count, args.candidates)))

    run(command)


if __name__ == "__main__":
    main()

"""Search images by text or by another image: `llama3v search STORE "a red circle"`."""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from .cli import note_slow_cpu, run
from .files import beside, printable


@dataclass(frozen=True)
class Hit:
    """Image found by a search."""

    path: str | None  # first of its names; None if the store has no name for it
    sha256: str
    cosine: float
    probability: float | None  # of a match with the text, SigLIP's sigmoid; None if searched by image


def nearest(store, query, top: int) -> list[tuple[bytes, float]]:
    """Return the entries of a pooled store with the highest cosine similarity to a query.

    Args:
        store: a FeatureStore with one row per image.
        query: numpy (width,).
        top: maximum number of entries.

    Returns:
        (SHA-256, cosine), best first.
    """
    import numpy as np

    query = query / np.linalg.norm(query)
    scores = np.concatenate([block @ query / np.linalg.norm(block, axis=1) for block in store.matrix()])
    best = np.argpartition(-scores, top)[:top] if top < len(scores) else np.arange(len(scores))
    best = best[np.argsort(-scores[best], kind="stable")]
    entries = store.sizes()
    return [(entries[i][0], float(scores[i])) for i in best]


def search(folder: str, text: str | None, image: str | None, top: int) -> list[Hit]:
    """Rank the images of a store by a text or an image, with the model that created the store.

    Raises:
        ValueError: if the store is not pooled or is empty, or its model has changed or is missing.
        ImageError: if the image is unusable.
    """
    import mlx.core as mx
    import numpy as np

    from .features.encoder import TextEncoder, load_encoder_of
    from .features.store import FeatureStore

    store = FeatureStore(folder)
    if store.info.kind != "pooled":
        raise ValueError(f"{folder}: holds {store.info.kind} features; embed with --kind pooled to search")
    if not len(store):
        raise ValueError(f"{folder}: is empty; add images with llama3v embed")
    encoder, checkpoint = load_encoder_of(store)
    if image is not None:
        query = encoder.encode([encoder.prepare(image)])[0].rows[0]
    else:
        query = TextEncoder(checkpoint, encoder.model).encode([text])[0]
    found = nearest(store, np.array(query.astype(mx.float32)), top)
    names: dict[bytes, str] = {}
    wanted = {sha256 for sha256, _ in found}
    for sha256, name in store.names():
        if sha256 in wanted:
            names.setdefault(sha256, name)
    scale, bias = (math.exp(encoder.model.logit_scale.item()), encoder.model.logit_bias.item()) if text else (0, 0)
    return [
        Hit(names.get(sha256), sha256.hex(), cosine, 1 / (1 + math.exp(-scale * cosine - bias)) if text else None)
        for sha256, cosine in found
    ]


CELL, GAP, LINE = 240, 12, 17  # sizes in a contact sheet, in pixels


def draw_sheet(hits: list[Hit], path: Path) -> None:
    """Draw a contact sheet of the images found, best first, each above its rank, score and name."""
    from PIL import Image, ImageDraw, ImageFont

    from .features.sources import read_named
    from .image import ImageError, load_image

    columns = math.ceil(math.sqrt(len(hits)))
    rows = math.ceil(len(hits) / columns)
    height = CELL + 2 * LINE + GAP
    sheet = Image.new("RGB", (columns * (CELL + GAP) + GAP, rows * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, hit in enumerate(hits):
        x, y = GAP + i % columns * (CELL + GAP), GAP + i // columns * height
        draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), "#f2f2f2")
        try:
            image = load_image(read_named(hit.path or ""))
            image.thumbnail((CELL, CELL))
            sheet.paste(image, (x + (CELL - image.width) // 2, y + (CELL - image.height) // 2))
        except (OSError, ImageError):
            draw.text((x + CELL / 2, y + CELL / 2), "file not found", "#666666", font, "mm")
        draw.text((x, y + CELL + 2), f"{i + 1}.  {_score(hit)}", "#222222", font)
        name = Path(hit.path or hit.sha256).name
        while draw.textlength(name, font) > CELL:
            name = f"{name.removesuffix('…')[:-1]}…"
        draw.text((x, y + CELL + 2 + LINE), name, "#666666", font)
    with beside(path) as partial:
        sheet.save(partial, Image.registered_extensions().get(path.suffix.lower(), "PNG"))


def _score(hit: Hit) -> str:
    return f"{hit.cosine:6.3f}" + (f"  {hit.probability:6.1%}" if hit.probability is not None else "")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama3v search", description="Search the images of a feature store by text or by another image."
    )
    parser.add_argument("store", metavar="STORE", help="pooled embeddings, from llama3v embed")
    parser.add_argument("text", nargs="?", help="description of the images")
    parser.add_argument("--image", metavar="FILE", help="find images similar to this one, instead of a text")
    parser.add_argument("--top", type=int, default=9, help="number of images to show (default: 9)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw a contact sheet of the images found")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.text and args.text.strip()) == bool(args.image):
        parser.error("give either a text or --image FILE")
    if args.top < 1:
        parser.error(f"--top is {args.top}; it must be 1 or more")

    def command() -> None:
        note_slow_cpu()
        hits = search(args.store, args.text, args.image, args.top)
        if args.json:
            print(json.dumps({"text": args.text, "image": args.image, "hits": [asdict(hit) for hit in hits]}))
        else:
            for hit in hits:
                print(f"{_score(hit)}  {printable(hit.path or hit.sha256)}")
        if args.sheet:
            draw_sheet(hits, args.sheet)

    run(command, args.debug)


if __name__ == "__main__":
    main()

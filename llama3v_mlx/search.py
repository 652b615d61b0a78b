"""Search pictures by text, by another picture, or by sums of both: `llama3v search ~/Pictures "a red bicycle"`."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from .cli import SIGLIP_NOTE, note_slow_cpu, positive, run, share_or_more
from .demo import SIGLIP
from .files import find_path, safe

POLL = 2.0  # seconds between two looks at a watched folder


@dataclass(frozen=True)
class Hit:
    """Image found by a search."""

    path: str | None  # first of its names; None if the store has no name for it
    sha256: str
    cosine: float
    probability: float | None  # of a match with the text, SigLIP's sigmoid; None if searched otherwise


def search(folder: str, text: str | None, image: str | None, top: int) -> list[Hit]:
    """Rank the images of a store by a query, or by an image, with the model that created the store.

    Raises:
        ValueError: if the store is not pooled or is empty, or its model has changed or is missing.
        ImageError: if the image is unusable.
    """
    from .features.encoder import TextEncoder, load_encoder_of
    from .features.query import embed_query
    from .features.ranking import Ranking, nearest
    from .features.store import FeatureStore

    store = FeatureStore(folder)
    Ranking(store)
    if not len(store):
        raise ValueError(f"{folder}: is empty; add images with llama3v embed")
    encoder, checkpoint = load_encoder_of(store)
    terms = _terms(text, image)
    found = nearest(store, embed_query(terms, encoder, lambda: TextEncoder(checkpoint, encoder.model)), top)
    probable = _probability(encoder, terms)
    return [Hit(store.name_of(sha256), sha256.hex(), cosine, probable(cosine)) for sha256, cosine in found]


def search_library(library, args: argparse.Namespace) -> list[Hit]:
    """Rank the pictures of a library by the query or image of the command."""
    from .features.query import embed_query

    terms = _terms(args.text, args.image)
    query, probable = embed_query(terms, library.encoder, library.texts), _probability(library.encoder, terms)
    found = library.rank(query, args.top, _filters(args))
    return [Hit(match.path, match.sha256.hex(), match.cosine, probable(match.cosine)) for match in found]


def _terms(text: str | None, image: str | None) -> list:
    from .features.grammar import Term, parse_query

    return parse_query(text) if image is None else [Term(None, image)]


def _filters(args: argparse.Namespace):
    from .features.grammar import Filters

    folder = None
    if args.folder is not None:
        folder = os.path.realpath(find_path(args.folder))
        if not os.path.isdir(folder):
            raise ValueError(f"{args.folder}: no such folder")
    return Filters(args.after, args.before, folder)


def _probability(encoder, terms: list):
    """Return a function from cosines to probabilities, which only a single text has."""
    from .features.query import match_probability

    return match_probability(encoder.model) if len(terms) == 1 and terms[0].text is not None else lambda _: None


def update(library, args: argparse.Namespace):
    """Bring a library's index up to date, with a progress bar, and return the changes."""
    from tqdm import tqdm

    with tqdm(unit="image", smoothing=0.05, delay=0.5, disable=True if args.json else None) as bar:

        def progress(report, total: int) -> None:
            bar.total = total
            bar.update(report.seen - bar.n)
            bar.set_postfix(failed=len(report.failed), refresh=False)

        changes = library.update(progress, args.rehash, args.batch_size, args.workers)
    for name, reason in changes.failed:
        print(f"broken: {safe(name)}: {reason}", file=sys.stderr)
    for name, reason in changes.skipped.denied:
        print(f"note: {safe(name)}: the folder cannot be listed ({reason}); its pictures are kept", file=sys.stderr)
    return changes


def watch(library, args: argparse.Namespace) -> None:
    """Keep a library up to date until Ctrl-C, and print what changed."""
    args.rehash = False
    try:
        while True:
            time.sleep(POLL)
            changes = update(library, args)
            if str(changes) != "no changes":
                print(f"{time.strftime('%H:%M:%S')}  {changes}", flush=True)
    except KeyboardInterrupt:
        print(file=sys.stderr)


def show(paths: list[str], sheet: Path | None) -> None:
    """Show files in Finder; elsewhere, open the contact sheet or else their folder."""
    if sys.platform == "darwin":
        command = ["open", "-R", *paths]
    elif program := shutil.which("xdg-open"):
        command = [program, str(sheet or os.path.dirname(os.path.abspath(paths[0])))]
    else:
        raise ValueError("--open needs xdg-open (apt-get install xdg-utils)")
    subprocess.run(command, check=True)


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
        name = safe(Path(hit.path or hit.sha256).name)
        while draw.textlength(name, font) > CELL:
            name = f"{name.removesuffix('…')[:-1]}…"
        draw.text((x, y + CELL + 2 + LINE), name, "#666666", font)
    partial = path.with_name(f"{path.name}.partial")
    sheet.save(partial, Image.registered_extensions().get(path.suffix.lower(), "PNG"))
    os.replace(partial, path)


def _score(hit: Hit) -> str:
    return f"{hit.cosine:6.3f}" + (f"  {hit.probability:6.1%}" if hit.probability is not None else "")


def build_parser() -> argparse.ArgumentParser:
    from .features.grammar import GRAMMAR

    parser = argparse.ArgumentParser(
        prog="llama3v search",
        description="Search the pictures of a folder, or of a feature store, by text, image, or sums of both.",
        epilog=GRAMMAR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="FOLDER", help="folder of pictures, or a store of pooled embeddings")
    parser.add_argument("text", nargs="?", metavar="QUERY", help="description of the images, or a sum; see below")
    parser.add_argument("--image", metavar="FILE", help="find images similar to this one, instead of a text")
    parser.add_argument("--top", type=int, default=9, help="number of images to show (default: 9)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw a contact sheet of the images found")
    parser.add_argument("--open", action="store_true", help="show the images found in Finder or the file manager")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "-0", "--print0", action="store_true", help="print only paths, each with a null byte, for xargs"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    filters = parser.add_argument_group("which pictures of a folder")
    filters.add_argument("--after", type=_date, metavar="DATE", help="taken on this date (2024, 2024-05-17) or later")
    filters.add_argument("--before", type=_date, metavar="DATE", help="taken earlier; without EXIF, the file's date")
    filters.add_argument("--in", dest="folder", metavar="FOLDER", help="in this subfolder")
    filters.add_argument(
        "--near-duplicates",
        nargs="?",
        type=share_or_more,
        const=0.97,
        metavar="COSINE",
        help="list groups of nearly equal pictures, instead of a query (default: 0.97)",
    )
    index = parser.add_argument_group("the index of a folder, in the cache")
    index.add_argument("--model", help="folder or Hub repository of a SigLIP (default: the bundled demo)")
    index.add_argument("--index", metavar="DIR", help="keep the index in this folder")
    index.add_argument("--no-update", action="store_true", help="search without looking for new files")
    index.add_argument("--rehash", action="store_true", help="read all files again, whatever their size and times")
    index.add_argument("--watch", action="store_true", help="keep the index up to date until Ctrl-C")
    index.add_argument("--batch-size", type=positive, default=8, help="images embedded at once (default: 8)")
    workers = min(16, os.cpu_count() or 1)
    index.add_argument("--workers", type=positive, default=workers, help=f"decoding threads (default: {workers})")
    return parser


def _date(text: str):
    from .features.grammar import parse_date

    try:
        return parse_date(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date like 2024, 2024-05 or 2024-05-17") from e


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    given = bool(args.text and args.text.strip()) + bool(args.image) + (args.near_duplicates is not None)
    if given > 1 or (not given and not args.watch):
        parser.error("give either a text or --image FILE")
    if args.top < 1:
        parser.error(f"--top is {args.top}; it must be 1 or more")
    if args.no_update and (args.watch or args.rehash):
        parser.error("--no-update takes neither --watch nor --rehash")
    is_store = (Path(args.store) / "store.json").is_file() or not os.path.isdir(args.store)
    own = ("after", "before", "folder", "near_duplicates", "model", "index", "no_update", "rehash", "watch")
    if is_store and os.path.isdir(args.store) and any(getattr(args, name) not in (None, False) for name in own):
        parser.error(f"{args.store} is a feature store, whose files may be anywhere; these options are for folders")
    run(lambda: _search_store(args) if is_store else _search_folder(args), args.debug, awake=not is_store)


def _search_store(args: argparse.Namespace) -> None:
    note_slow_cpu()
    _print_hits(search(args.store, args.text, args.image, args.top), args)


def _search_folder(args: argparse.Namespace) -> None:
    from .features.library import Library

    note_slow_cpu()
    if args.model is None:
        print(SIGLIP_NOTE, file=sys.stderr)
    library = Library(args.store, str(args.model or SIGLIP), args.index)
    changes = None if args.no_update else update(library, args)
    if changes is not None and not args.json:
        pictures, broken = library.counts()
        counts = f"{pictures} pictures" + (f" and {broken} broken ones" if broken else "")
        print(f"{safe(library.folder)}: {counts}; {changes}", file=sys.stderr)
    if args.near_duplicates is not None:
        groups = library.duplicates(args.near_duplicates, _filters(args))
        if args.json:
            print(json.dumps({"groups": groups}))
        elif args.print0:
            _print0([path for group in groups for path in group])
        else:
            print("\n\n".join("\n".join(map(safe, group)) for group in groups))
    elif args.text or args.image:
        if not library.counts()[0]:
            raise ValueError(f"{args.store}: has no pictures" + (" in the index" if args.no_update else ""))
        _print_hits(search_library(library, args), args)
    if args.watch:
        watch(library, args)


def _print_hits(hits: list[Hit], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({"text": args.text, "image": args.image, "hits": [asdict(hit) for hit in hits]}))
    elif args.print0:
        _print0([hit.path for hit in hits if hit.path])
    else:
        for hit in hits:
            print(f"{_score(hit)}  {safe(hit.path or hit.sha256)}")
    if args.sheet and hits:
        draw_sheet(hits, args.sheet)
    paths = [os.path.abspath(hit.path) for hit in hits if hit.path and os.path.exists(hit.path)]
    if args.open and paths:
        show(paths, args.sheet)


def _print0(paths: list[str]) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(b"".join(os.fsencode(path) + b"\0" for path in paths))


if __name__ == "__main__":
    main()

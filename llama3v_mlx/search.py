"""Search pictures by text, by another picture, or by sums of both: `llama3v search ~/Pictures "a red bicycle"`."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from .ask_found import Hit, ask
from .cli import (
    DEMO_SIGLIP_NOTE,
    add_memory_options,
    error_line,
    note_slow_cpu,
    positive,
    run,
    share_or_more,
)
from .demo import SIGLIP
from .features.grammar import terms_of
from .files import printable, true_path

FOLDERS = """A Photos library (X.photoslibrary) in FOLDER is skipped; pass it as FOLDER to
search its originals. Pictures that Photos derives from them are never listed.
The features of a deleted picture are kept for 30 days, in case it comes back,
and removed once most of the index is older than that; --compact removes them
now."""
POLL = 2.0  # seconds between two looks at a watched folder


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
    terms = terms_of(text, image)
    found = nearest(store, embed_query(terms, encoder, lambda: TextEncoder(checkpoint, encoder.model)), top)
    probable = _probability(encoder, terms)
    return [Hit(store.name_of(sha256), sha256.hex(), cosine, probable(cosine)) for sha256, cosine in found]


def search_library(library, args: argparse.Namespace) -> list[Hit]:
    """Rank the pictures of a library by the query or image of the command."""
    from .features.query import embed_query

    terms = terms_of(args.text, args.image)
    query, probable = embed_query(terms, library.encoder, library.texts), _probability(library.encoder, terms)
    found = library.rank(query, _recalled(args), _filters(args))
    return [Hit(match.path, match.sha256.hex(), match.cosine, probable(match.cosine)) for match in found]


def _filters(args: argparse.Namespace):
    from .features.grammar import Filters

    folder = None
    if args.folder is not None:
        inside = true_path(os.path.join(args.store, args.folder))
        folder = inside if os.path.isdir(inside) else true_path(args.folder)
        if not os.path.isdir(folder):
            raise ValueError(f"--in {args.folder}: no such folder in {args.store}")
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
        print(f"broken: {printable(name)}: {printable(reason)}", file=sys.stderr)
    for name, reason in changes.skipped.denied:
        print(
            f"note: {printable(name)}: the folder cannot be listed ({reason}); its pictures are kept", file=sys.stderr
        )
    return changes


def watch(library, args: argparse.Namespace) -> None:
    """Keep a library up to date until Ctrl-C, and print what changed; a disk may be ejected and come back."""
    args.rehash, problem = False, ""
    try:
        while True:
            time.sleep(POLL)
            try:
                changes, now = update(library, args), ""
            except (OSError, ValueError) as e:
                changes, now = "no changes", error_line(e)
            if now and now != problem:
                print(f"note: {now}", file=sys.stderr)
            problem = now
            if str(changes) != "no changes":
                print(f"{time.strftime('%H:%M:%S')}  {changes}", flush=True)
    except KeyboardInterrupt:
        print(file=sys.stderr)


def show(paths: list[str], sheet: Path | None) -> None:
    """Show files in Finder; elsewhere, open the contact sheet or else their folder."""
    if not paths:
        return
    if sys.platform == "darwin":
        command = ["open", "-R", *paths]
    elif program := shutil.which("xdg-open"):
        command = [program, str(sheet or os.path.dirname(os.path.abspath(paths[0])))]
    else:
        raise ValueError("--open needs xdg-open (apt-get install xdg-utils)")
    if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        raise ValueError(f"--open: {command[0]} could not show {command[-1]}")


def _recalled(args: argparse.Namespace) -> int:
    """Number of images that SigLIP finds; those that Llama3-V is to look at are more than those shown."""
    return max(args.top, args.candidates) if args.rerank or args.ask else args.top


def _score(hit: Hit) -> str:
    parts = [f"{hit.match:6.1%}"] if hit.match is not None else []
    parts += [f"{hit.cosine:6.3f}"]
    return "  ".join(parts + ([f"{hit.probability:6.1%}"] if hit.probability is not None else []))


def build_parser() -> argparse.ArgumentParser:
    from .features.grammar import GRAMMAR

    parser = argparse.ArgumentParser(
        prog="llama3v search",
        usage="llama3v search FOLDER [QUERY] [options]",
        description="Search the pictures of a folder, or of a feature store, by text, by image, or\n"
        "by sums of both. A line for each picture has the probability that it matches,\n"
        "as Llama3-V judges (--rerank, --ask); its cosine; the probability that SigLIP\n"
        "gives to a single text; and its path.",
        epilog=f"{GRAMMAR}\n\n{FOLDERS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", metavar="FOLDER", help="folder of pictures, or a store of pooled embeddings")
    parser.add_argument("text", nargs="?", metavar="QUERY", help="description of the images, or a sum; see below")
    parser.add_argument("--image", metavar="FILE", help="find images similar to this one, instead of a text")
    parser.add_argument("--top", type=positive, default=9, help="number of images to show (default: 9)")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw a contact sheet of the images found")
    parser.add_argument("--open", action="store_true", help="show the images found in Finder or the file manager")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("-0", "--print0", action="store_true", help="print only paths, each with a null byte, for xargs")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    look = parser.add_argument_group("have Llama3-V look at what SigLIP finds")
    look.add_argument("--rerank", action="store_true", help="rank the images found by whether they show the text")
    look.add_argument("--ask", metavar="QUESTION", help="rank them, and answer a question about those that match")
    look.add_argument("--llm", metavar="MODEL", help="folder or Hub repository of a Llama3-V (default: the demo)")
    look.add_argument("--candidates", type=positive, default=20, help="images looked at (default: 20)")
    look.add_argument("--answers", type=positive, default=3, help="images that are asked at most (default: 3)")
    look.add_argument("-m", "--max-tokens", type=positive, default=256, help="length of an answer (default: 256)")
    look.add_argument("--max-image-tiles", type=positive, help="tiles per image, including the overview")
    add_memory_options(look)
    filters = parser.add_argument_group("which pictures of a folder")
    filters.add_argument("--after", type=_date, metavar="DATE", help="taken on this date (2024, 2024-05-17) or later")
    filters.add_argument("--before", type=_date, metavar="DATE", help="taken earlier; without EXIF, the file's date")
    filters.add_argument("--in", dest="folder", metavar="FOLDER", help="in this folder in FOLDER")
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
    index.add_argument("--compact", action="store_true", help="free the space of deleted pictures now; see below")
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
    args = parser.parse_intermixed_args(argv)  # a query may follow options
    given = bool(args.text and args.text.strip()) + bool(args.image) + (args.near_duplicates is not None)
    if given > 1:
        parser.error("give only one of QUERY, --image and --near-duplicates")
    if not (given or args.watch or args.compact):
        parser.error("give a QUERY to search for, --image FILE or --near-duplicates")
    if (args.rerank or args.ask) and not args.text:
        parser.error("--rerank and --ask need a text to judge the images by")
    if args.no_update and (args.watch or args.rehash or args.compact):
        parser.error("--no-update takes none of --watch, --rehash and --compact")
    is_store = (Path(args.store) / "store.json").is_file() or not os.path.isdir(args.store)
    own = ("after", "before", "folder", "near_duplicates", "model", "index", "no_update", "rehash", "watch", "compact")
    if is_store and os.path.isdir(args.store) and any(getattr(args, name) not in (None, False) for name in own):
        parser.error(f"{args.store} is a feature store, whose files may be anywhere; these options are for folders")
    run(lambda: _search_store(args) if is_store else _search_folder(args), args.debug, awake=not is_store)


def _search_store(args: argparse.Namespace) -> None:
    if not os.path.isdir(args.store):
        problem = "is not a folder" if os.path.lexists(args.store) else "no such folder of pictures or feature store"
        raise ValueError(f"{args.store}: {problem}")
    note_slow_cpu()
    _print_hits(search(args.store, args.text, args.image, _recalled(args)), args)


def _search_folder(args: argparse.Namespace) -> None:
    from .features.compaction import KEPT_DAYS
    from .features.library import Library

    note_slow_cpu()
    if args.model is None:
        print(DEMO_SIGLIP_NOTE, file=sys.stderr)
    library = Library(args.store, str(args.model or SIGLIP), args.index)
    changes = None if args.no_update else update(library, args)
    if changes is not None and not args.json:
        pictures, broken = library.counts()
        counts = f"{pictures} picture{'s' * (pictures != 1)}" + (f" and {broken} broken ones" if broken else "")
        print(f"{printable(library.folder)}: {counts}; {changes}", file=sys.stderr)
        if (changes.added or not pictures) and (skipped := str(changes.skipped)):
            print(f"skipped: {printable(skipped)}", file=sys.stderr)
        if changes.deleted > pictures:
            print(f"note: most pictures are gone; what is known of them is kept for {KEPT_DAYS} days", file=sys.stderr)
    if args.compact:
        print(f"compacted: {library.compact() / 1e6:.1f} MB freed", file=sys.stderr if args.json else sys.stdout)
    if args.near_duplicates is not None:
        groups = library.duplicates(args.near_duplicates, _filters(args))
        if args.json:
            print(json.dumps({"groups": groups}))
        elif args.print0:
            _print0([path for group in groups for path in group])
        elif groups:
            print("\n\n".join("\n".join(map(printable, group)) for group in groups))
        else:
            print(f"no near duplicates (cosine {args.near_duplicates} or more)", file=sys.stderr)
    elif args.text or args.image:
        pictures, broken = library.counts()
        if not pictures and broken:
            raise ValueError(
                f"{args.store}: none of {broken} pictures could be read, says {library.index}; --rehash tries again"
            )
        if not pictures:
            raise ValueError(f"{args.store}: has no pictures" + (" in the index" if args.no_update else ""))
        _print_hits(search_library(library, args), args)
    if args.watch:
        watch(library, args)


def _print_hits(hits: list[Hit], args: argparse.Namespace) -> None:
    from .features.sources import file_of
    from .sheet import draw_sheet

    answer = None
    if hits and (args.rerank or args.ask):
        hits, answer = ask(hits, args)
    looked, hits = len(hits), hits[: args.top]
    if args.json:
        asked = {"text": args.text, "image": args.image, "question": args.ask, "answer": answer}
        print(json.dumps({**asked, "hits": [asdict(hit) for hit in hits]}))
    elif args.print0:
        _print0([hit.path for hit in hits if hit.path])
    else:
        if not looked:
            print("no picture is within the given dates and folder", file=sys.stderr)
        elif args.ask:
            _print_answers(hits, answer, looked)
        for i, hit in enumerate(hits, 1):
            print(f"[{i}]  " * bool(args.ask) + f"{_score(hit)}  {printable(hit.path or hit.sha256)}")
    if args.sheet and hits:
        labels = [f"{i}.  {_score(hit)}" for i, hit in enumerate(hits, 1)]
        names = [Path(hit.path or hit.sha256).name for hit in hits]
        draw_sheet(list(zip([hit.path for hit in hits], labels, names, strict=True)), args.sheet)
    if args.open:
        paths = [os.path.abspath(file_of(hit.path)) for hit in hits if hit.path]
        show([path for path in paths if os.path.exists(path)], args.sheet)


def _print_answers(hits: list[Hit], answer: str | None, looked: int) -> None:
    """Print the answer, with what it is made of, or that nothing was found."""
    answered = [hit for hit in hits if hit.answer is not None]
    if answer is not None:
        print(printable(answer) + " [1]" * (len(answered) == 1))
    if len(answered) > 1:
        print("\n".join(f"[{i}] {printable(hit.answer)}" for i, hit in enumerate(answered, 1)))
    if not answered:
        print(f"Not found: none of the {looked} images looked at shows it.")
    print()


def _print0(paths: list[str]) -> None:
    from .features.sources import file_of

    files = dict.fromkeys(map(file_of, paths))  # a PDF once, not its pages
    sys.stdout.flush()
    sys.stdout.buffer.write(b"".join(os.fsencode(file) + b"\0" for file in files))


if __name__ == "__main__":
    main()

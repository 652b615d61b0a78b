"""Rank found pictures by Llama3-V's judgement, and answer a question about them: `llama3v search --rerank`, `--ask`."""

import argparse
import sys
from dataclasses import dataclass, replace

from .cli import CACHE, DEMO_NOTE, loading_options
from .demo import CHECKPOINT
from .features.grammar import terms_of


@dataclass(frozen=True)
class Hit:
    """Image found by a search."""

    path: str | None  # first of its names; None if the store has no name for it
    sha256: str
    cosine: float
    probability: float | None  # of a match with the text, SigLIP's sigmoid; None if searched otherwise
    match: float | None = None  # with the text, as Llama3-V judges; None if it was not asked
    answer: str | None = None  # Llama3-V's, to --ask


def ask(hits: list[Hit], args: argparse.Namespace) -> tuple[list[Hit], str | None]:
    """Rank hits by Llama3-V's judgement, and answer a question about those that match.

    Visual tokens are cached, so that later questions about an image do not encode it again.

    Returns:
        All usable hits, best first, and the answer: of the only match, or summarized from the matches' own; None if
        nothing is asked or nothing matches.
    """
    from tqdm import tqdm

    from .checkpoint import name_of
    from .features.lookup import FeatureCache
    from .features.sources import read_named
    from .generation import load
    from .rerank import CAPTION, MATCH, YES_NO, Judge, judge_all

    texts = [term.text for term in terms_of(args.text, None) if term.text and term.weight > 0]
    text, is_demo = ", ".join(texts), args.llm is None
    if not text:
        raise ValueError("--rerank and --ask need a text to judge the images by")
    if is_demo:
        print(DEMO_NOTE, file=sys.stderr)
    name = args.llm or CHECKPOINT
    options = loading_options(args, name, 1, args.max_tokens + len(text.encode()) + len((args.ask or "").encode()))
    model, processor = load(name, max_image_tiles=args.max_image_tiles, **options)
    features = FeatureCache(CACHE / "visual-tokens", model, processor.image_config, name_of(name), by_fingerprint=True)
    # The demo describes, but was never taught to say yes or no.
    judge = Judge(model, processor, features, CAPTION if is_demo else YES_NO)
    by_name = {hit.path: hit for hit in hits if hit.path}
    with tqdm(by_name, desc="looking", unit="image", delay=0.5, disable=True if args.json else None) as names:
        matches = judge_all(judge, names, text)
    hits = [replace(by_name[name], match=match) for name, match in matches.items()]
    good = [hit for hit in hits if hit.match >= MATCH][: args.answers]
    if not args.ask or not good:
        return hits, None
    good = [replace(hit, answer=judge.answer(read_named(hit.path), args.ask, args.max_tokens)) for hit in good]
    answer = good[0].answer if len(good) == 1 else None
    if answer is None and not is_demo:  # which knows images only
        answer = judge.summarize([hit.answer for hit in good], args.ask, args.max_tokens)
    return [*good, *hits[len(good) :]], answer

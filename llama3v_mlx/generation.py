"""Load a checkpoint and generate answers: the Python interface, modelled on mlx-lm's and mlx-vlm's."""

import contextlib
import functools
import inspect
import io
import itertools
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx_lm.processors
from mlx.utils import tree_flatten
from mlx_lm.generate import GenerationResponse as MLXResponse
from mlx_lm.generate import generate_step
from mlx_lm.generate import stream_generate as mlx_stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .checkpoint import MODEL_TYPE, find_checkpoint, read_config, read_generation_config
from .device import on_gpu, select
from .drafting.draft_model import DraftModel, load_draft_model
from .drafting.drafters import Drafter, Forced, NGrams
from .drafting.stream import stream_generate as drafted_stream_generate
from .drafting.verify import can_draft, drafted_passes
from .features.lookup import FeatureCache
from .files import printable
from .image import ImageSource, expand
from .loading import load_adapters, load_model, model_tensors
from .models import llama3v as model_module
from .models.llama3v import Model
from .prompt import Processor, Prompt
from .sampling import Sampling, on_generated
from .schema import keep_to, schemas_of
from .tokenizer import load_tokenizer

VISION = ("vision_tower.", "projector.")
Images = ImageSource | Sequence[ImageSource] | None


@dataclass
class GenerationResponse(MLXResponse):
    """mlx-lm's response, with statistics of the images."""

    num_tiles: int = 0
    visual_tokens: int = 0
    preprocess_seconds: float = 0.0  # decoding, resizing, tokenizing
    vision_seconds: float = 0.0  # tower and projector
    prefill_seconds: float = 0.0  # Llama, until the first token
    stored_images: int = 0  # images found in the feature store, neither decoded nor encoded
    passes: int = 0  # through Llama for the answer; fewer than its tokens where drafts were accepted


def load(
    path_or_hf_repo: str | Path,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    max_image_tiles: int | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    low_memory: bool = False,
) -> tuple[Model, Processor]:
    """Load a converted or unconverted checkpoint.

    Args:
        path_or_hf_repo: a folder, or a Hub repository.
        revision: a branch, tag or commit of the repository.
        dtype: dtype of floating-point tensors; by default float32 on a CPU, where half precision is slow, otherwise
            they are not cast.
        max_image_tiles: maximum number of tiles per image, including the overview.
        adapter_path: a folder of adapters, from `llama3v train` or mlx-lm's own training.
        lazy: read the weights when they are first used.
        low_memory: keep tower and projector in memory only while an image is encoded, and Llama from its first token
            on. Answers are the same; each image takes longer by the time needed to read them. See `check_memory` for
            the memory that a checkpoint needs.

    Returns:
        The model and its processor, which has the tokenizer and the checkpoint's sampling parameters.

    Raises:
        CheckpointError: if there is no usable checkpoint.
        ValueError: if `LLAMA3V_DEVICE` does not name an available device.
    """
    folder = find_checkpoint(path_or_hf_repo, revision)
    config = read_config(folder)
    select()
    if dtype is None and not on_gpu():
        dtype = mx.float32
    model = load_model(folder, config, dtype, lazy or low_memory)
    on_disk = dict(tree_flatten(model.parameters()))
    if adapter_path is not None:
        load_adapters(model, adapter_path)
    if low_memory:
        # A projector from the adapters is not in the folder, so it stays in memory.
        now = dict(tree_flatten(model.parameters()))
        names = [n for n in on_disk if n.startswith(VISION) and now[n] is on_disk[n]]
        model.reload_vision = functools.partial(model_tensors, folder, dtype, names)
    tokenizer = load_tokenizer(folder, config)
    sampling = Sampling.from_config(read_generation_config(folder, config))
    processor = Processor.from_config(config, tokenizer).with_max_tiles(max_image_tiles)
    return model, replace(processor, sampling=sampling)


def stream_generate(
    model: Model,
    processor: Processor,
    prompt: str | Sequence[dict] | Sequence[int] | Prompt,
    image: Images = None,
    *,
    system_prompt: str | None = None,
    max_tokens: int = 1024,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    features: FeatureCache | None = None,
    schema: dict | None = None,
    draft: Literal["auto"] | None = "auto",
    draft_model: DraftModel | str | Path | None = None,
    history: Sequence[int] = (),
    **kwargs: Any,
) -> Generator[GenerationResponse, None, None]:
    """Stream the answer to a question about images.

    Args:
        model: from `load`.
        processor: from `load`.
        prompt: a question, messages, a templated text, or ids, see `Processor.encode`; or the encoded `Prompt`.
        image: one image or several; None for a text-only prompt. The path of a PDF stands for its pages.
        system_prompt: precedes a question or messages; not allowed with other prompts.
        max_tokens: maximum number of tokens to generate, limited by the remaining context; -1: no other limit.
        temperature, top_p, top_k, min_p, repetition_penalty: see `Sampling`; by default the checkpoint's.
        features: a store to look images up in and to add new ones to.
        schema: a JSON schema that the answer keeps to (`pip install 'llama3v-mlx[json]'`).
        draft: "auto": draft tokens from the conversation and the schema, and verify several in one pass, for the same
            answer in fewer passes; None: one token per pass.
        draft_model: a small Llama of the same vocabulary that also drafts: from `load_draft_model`, which keeps its
            cache between answers, or a folder or Hub repository.
        history: ids that precede the prompt in `prompt_cache`, to draft from.
        kwargs: arguments of mlx-lm's `generate_step` (`kv_bits`, `prompt_cache`, `sampler`, `logits_processors`, …).

    Yields:
        A response per generated token.

    Raises:
        ValueError: if the prompt is malformed or longer than the context, or an option out of its range.
        ImageError: if an image cannot be used.
    """
    known = inspect.signature(generate_step).parameters.keys() | inspect.signature(drafted_passes).parameters.keys()
    if unknown := kwargs.keys() - known:
        raise TypeError(f"stream_generate() got an unexpected keyword argument {min(unknown)!r}")
    if max_tokens == 0:
        raise ValueError("max_tokens is 0; it must be 1 or more, or -1 for as many as the context has room for")
    tic = time.perf_counter()
    images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
    images = [each for source in images for each in expand(source)]
    processor.check_pages(images, model.language_model.args.max_position_embeddings)
    tiler = features.tile if features else None
    encoded = replace(processor, tiler=tiler).encode(prompt, images, system_prompt)
    length, context = len(encoded.ids), model.language_model.args.max_position_embeddings
    cached = kwargs["prompt_cache"][0].offset if kwargs.get("prompt_cache") else 0
    check_length(cached + length, context)
    ids = mx.array(encoded.ids)
    preprocess_seconds = time.perf_counter() - tic

    tic = time.perf_counter()
    if encoded.images:
        encode = features.encode if features else model.encode_image
        kwargs["input_embeddings"] = model.splice(ids, [image.grid for image in encoded.images], encode(encoded.images))
        # The prefill runs on another stream, where the rows must be ready.
        mx.eval(kwargs["input_embeddings"])
    vision_seconds = time.perf_counter() - tic

    own = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    sampling = processor.sampling.override(**own, repetition_penalty=repetition_penalty)
    processors = list(kwargs.pop("logits_processors", sampling.logits_processors(length)) or ())
    matcher = None
    if schema is not None:
        try:
            matcher = schemas_of(processor.tokenizer, model.language_model.args.vocab_size).matcher(schema)
        except ValueError as e:
            raise ValueError(f"schema: {e}") from e
        processors.append(on_generated(keep_to(matcher), length))
    tiles = sum(image.num_tiles for image in encoded.images)
    if context:
        room = context - cached - length
        max_tokens = room if max_tokens < 0 else min(max_tokens, room)
    kwargs = {"sampler": sampling.sampler(), **kwargs, "logits_processors": processors}
    if draft_model is not None:
        if not isinstance(draft_model, DraftModel):
            draft_model = load_draft_model(draft_model, processor, model.language_model.args.vocab_size)
        draft_model.sampler = kwargs["sampler"]
    drafters: list[Drafter] = [] if draft_model is None else [draft_model]
    if draft is not None:
        forced = [] if matcher is None else [Forced(matcher, len(history) + length)]
        drafters = [*forced, NGrams(processor.prompt_tokens.image), *drafters]
    # mlx-lm's own loop takes other caches and streams.
    cache = kwargs.get("prompt_cache") or make_prompt_cache(model)
    if kwargs.keys() & {"max_kv_size", "stream"} or not can_draft(cache):
        if draft_model is not None:
            raise ValueError("a draft model needs a cache from which tokens can be removed, not a rotating one")
        drafters = []
    if drafters:
        options = {"known": history, **kwargs}
        answer = drafted_stream_generate(model, processor.tokenizer, ids, drafters, max_tokens, **options)
    else:
        responses = mlx_stream_generate(model, processor.tokenizer, ids, max_tokens=max_tokens, **kwargs)
        answer = ((response, response.generation_tokens) for response in responses)
    # mlx-lm warns on stdout about models that nearly fill the memory; only the answer belongs there.
    warning = io.StringIO()
    with contextlib.redirect_stdout(warning):
        first = list(itertools.islice(answer, 1))
    _print_once(warning.getvalue())
    for response, passes in itertools.chain(first, answer):
        yield GenerationResponse(
            **vars(response),
            num_tiles=tiles,
            visual_tokens=tiles * processor.num_queries,
            preprocess_seconds=preprocess_seconds,
            vision_seconds=vision_seconds,
            prefill_seconds=length / response.prompt_tps,
            stored_images=sum(not image.tiles for image in encoded.images),
            passes=passes,
        )


def check_length(length: int, context: int) -> None:
    """Raise ValueError if a prompt of `length` tokens leaves no room for an answer; a context of 0 has no limit."""
    if context and length >= context:
        raise ValueError(
            f"the prompt of {length} tokens is too long for the context of {context}; use fewer or smaller images, "
            "fewer tiles per image, or less text"
        )


def generate(
    model: Model,
    processor: Processor,
    prompt: str | Sequence[dict] | Sequence[int],
    image: Images = None,
    *,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """Generate a whole answer; `verbose` streams it to stdout with statistics. Arguments: see `stream_generate`."""
    responses = stream_generate(model, processor, prompt, image, **kwargs)
    text = print_answer(responses) if verbose else "".join(response.text for response in responses)
    return text.strip()


def print_answer(responses: Iterable[GenerationResponse], frame: bool = True) -> str:
    """Print an answer as it is generated, optionally with mlx-lm's frame and statistics, and return it.

    Nothing is printed before the first response, so stdout stays empty on an error.
    """
    text = ""
    for i, response in enumerate(responses):
        if frame and i == 0:
            print("=" * 10)
        print(printable(response.text, keep="\n\t"), end="", flush=True)
        text += response.text
    print()
    if frame:
        print("=" * 10)
        print(statistics(response))
    return text


@functools.cache
def _print_once(text: str) -> None:
    print(text, end="", file=sys.stderr)


def statistics(response: GenerationResponse) -> str:
    """Format mlx-lm's statistics from the last response of an answer, with a line for the images."""
    lines = [
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec"
        + (f" ({response.passes} passes)" if response.passes < response.generation_tokens else ""),
        f"Peak memory: {response.peak_memory:.3f} GB",
    ]
    if response.num_tiles:
        lines.append(
            f"Image: {response.num_tiles} tiles, {response.visual_tokens} visual tokens, preprocess "
            f"{response.preprocess_seconds:.3f} s, vision {response.vision_seconds:.3f} s, prefill "
            f"{response.prefill_seconds:.3f} s"
            + (f"; {response.stored_images} from the feature store" if response.stored_images else "")
        )
    return "\n".join(lines)


def register() -> None:
    """Register Llama3-V with mlx-lm: its `load`, `stream_generate`, `generate` and server then take our checkpoints."""
    sys.modules[f"mlx_lm.models.{MODEL_TYPE}"] = model_module
    mlx_lm.processors.PROCESSORS[MODEL_TYPE] = Processor


class Llama3V:
    """Interface of the original README: `Llama3V.from_pretrained(path).generate(image=…, message=…)`."""

    def __init__(self, model: Model, processor: Processor):
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(cls, path_or_hf_repo: str | Path, **kwargs: Any) -> "Llama3V":
        """Load a checkpoint; the arguments are those of `load`."""
        return cls(*load(path_or_hf_repo, **kwargs))

    @property
    def tokenizer(self) -> TokenizerWrapper:
        return self.processor.tokenizer

    def generate(self, image: Images = None, message: str = "", tokenizer: Any = None, **kwargs: Any) -> str:
        """Answer a message about images.

        Args:
            image: one image, several, or None.
            message: the question.
            tokenizer: a Hugging Face tokenizer to use instead of the checkpoint's own.
            kwargs: see `stream_generate`.
        """
        processor = self.processor
        if tokenizer is not None and tokenizer is not processor.tokenizer:
            wrapped = TokenizerWrapper(tokenizer, eos_token_ids=list(processor.tokenizer.eos_token_ids))
            processor = replace(processor, tokenizer=wrapped)
        return generate(self.model, processor, message, image, **kwargs)

"""Assemble a new Llama3-V from two published models, Google's SigLIP and Meta's Llama 3, and a fresh projector."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint import (
    CONFIG,
    RELEASED_TYPES,
    CheckpointError,
    find_checkpoint,
    make_config,
    read_config,
    read_json,
    read_tensors,
)
from ..config import llama_config, read_dtype
from ..features.encoder import vision_config
from ..models.projector import ProjectorConfig, build_projector
from ..models.released import rename
from ..prompt_tokens import BOS, PromptTokens
from ..tokenizer import TOKENIZER, TOKENIZER_CONFIG, token_ids, tokenizer_config

NUM_QUERIES = 96  # of a resampler, as in the released one
RESERVED = "<|reserved_special_token_"
# Llama 3's reserved tokens that the released tokenizer renames, by their offset from BOS.
RELEASED_TOKENS = {2: "<unk>", 10: "<image>", 11: "</image>", 12: "<ref>", 13: "</ref>", 14: "<box>", 15: "</box>"}
RELEASED_TOKENS |= {16: "<quad>", 17: "</quad>", 18: "<point>", 19: "</point>", 20: "<slice>", 21: "</slice>"}


@contextlib.contextmanager
def assemble(
    vision: str | Path, llm: str | Path, projector: str = "resampler", seed: int = 0
) -> Iterator[tuple[Path, dict[str, mx.array]]]:
    """Combine two checkpoints into one in our layout, without reading the tensors.

    Args:
        vision: folder or Hub repository of a SigLIP with a fixed image size.
        llm: folder or Hub repository of a Llama 3, whose reserved tokens become the image tokens, or of a Llama3-V,
            whose Llama is used.
        projector: "resampler" (96 queries) or "self-attention" (the article's; one visual token per patch).
        seed: seed of the projector's weights.

    Yields:
        A temporary folder with config and tokenizer, and the lazy tensors by name.

    Raises:
        CheckpointError: if either is another kind of model, or the tokenizer lacks the reserved tokens.
    """
    eyes, words = find_checkpoint(vision), find_checkpoint(llm)
    tower = vision_config(eyes)
    config = read_json(words / CONFIG)
    if config.get("quantization") or config.get("quantization_config"):
        raise CheckpointError(f"{words}: is quantized; use the original, and quantize the result")
    if config.get("model_type") in RELEASED_TYPES:
        config = read_config(words)
        text, dtype = config["text_config"], config.get("dtype")
    elif config.get("model_type") == "llama":
        text, dtype = llama_config(words / CONFIG, config), read_dtype(words / CONFIG, config)
    else:
        raise CheckpointError(f"{words / CONFIG}: model_type is {config.get('model_type')!r}; --llm takes a Llama 3")

    side = tower.image_size // tower.patch_size
    queries = NUM_QUERIES if projector == "resampler" else side * side
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_tokenizer(words, folder)
        ids = dict(zip(PromptTokens.TEXTS, token_ids(folder, PromptTokens.TEXTS.values()), strict=True))
        joined = make_config(
            folder,
            dtype=dtype or "float16",
            text=text,
            bos=token_ids(folder, [BOS])[0],
            eos=token_ids(folder, ["<|end_of_text|>"]),
            vision={**vars(tower), "vision_use_head": False},
            projector={"projector_type": projector, "num_queries": queries},
            image={
                "scale_resolution": side * tower.patch_size,
                "patch_size": tower.patch_size,
                "max_slice_nums": 1,
                "square": True,
            },
            prompt_tokens=ids if projector == "resampler" else {"image": ids["image"]},
        )
        (folder / CONFIG).write_text(json.dumps(joined))
        tensors = {
            name: tensor
            for name, tensor in read_tensors(eyes).items()
            if name.startswith("vision_model.")
            and not name.startswith("vision_model.head.")
            and not name.endswith("position_ids")
        }
        tensors |= _llama(read_tensors(words), whole=config["model_type"] == "llama")
        tensors |= _new_projector(ProjectorConfig.from_dict(joined["projector_config"]), seed)
        yield folder, tensors


def _llama(tensors: dict[str, mx.array], whole: bool) -> dict[str, mx.array]:
    """Llama's tensors: all of a Llama checkpoint, or the language model of a Llama3-V."""
    if whole:
        return {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    named = ((rename(name), tensor) for name, tensor in tensors.items())
    return {name: tensor for name, tensor in named if name.startswith("language_model.")}


def _new_projector(config: ProjectorConfig, seed: int) -> dict[str, mx.array]:
    mx.random.seed(seed)
    projector = build_projector(config)
    if config.projector_type == "resampler":
        projector.query = 0.02 * mx.random.normal(projector.query.shape)
    return {f"projector.{name}": tensor for name, tensor in tree_flatten(projector.parameters())}


def _write_tokenizer(source: Path, folder: Path) -> None:
    """Write Llama 3's tokenizer with reserved tokens renamed as in the released one."""
    settings = tokenizer_config(source)
    tokenizer = read_json(source / TOKENIZER)
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    first = next((id for id, token in added.items() if token["content"] == BOS), None)
    if first is None:
        raise CheckpointError(f"{source / TOKENIZER}: has no {BOS}; --llm takes a Llama 3")
    for place, name in RELEASED_TOKENS.items():
        token = added.get(first + place)
        if token is None or not (token["content"] == name or token["content"].startswith(RESERVED)):
            found = token["content"] if token else "nothing"
            raise CheckpointError(
                f"{source / TOKENIZER}: {name} needs the reserved id {first + place}, which is {found}"
            )
        token["content"] = name
    (folder / TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / TOKENIZER_CONFIG).write_text(json.dumps({**settings, "unk_token": "<unk>"}), encoding="utf-8")

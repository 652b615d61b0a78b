"""A small Llama of the same vocabulary as a drafter; it reads the conversation without its images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import greedy_sampler
from tokenizers import Tokenizer

from ..checkpoint import CONFIG, CheckpointError, cast, check_tensors, find_checkpoint, read_tensors
from ..config import check_heads, check_quantization, llama_config, one_line, read_json
from ..device import on_gpu
from ..loading import quantize_as_saved
from ..models.llama3v import PREFILL_STEP
from ..prompt import Processor
from ..sampling import Sampler
from ..tokenizer import TOKENIZER
from .budget import MOST, Budget


class DraftModel:
    """Draft with a language model, whose cache is kept from one answer of a conversation to the next.

    Args:
        model: mlx-lm's Llama.
        placeholder: id of an image's tokens, which it does not read.
        sampler: what the model draws with; it also draws with a copy of a `Sampler`, and otherwise greedily.
    """

    waits = True

    def __init__(self, model: llama.Model, placeholder: int, sampler: Callable[[mx.array], mx.array] = greedy_sampler):
        self._model, self._placeholder = model, placeholder
        self.sampler = sampler
        self._cache = make_prompt_cache(model)
        self._read: list[int] = []  # tokens in the cache
        self.begin()

    # The methods of a `Drafter`.

    def begin(self) -> None:
        self.budget = Budget()
        self._text: list[int] = []
        self._same = 0  # tokens of the cache that are known to be the conversation's

    def see(self, tokens: Sequence[int]) -> None:
        self._text += [token for token in tokens if token != self._placeholder]

    def is_likely(self) -> bool:
        context = self._model.args.max_position_embeddings
        return not context or len(self._text) + MOST <= context

    def draft(self, most: int) -> list[int]:
        if not self._text or not self.is_likely():
            return []
        logits = self._catch_up()
        # With the same random numbers as the model will: where both expect the same, they draw the same tokens.
        sampler = self.sampler.copy() if isinstance(self.sampler, Sampler) else greedy_sampler
        tokens: list[mx.array] = []
        for i in range(most):
            if i:
                logits = self._model(tokens[-1][None], cache=self._cache)[:, -1]
            tokens.append(sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
        drafted = mx.concatenate(tokens).tolist()
        self._read += drafted[:-1]
        return drafted

    def _catch_up(self) -> mx.array:
        """Read what the cache lacks of the conversation; return the logits (1, vocab_size) after its last token."""
        both = zip(self._read[self._same :], self._text[self._same : -1], strict=False)
        for read, token in both:
            if read != token:
                break
            self._same += 1
        trim_prompt_cache(self._cache, self._cache[0].offset - self._same)
        *new, last = self._text[self._same :]
        for start in range(0, len(new), PREFILL_STEP):
            self._model(mx.array([new[start : start + PREFILL_STEP]]), cache=self._cache)
            mx.eval([cache.state for cache in self._cache])
        logits = self._model(mx.array([[last]]), cache=self._cache)[:, -1]
        self._read = list(self._text)
        self._same = len(self._text)
        return logits


def load_draft_model(
    path_or_hf_repo: str | Path, processor: Processor, vocab_size: int, dtype: mx.Dtype | None = None
) -> DraftModel:
    """Load a Llama in Hugging Face's or mlx-lm's layout as a draft model.

    Args:
        path_or_hf_repo: a folder, or a Hub repository.
        processor: of the model that verifies its drafts.
        vocab_size: of that model.
        dtype: dtype of floating-point tensors; by default float32 on a CPU, otherwise they are not cast.

    Raises:
        CheckpointError: if it is not a Llama, is damaged, or has another vocabulary.
    """
    folder = find_checkpoint(path_or_hf_repo)
    config = read_draft_config(folder)
    _check_vocabulary(folder, config["vocab_size"], processor, vocab_size)
    tensors = cast(read_tensors(folder), mx.float32 if dtype is None and not on_gpu() else dtype)
    try:
        model = llama.Model(llama.ModelArgs.from_dict(config))
        tensors = model.sanitize(tensors)
        quantize_as_saved(model, config["quantization"], tensors)
    except (TypeError, ValueError, KeyError, ArithmeticError) as e:
        raise CheckpointError(f"{folder / CONFIG}: {one_line(e)}") from e
    check_tensors(folder, model, tensors)
    model.load_weights(list(tensors.items()))
    model.eval()
    mx.eval(model.parameters())
    return DraftModel(model, processor.prompt_tokens.image)


def read_draft_config(folder: Path) -> dict:
    """Read the config of a draft model: the arguments of mlx-lm's Llama, and `quantization`.

    Raises:
        CheckpointError: if it is missing, damaged, or not a Llama's.
    """
    path = folder / CONFIG
    config = read_json(path)
    if config.get("model_type") != "llama":
        raise CheckpointError(f"{path}: model_type is {config.get('model_type')!r}; a draft model is a llama")
    text = llama_config(path, config)
    check_heads(f"{path}: llama", text)
    quantization = config.get("quantization")
    if quantization is not None:
        check_quantization(f"{path}: quantization", quantization)
    return {**text, "quantization": quantization}


def _check_vocabulary(folder: Path, size: int, processor: Processor, vocab_size: int) -> None:
    """Raise a CheckpointError if a draft model's ids do not mean the same text; special tokens may be renamed."""
    path = folder / TOKENIZER
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {TOKENIZER}; a draft model needs the vocabulary it was trained with")
    try:
        theirs = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=False)
    except Exception as e:  # the Rust parser raises bare Exceptions
        raise CheckpointError(f"{path}: damaged ({one_line(e)}); download it again") from e
    ours = processor.tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    if theirs != ours or size != vocab_size:
        raise CheckpointError(
            f"{folder}: has another vocabulary ({size} tokens) than the model ({vocab_size}); "
            "a draft model must share it, such as Llama-3.2-1B for Llama-3-8B"
        )

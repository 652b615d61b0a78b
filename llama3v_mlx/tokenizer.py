"""The tokenizer of a checkpoint: loaded from its tokenizer.json alone, checked, and given our chat template."""

import os
from collections.abc import Iterable
from pathlib import Path

from .config import one_line, read_json, some
from .fields import CheckpointError, Flag, Text
from .files import check_file
from .prompt_tokens import BOS, EOT, HEADER_END, HEADER_START, chat_template

TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


def load_tokenizer(folder: Path, config: dict):
    """Load mlx-lm's wrapped tokenizer from the tokenizer.json of a folder, with our chat template.

    Args:
        folder: the checkpoint.
        config: its config, from `read_config`.

    Raises:
        CheckpointError: if it is missing or damaged, lacks the tokens of the prompt format, or has ids beyond the
            model's vocabulary, which MLX would not notice.
    """
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
    from transformers import PreTrainedTokenizerFast

    path, settings = _tokenizer_file(folder), tokenizer_config(folder)
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **settings)
        vocabulary = tokenizer.get_vocab()
        wrapped = TokenizerWrapper(tokenizer, BPEStreamingDetokenizer, eos_token_ids=config["eos_token_id"])
    except Exception as e:  # the Rust parser raises bare Exceptions
        raise CheckpointError(f"{path}: damaged ({one_line(e)}); download it again") from e
    if missing := [token for token in (BOS, EOT, HEADER_START, HEADER_END) if token not in vocabulary]:
        raise CheckpointError(f"{path}: lacks {', '.join(missing)}; is this the tokenizer of these weights?")
    size = config["text_config"]["vocab_size"]
    if beyond := [token for token, id in vocabulary.items() if id >= size]:
        raise CheckpointError(f"{path}: {some('token', beyond)} beyond the model's vocabulary of {size}")
    tokenizer.chat_template = chat_template(tokenizer.all_special_tokens + list(tokenizer.get_added_vocab()))
    return wrapped


def _tokenizer_file(folder: Path) -> Path:
    path = folder / TOKENIZER
    try:
        check_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {TOKENIZER}; copy it from the repository of the weights") from None
    except OSError as e:
        raise CheckpointError(f"{path}: {one_line(e)}") from e
    return path


def tokenizer_config(folder: Path) -> dict:
    """Read the tokenizer settings that a plain fast tokenizer needs; class and code names are ignored."""
    path = folder / TOKENIZER_CONFIG
    config = read_json(path) if os.path.lexists(path) else {}
    clean_up = config.get("clean_up_tokenization_spaces")
    kept = {"clean_up_tokenization_spaces": True if clean_up is None else clean_up}
    Flag().check(f"{path}: clean_up_tokenization_spaces", kept["clean_up_tokenization_spaces"])
    for key, default in (
        ("bos_token", "<|begin_of_text|>"),
        ("eos_token", "<|end_of_text|>"),
        ("unk_token", "<unk>"),
        ("pad_token", "!"),
    ):
        token = config.get(key) or default
        kept[key] = token.get("content") if isinstance(token, dict) else token
        Text().check(f"{path}: {key}", kept[key])
    return kept


def token_ids(folder: Path, texts: Iterable[str]) -> list[int]:
    """Look up the single id of each text in a folder's tokenizer."""
    from tokenizers import Tokenizer

    path = _tokenizer_file(folder)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:
        raise CheckpointError(f"{path}: damaged ({one_line(e)}); download it again") from e
    tokenizer.no_padding()  # which the file may have from the tokenizer's last use
    tokenizer.no_truncation()
    ids = []
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False).ids
        if len(encoded) != 1:
            raise CheckpointError(f"{path}: {text!r} is not a single token; is this the tokenizer of these weights?")
        ids += encoded
    return ids

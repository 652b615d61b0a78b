"""Convert a checkpoint to MLX: `llama3v convert --hf-path DIR_OR_REPO --mlx-path DIR -q`.

The weights are streamed, so that a full-size checkpoint takes a few GB of memory. The new folder gets its name only
when it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import positive, run
from .conversion.options import DTYPES, MODES, RECIPES, SENSITIVE, check_prompts, check_quantization, check_sources
from .fields import CheckpointError
from .files import existing, new_folder, printable, write_beside, writing

if TYPE_CHECKING:
    import mlx.core as mx

    from .conversion.rows import Row
    from .conversion.shard_writer import Plan

CARD = "README.md"
SPARE_BYTES = 100_000_000  # of disk space, beyond the tensors: tokenizer, headers and some margin


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama3v convert",
        usage="llama3v convert --hf-path MODEL [--mlx-path DIR] [-q] [options]\n"
        "       llama3v convert --vision MODEL --llm MODEL [--mlx-path DIR] [options]",
        description="Convert a Llama3-V checkpoint to MLX.",
    )
    parser.add_argument("--hf-path", "--model", help="folder or Hub repository of the checkpoint")
    parser.add_argument("--mlx-path", default="mlx_model", help="new folder (default: mlx_model)")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of everything not quantized (default: as in config.json)"
    )
    joining = parser.add_argument_group("assemble a new model to train from two published ones, instead of --hf-path")
    joining.add_argument("--vision", help="SigLIP checkpoint, such as google/siglip-so400m-patch14-384")
    joining.add_argument("--llm", help="Llama 3 checkpoint, such as meta-llama/Meta-Llama-3-8B-Instruct, or a Llama3-V")
    joining.add_argument("--projector", choices=("resampler", "self-attention"), help="(default: resampler)")
    joining.add_argument("--seed", type=int, help="seed of the projector's weights (default: 0)")
    quantization = parser.add_argument_group("quantization of the language model")
    quantization.add_argument("-q", "--quantize", action="store_true", help="quantize the language model")
    quantization.add_argument("--q-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="bits per weight (default: 4)")
    quantization.add_argument("--q-group-size", type=int, choices=(16, 32, 64, 128), help="group size (default: 64)")
    quantization.add_argument("--q-mode", choices=MODES, default="affine", help="quantization mode (default: affine)")
    quantization.add_argument(
        "--quant-predicate",
        choices=(*RECIPES, SENSITIVE),
        help="mlx-lm's mixed-bit recipe; or sensitive: bits by what they do to the answers to --calibrate",
    )
    quantization.add_argument(
        "--q-target-bpw", type=float, metavar="BITS", help="with sensitive: bits per weight of all of Llama"
    )
    calibration = parser.add_argument_group("calibration of the quantization, affine only")
    calibration.add_argument("--calibrate", metavar="FILE", help="prompts with images to calibrate with (GPTQ)")
    calibration.add_argument("--image-folder", metavar="DIR", help="folder of their images (default: the file's)")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the result with its source; with an existing --mlx-path, do only that",
    )
    parser.add_argument(
        "--verify-data", metavar="FILE", help="prompts to verify with (default: the last ones of --calibrate)"
    )
    parser.add_argument("--verify-prompts", metavar="N", type=positive, help="number of prompts (default: up to 32)")
    parser.add_argument("--upload-repo", metavar="REPO", help="Hub repository to upload the result to")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    debug = options.pop("debug")
    try:
        check_quantization(**{key: options[key] for key in options if key.startswith("q")})
        new = {key: options[key] for key in ("vision", "llm", "projector", "seed")}
        check_sources(options["hf_path"], new, options["verify"])
        check_prompts(options, new)
    except ValueError as e:
        parser.error(str(e))
    run(lambda: convert(**options), debug, awake=True)


def convert(
    hf_path: str | Path | None = None,
    mlx_path: str | Path = "mlx_model",
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    quant_predicate: str | None = None,
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    verify: bool = False,
    vision: str | Path | None = None,
    llm: str | Path | None = None,
    projector: str | None = None,
    seed: int | None = None,
    calibrate: str | Path | None = None,
    image_folder: str | Path | None = None,
    verify_data: str | Path | None = None,
    verify_prompts: int | None = None,
    q_target_bpw: float | None = None,
) -> None:
    """Convert a checkpoint to MLX within a few GB of memory, and print a summary.

    Args:
        hf_path: a folder, or a Hub repository, of llama3v, MiniCPM-Llama3-V-2.5, or an unquantized conversion.
        mlx_path: the new folder; it must not exist.
        quantize: quantize the language model; tower and projector never are, see `Model.quant_predicate`.
        q_bits: bits per weight (default: 4, or the bits of `q_mode`).
        q_group_size: weights that share a scale (default: 64, or the group size of `q_mode`).
        q_mode: affine, mxfp4, nvfp4 or mxfp8.
        quant_predicate: mlx-lm's mixed-bit recipe: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6; or sensitive: see
            `conversion.sensitivity`.
        dtype: float16, bfloat16 or float32, of everything not quantized (default: as in the source's config).
        upload_repo: a Hub repository to upload the result to.
        revision: a branch, tag or commit of the repository `hf_path`.
        verify: compare the result with its source; if `mlx_path` exists, do only that.
        vision, llm, projector, seed: see `assemble`; used instead of `hf_path`, for a new model.
        calibrate: a file of prompts with images, see `conversion.rows`, to quantize with GPTQ.
        image_folder: folder that its image paths start from (default: the file's).
        verify_data: a file of prompts to compare the result with its source on (default: rows of `calibrate` that were
            not used; without either, one question about one image).
        verify_prompts: number of its rows, from the end (default: 32).
        q_target_bpw: bits per weight that `sensitive` keeps to; Llama's embedding, scales and biases are counted.

    Raises:
        ValueError: if options exclude each other, or a row cannot be used.
        MemoryLimitError: if the memory is too small to calibrate in.
        CheckpointError: if the source cannot be converted.
        OSError: if `mlx_path` exists or cannot be written.
    """
    tic = time.perf_counter()
    mlx_path = Path(mlx_path).expanduser()
    quantization = check_quantization(quantize, q_bits, q_group_size, q_mode, quant_predicate, q_target_bpw)
    new = {"vision": vision, "llm": llm, "projector": projector, "seed": seed}
    check_sources(hf_path, new, verify)
    files = {"calibrate": calibrate, "image_folder": image_folder}
    files |= {"verify_data": verify_data, "verify_prompts": verify_prompts}
    own = {"quantize": quantize, "q_mode": q_mode, "quant_predicate": quant_predicate, "verify": verify}
    check_prompts({**own, **files}, new)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if verify and mlx_path.is_dir() and not (quantize or dtype or upload_repo):
        _verify(hf_path, revision, mlx_path, files)
        return
    if os.path.lexists(mlx_path):
        way_out = ", or --verify alone to verify it" if verify else ""
        raise FileExistsError(f"{mlx_path} exists already; remove it, or give another --mlx-path{way_out}")
    if upload_repo is not None:
        _check_upload(upload_repo)

    from .conversion.card import model_card
    from .conversion.rows import read_sets
    from .conversion.shard_writer import make_plan

    with _source(hf_path, revision, new, _share(mlx_path, quantization, dtype)) as (folder, tensors, origin):
        config = _new_config(folder, dtype)
        rows, held_out = read_sets(folder, config, verify, **files)
        recipe = None if quant_predicate == SENSITIVE else quant_predicate
        plan = make_plan(folder, config, tensors, quantization, recipe)
        if quant_predicate == SENSITIVE:
            from .conversion.sensitivity import choose_bits

            chosen = choose_bits(folder, plan, rows, q_target_bpw)
            plan = make_plan(folder, config, tensors, quantization, chosen)
        if quantization:
            overrides = {path: own for path, own in plan.quantized.items() if own != quantization}
            config["quantization"] = config["quantization_config"] = {**quantization, **overrides}
        card = functools.partial(model_card, origin, upload_repo or mlx_path.name, config, plan)
        with new_folder(mlx_path, plan.num_bytes + SPARE_BYTES) as partial:
            try:
                num_shards, used = _write(folder, partial, tensors, plan, _texts(folder, config), rows)
            except CheckpointError as e:  # about a tensor
                raise CheckpointError(f"{origin}: {e}") from e
            (partial / CARD).write_text(card(used), encoding="utf-8")
    print(
        f"{printable(str(mlx_path))}: {plan.num_bytes / 1e9:.3f} GB in {num_shards} shard{'s' * (num_shards > 1)}, "
        f"{8 * plan.num_bytes / plan.num_parameters:.2f} bits per weight, {time.perf_counter() - tic:.1f} s, "
        f"peak memory {_peak_memory() / 1e9:.2f} GB"
    )
    if verify:
        comparison = _verify(hf_path, revision, mlx_path, held_out)
        write_beside(mlx_path / CARD, card(used, comparison).encode())
    if upload_repo:
        _upload(mlx_path, upload_repo)


@contextlib.contextmanager
def _source(
    hf_path: str | Path | None, revision: str | None, new: dict, share: float
) -> Iterator[tuple[Path, dict, str]]:
    """Folder of config and tokenizer, lazy tensors, and a description of the source for the model card."""
    if hf_path is None:
        from .conversion.assemble import assemble

        with assemble(**{key: value for key, value in new.items() if value is not None}) as (folder, tensors):
            yield folder, tensors, f"{new['vision']} and {new['llm']}, with a projector that is not trained yet"
        return
    from .checkpoint import find_checkpoint, read_tensors

    folder = find_checkpoint(hf_path, revision, share)
    yield folder, read_tensors(folder), str(hf_path)


def _share(mlx_path: Path, quantization: dict | None, dtype: str | None) -> float:
    """About how large the result is, as a share of a half-precision source; 0 if it goes to another disk."""
    from huggingface_hub import constants

    devices = [os.stat(existing(path)).st_dev for path in (mlx_path.absolute().parent, Path(constants.HF_HUB_CACHE))]
    if devices[0] != devices[1]:
        return 0.0
    if quantization:
        return (quantization["bits"] + 1.5) / 16  # scales and biases, and what is not quantized
    return 2.0 if dtype == "float32" else 1.0


def _new_config(folder: Path, dtype: str | None) -> dict:
    """Config of the conversion, before quantization."""
    from . import checkpoint as ck

    raw, config = ck.read_json(folder / ck.CONFIG), ck.read_config(folder)
    if raw.get("quantization") or raw.get("quantization_config"):
        raise CheckpointError(f"{folder}: is quantized already; convert the original checkpoint")
    config.pop("auto_map", None)
    config["dtype"] = dtype or config.get("dtype")
    if config["dtype"] not in DTYPES:
        raise CheckpointError(f"{folder / ck.CONFIG}: its dtype is {config['dtype']!r}; give --dtype")
    return config


def _texts(folder: Path, config: dict) -> dict[str, str]:
    """Text files of the conversion besides the index, tokenizer.json and the model card."""
    from . import checkpoint as ck
    from .tokenizer import CHAT_TEMPLATE, TOKENIZER_CONFIG, load_tokenizer, tokenizer_config

    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config(folder)}
    return {
        TOKENIZER_CONFIG: _json(tokenizer),
        CHAT_TEMPLATE: load_tokenizer(folder, config).chat_template,
        ck.GENERATION_CONFIG: _json(ck.read_generation_config(folder, config)),
        ck.CONFIG: _json(config),
    }


def _write(
    folder: Path, partial: Path, tensors: dict[str, mx.array], plan: Plan, texts: dict[str, str], rows: list[Row]
) -> tuple[int, list[Row]]:
    """Write all files but the model card; return the number of shards, and the rows that it was calibrated on."""
    from tqdm import tqdm

    from .conversion.shard_writer import ShardWriter, write_tensors
    from .tokenizer import TOKENIZER

    writer = ShardWriter(partial)
    if rows:
        from .conversion.calibrate import calibrate

        rows = calibrate(folder, plan, rows, writer, tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=total, desc="Converting", unit="B", unit_scale=True, disable=None) as bar:
        write_tensors(tensors, plan, writer, bar.update)
    with writing(partial):
        shutil.copyfile(folder / TOKENIZER, partial / TOKENIZER)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
    return len(writer.shards), rows


def _json(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _verify(source: str | Path, revision: str | None, result: Path, rows: dict | list[Row]) -> str:
    """Print a comparison of a conversion with its source on rows, or on those of the given options; sum it up."""
    from .checkpoint import find_checkpoint, read_config
    from .cli import note_slow_cpu
    from .conversion.agreement import verify_rows
    from .conversion.rows import read_sets
    from .conversion.verify import verify
    from .demo import IMAGES

    note_slow_cpu()
    tic = time.perf_counter()
    folder = find_checkpoint(source, revision)
    if isinstance(rows, dict):
        _, rows = read_sets(folder, read_config(folder), True, **rows)
    if rows:
        report = verify_rows(folder, find_checkpoint(result), rows)
    else:
        report = verify(folder, find_checkpoint(result), min(IMAGES.glob("*.png")))
    print(report)
    print(f"verified in {time.perf_counter() - tic:.1f} s, peak memory {_peak_memory() / 1e9:.2f} GB")
    return report.summary


def _check_upload(repo: str) -> None:
    """Check upload credentials before the conversion starts."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as e:
        raise OSError(f"--upload-repo {repo}: not logged in to the Hub; run hf auth login, or set HF_TOKEN") from e
    except HTTPError as e:
        raise OSError(f"{repo}: the Hub does not accept an upload now ({e})") from e


def _upload(folder: Path, repo: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, repo_type="model")
    except (HTTPError, OSError) as e:  # HTTPError: a lost connection
        raise OSError(f"{folder} is complete, but was not uploaded to {repo}: {e}") from e
    print(f"uploaded to {printable(str(url))}")


def _peak_memory() -> int:
    """Peak memory of this process in bytes: resident, or allocated by MLX if that is more."""
    import resource

    import mlx.core as mx

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(resident, mx.get_peak_memory())


if __name__ == "__main__":
    main()

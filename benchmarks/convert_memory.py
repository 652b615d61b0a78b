"""Convert a checkpoint of full size and measure the memory and the time it takes.

    python benchmarks/convert_memory.py                # 8.54 B parameters: 30 GB of disk, no network
    python benchmarks/convert_memory.py --layers 2     # a quick try

The checkpoint has random weights in the released layout: 741 float16 tensors named `llm.*`, `vison.*` and
`projection.*` in 3 files whose order is not that of the layers. `convert.py` makes it 4-bit in a process of its own.

Roofline: reading the source and writing as many bytes as the result has, plus quantizing alone; each is measured here,
one after the other, so a conversion that overlaps nothing has a ratio of 1. The source is dropped from the page cache
before it is read, for the conversion and for the roofline alike, where the system lets a program do that.
"""

import argparse
import json
import math
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, MLP, KV, VOCAB = 4096, 14336, 1024, 128256
VISION, VISION_MLP, VISION_LAYERS, PATCH = 1152, 4304, 27, 14
MEMORY_LIMIT, TIME_LIMIT = 4e9, 1.5
BLOCK = 16 << 20


def released_tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released llama3v weights, in the order of MiniCPM-Llama3-V-2.5's files."""
    tensors = {"llm.model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        layer = f"llm.model.layers.{i}"
        for name, shape in (
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.k_proj", (KV, HIDDEN)),
            ("self_attn.v_proj", (KV, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (MLP, HIDDEN)),
            ("mlp.up_proj", (MLP, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, MLP)),
            ("input_layernorm", (HIDDEN,)),
            ("post_attention_layernorm", (HIDDEN,)),
        ):
            tensors[f"{layer}.{name}.weight"] = shape
    tensors |= {"llm.lm_head.weight": (VOCAB, HIDDEN), "llm.model.norm.weight": (HIDDEN,)}

    def with_bias(name: str, *shape: int) -> None:
        tensors.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    with_bias("vison.embeddings.patch_embedding", VISION, 3, PATCH, PATCH)
    tensors["vison.embeddings.position_embedding.weight"] = (70 * 70, VISION)
    for i in range(VISION_LAYERS):
        layer = f"vison.encoder.layers.{i}"
        for projection in "qkv":
            with_bias(f"{layer}.self_attn.{projection}_proj", VISION, VISION)
        with_bias(f"{layer}.self_attn.out_proj", VISION, VISION)
        with_bias(f"{layer}.mlp.fc1", VISION_MLP, VISION)
        with_bias(f"{layer}.mlp.fc2", VISION, VISION_MLP)
        with_bias(f"{layer}.layer_norm1", VISION)
        with_bias(f"{layer}.layer_norm2", VISION)
    with_bias("vison.post_layernorm", VISION)

    tensors |= {"projection.query": (96, HIDDEN), "projection.proj": (HIDDEN, HIDDEN)}
    tensors["projection.kv_proj.weight"] = (HIDDEN, VISION)
    tensors |= {"projection.attn.in_proj_weight": (3 * HIDDEN, HIDDEN), "projection.attn.in_proj_bias": (3 * HIDDEN,)}
    with_bias("projection.attn.out_proj", HIDDEN, HIDDEN)
    for norm in ("ln_q", "ln_kv", "ln_post"):
        with_bias(f"projection.{norm}", HIDDEN)
    return tensors


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write the checkpoint, one tensor at a time."""
    shapes = released_tensors(layers)
    # The released 3 files are MiniCPM's 7 regrouped; those hold 2.5 GB of 17.07 at most.
    limit = 2.5 / 17.07 * sum(map(math.prod, shapes.values()))
    sevenths: list[list[str]] = [[]]
    for name, shape in shapes.items():
        size = sum(math.prod(shapes[other]) for other in sevenths[-1]) + math.prod(shape)
        if sevenths[-1] and size > limit and len(sevenths) < 7:
            sevenths.append([])
        sevenths[-1].append(name)
    weight_map = {}
    for i, numbers in enumerate(((0, 3, 6), (1, 4), (2, 5)), 1):
        names = sorted(name for number in numbers for name in sevenths[number : number + 1] for name in name)
        file = f"model-{i:05d}-of-00003.safetensors"
        write_safetensors(folder / file, {name: shapes[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 4 * sum(map(math.prod, shapes.values()))}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    write_config(folder, layers)


def write_config(folder: Path, layers: int) -> None:
    """Write llama3v's config and a tokenizer."""
    config = {
        "model_type": "llama3v",
        "auto_map": {"AutoConfig": "config.Config", "AutoModel": "modeling_llama3v.Llama3v"},
        "torch_dtype": "float16",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": KV // 128,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "image_size": 448,
        "patch_size": PATCH,
        "query_num": 96,
        "slice_mode": True,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 128000, "eos_token_id": 128001})
    write_tokenizer(folder)


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Random float16 weights of standard deviation 0.02 (norms: around 1), cut from one pool at changing offsets."""
    rng = np.random.default_rng(len(shapes))
    pool = (0.02 * rng.standard_normal((1 << 24) + 1013, dtype=np.float32)).astype(np.float16)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    at = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            left = math.prod(shape)
            while left:
                piece = pool[at : at + left]
                is_norm = name.endswith(".weight") and len(shape) == 1
                file.write((piece + np.float16(1) if is_norm else piece).data)
                left, at = left - len(piece), (at + len(piece)) % len(pool)
        file.flush()
        os.fsync(file.fileno())


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of the released size, with the released special tokens at their ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from tools.demo.tokenizer import SPECIAL_TOKENS

    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"word{i}" for i in range(len(words), 128000)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = list(SPECIAL_TOKENS)
    specials += [f"<|reserved_special_token_{i}|>" for i in range(len(specials), VOCAB - 128000)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_json(path: Path, value: dict | list) -> None:
    path.write_text(json.dumps(value) + "\n")


def drop_from_cache(folder: Path) -> bool:
    """Evict the weights from the page cache; return whether the system supports that."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def clock() -> np.ndarray:
    """Wall time and CPU time of this process, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def time_reading(folder: Path) -> np.ndarray:
    tic, block = clock(), bytearray(BLOCK)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return clock() - tic


def time_writing(path: Path, num_bytes: int) -> np.ndarray:
    block = np.random.default_rng(0).bytes(BLOCK)
    tic = clock()
    with path.open("wb", buffering=0) as file:
        for start in range(0, num_bytes, BLOCK):
            file.write(block[: num_bytes - start])
        os.fsync(file.fileno())
    taken = clock() - tic
    path.unlink()
    return taken


def time_quantizing(layers: int) -> np.ndarray:
    """Time of `mx.quantize` alone for Llama's matrices: the median of 3 for each shape, times their number."""
    import mlx.core as mx

    shapes = [s for name, s in released_tensors(layers).items() if name.startswith("llm.") and len(s) == 2]
    total = np.zeros(2)
    for shape in sorted(set(shapes)):
        weights = (0.02 * mx.random.normal(shape)).astype(mx.float16)
        mx.eval(weights)
        taken = []
        for _ in range(4):
            tic = clock()
            mx.eval(mx.quantize(weights, group_size=64, bits=4))
            taken.append(clock() - tic)
        total += shapes.count(shape) * np.median(taken[1:], axis=0)
    return total


def run(*command: str) -> tuple[np.ndarray, int]:
    """Run Python in a process of its own; return its times as in `clock` and its peak of resident bytes."""
    # wait4 gives this child's figures alone. This process stays small, as a child's peak starts at its parent's size.
    tic = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(f"error: {' '.join(command)} ended with {code}")
    seconds = time.perf_counter() - tic
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return np.array([seconds, usage.ru_utime + usage.ru_stime]), peak


def measure(folder: Path, args: argparse.Namespace) -> dict:
    """Make, convert, read and write, quantize, and verify if asked; all figures."""
    source, result, script = folder / "hf", folder / "mlx", str(Path(__file__).resolve())
    if not source.exists():
        partial = folder / "hf.partial"
        partial.mkdir(parents=True)
        say(f"making a checkpoint of {args.layers} layers in {folder}")
        run(script, "--make", str(partial), "--layers", str(args.layers))
        partial.rename(source)
    times, peaks = {}, {}
    say("converting")
    cold = drop_from_cache(source)
    paths = ("--hf-path", str(source), "--mlx-path", str(result))
    times["convert"], peaks["convert"] = run("convert.py", *paths, "-q")
    result_bytes = sum(path.stat().st_size for path in result.glob("*.safetensors"))
    say("reading and writing as many bytes")
    drop_from_cache(source)
    times["read"] = time_reading(source)
    times["write"] = time_writing(folder / "written", result_bytes)
    say("quantizing alone")
    quantizing = folder / "quantizing.json"
    run(script, "--quantize", str(quantizing), "--layers", str(args.layers))
    times["quantize"] = np.array(json.loads(quantizing.read_text()))
    if args.verify:
        say("verifying")
        times["verify"], peaks["verify"] = run("convert.py", *paths, "--verify")
    shapes = released_tensors(args.layers)
    ratio = times["convert"] / (times["read"] + times["write"] + times["quantize"])
    return {
        "parameters": sum(map(math.prod, shapes.values())),
        "tensors": len(shapes),
        "source_bytes": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "result_bytes": result_bytes,
        "source_dropped_from_cache": cold,
        **{f"{name}_seconds": time.tolist()[0] for name, time in times.items()},
        **{f"{name}_cpu_seconds": time.tolist()[1] for name, time in times.items()},
        **{f"{name}_peak_bytes": peak for name, peak in peaks.items()},
        "ratio": ratio.tolist()[0],
        "cpu_ratio": ratio.tolist()[1],
    }


def table(figures: dict) -> str:
    """Print the figures as a table."""
    cache = "from the disk" if figures["source_dropped_from_cache"] else "perhaps from the page cache"
    ratio = f"{figures['ratio']:.2f}x the three above (CPU: {figures['cpu_ratio']:.2f}x); target < {TIME_LIMIT}x"
    lines = [
        figures["machine"],
        figures["versions"],
        f"{figures['parameters'] / 1e9:.2f} B parameters in {figures['tensors']} tensors",
        f"{'':10}{'GB':>8}{'s':>9}{'CPU s':>9}{'peak GB':>10}",
    ]
    notes = {"read": cache, "write": "to the disk (fsync)", "convert": ratio}
    sizes = {"read": figures["source_bytes"], "write": figures["result_bytes"]}
    for step in ("read", "write", "quantize", "convert", "verify"):
        if f"{step}_seconds" in figures:
            size = f"{sizes[step] / 1e9:.2f}" if step in sizes else ""
            peak = f"{figures[f'{step}_peak_bytes'] / 1e9:.2f}" if f"{step}_peak_bytes" in figures else ""
            seconds, cpu = figures[f"{step}_seconds"], figures[f"{step}_cpu_seconds"]
            lines.append(f"{step:10}{size:>8}{seconds:>9.1f}{cpu:>9.1f}{peak:>10}  {notes.get(step, '')}".rstrip())
    return "\n".join([*lines, f"target for peak memory: < {MEMORY_LIMIT / 1e9:.0f} GB"])


def machine() -> str:
    from llama3v_mlx.device import chip, cores, memory

    load = os.getloadavg()[0]
    return f"{platform.system()}, {chip()}, {cores()} cores, {memory() / 1e9:.0f} GB, load {load:.1f} at the start"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="layers of Llama (default: 32, as released)")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="parent of the working folder")
    parser.add_argument("--keep", action="store_true", help="keep that folder and reuse its checkpoint in the next run")
    parser.add_argument("--verify", action="store_true", help="measure llama3v convert --verify too")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    for step in ("--make", "--quantize"):  # what runs in processes of their own
        parser.add_argument(step, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make_checkpoint(args.make, args.layers)
        return
    if args.quantize:
        write_json(args.quantize, time_quantizing(args.layers).tolist())
        return

    figures = {"layers": args.layers, "machine": machine()}
    figures["versions"] = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
    folder = Path(args.dir).resolve() / f"convert_memory-{args.layers}"
    folder.mkdir(parents=True, exist_ok=True)
    for left in ("mlx", "hf.partial"):
        shutil.rmtree(folder / left, ignore_errors=True)
    try:
        figures |= measure(folder, args)
    finally:
        if not args.keep:
            shutil.rmtree(folder)
    if not args.json:
        print(table(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""Quantize Llama with GPTQ, calibrated on prompts with images, one decoder layer in memory at a time.

A layer is calibrated on what the layers before it, already quantized, make of the prompts, so that it sees the inputs
that it will have. In memory are the prompts' hidden states, a layer's weights in float32 and its Hessians.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.base import create_attention_mask
from tqdm import tqdm

from ..checkpoint import CheckpointError, read_config
from ..device import memory_limit
from ..loading import build_model
from ..memory import MemoryLimitError
from ..models.released import lay_out
from .gptq import Inputs, quantize
from .rows import MAX_TOKENS, Row, embed_rows
from .shard_writer import SHARD_BYTES, Plan, ShardWriter, check_values
from .verify import Tensor, Weights

LLAMA, HEAD, EMBEDDING = "language_model.model", "language_model.lm_head", "language_model.model.embed_tokens"


def attention(layer: nn.Module, x: mx.array) -> mx.array:
    """First half of mlx-lm's Llama layer."""
    return x + layer.self_attn(layer.input_layernorm(x), create_attention_mask(x, None))


def mlp(layer: nn.Module, x: mx.array) -> mx.array:
    """Second half of mlx-lm's Llama layer."""
    return x + layer.mlp(layer.post_attention_layernorm(x))


# Matrices of each half by the input they share, in the order of their use.
HALVES = {
    attention: (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)),
    mlp: (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
}
MATRICES = [name for steps in HALVES.values() for names in steps for name in names]


def fit_rows(rows: Sequence[Row], working: int, token_bytes: int, max_tokens: int) -> list[Row]:
    """The first rows, of at most `max_tokens` together, that fit in memory.

    Args:
        rows: encoded prompts.
        working: bytes needed whatever the rows are.
        token_bytes: bytes needed for each token.
        max_tokens: of all rows together.

    Raises:
        MemoryLimitError: if not even one does.
    """
    limit = memory_limit()
    tokens = min(max_tokens, (limit - working) // token_bytes)
    kept: list[Row] = []
    for row in rows:
        tokens -= len(row.ids)
        if tokens < 0:
            break
        kept.append(row)
    if not kept:
        need = (working + len(rows[0].ids) * token_bytes) / 1e9
        raise MemoryLimitError(
            f"calibrating this model needs {need:.2f} GB of memory, but only {limit / 1e9:.2f} GB is usable here; "
            "convert without --calibrate, or on another machine"
        )
    return kept


def working_bytes(text: dict) -> int:
    """Bytes of a layer in float32, twice, of its largest Hessian with what GPTQ derives from it, and of a shard.

    For an 8B 7.9 GB, and 33 kB for each token: 10 GB for MAX_TOKENS. A layer and 1,024 tokens took 5.6 GB under Linux,
    without the shard (`benchmarks/quantize.py --full-size`).
    """
    hidden, mlp = text["hidden_size"], text["intermediate_size"]
    return 8 * (4 * hidden**2 + 3 * hidden * mlp) + 4 * 6 * max(hidden, mlp) ** 2 + SHARD_BYTES


def calibrate(
    folder: Path, plan: Plan, rows: Sequence[Row], writer: ShardWriter, tensors: dict[str, mx.array]
) -> list[Row]:
    """Quantize the modules of a plan, write them, and remove them from `tensors`; return the rows used.

    Args:
        folder: the source checkpoint, not quantized.
        plan: of the conversion, in affine mode.
        rows: prompts with images; the first that fit in memory are used.
        writer: destination.
        tensors: from `read_tensors`, of the same checkpoint.

    Raises:
        CheckpointError: if the weights compute infinities.
        MemoryLimitError: if the memory is too small for one row.
    """
    text = read_config(folder)["text_config"]
    rows = fit_rows(rows, working_bytes(text), 2 * mx.float32.size * text["hidden_size"], MAX_TOKENS)
    num_tokens = sum(len(row.ids) for row in rows)
    print(f"calibrating with {len(rows)} prompt{'s' if len(rows) > 1 else ''}, {num_tokens} tokens", file=sys.stderr)
    with tqdm(total=Weights(folder).num_bytes, desc="Calibrating", unit="B", unit_scale=True, disable=None) as bar:
        done = _quantize(Weights(folder, bar.update), plan, rows, writer)
    for name in [name for name, tensor in tensors.items() if not done.isdisjoint(lay_out(name, tensor))]:
        del tensors[name]
    return rows


def _quantize(weights: Weights, plan: Plan, rows: Sequence[Row], writer: ShardWriter) -> set[str]:
    """Quantize and write; return our names of the tensors that were quantized."""
    model = build_model(weights.config)  # lazy: what is not filled below takes no memory
    llama, original = model.language_model.model, model.layers[0]
    count, quantized = len(model.layers), type(original)(llama.args)
    quantizer = Quantizer(plan, writer)

    # A tied head would need the hidden states to be calibrated, which need the embedding.
    table = weights.take(f"{EMBEDDING}.weight")
    xs, ys = embed_rows(weights, model, rows, [quantizer(EMBEDDING, table, None).rows, table.rows])
    del model, table
    for i in range(count):
        weights.fill(original, f"{LLAMA}.layers.{i}")
        quantized.update(original.parameters())
        _quantize_layer(quantized, original, f"{LLAMA}.layers.{i}", xs, ys, quantizer)
    if f"{HEAD}.weight" in weights:
        weights.fill(llama.norm, f"{LLAMA}.norm")
        inputs = Inputs()
        for x, y, row in zip(xs, ys, rows, strict=True):
            inputs.add(*(llama.norm(states[0, mx.array(row.positions)]) for states in (x, y)))
        quantizer(HEAD, weights.take(f"{HEAD}.weight"), inputs)
    return {f"{path}.weight" for path in quantizer.done}


def _quantize_layer(
    quantized: nn.Module,
    original: nn.Module,
    path: str,
    xs: list[mx.array],
    ys: list[mx.array],
    quantizer: "Quantizer",
) -> None:
    """Quantize the matrices of a layer in the order of their use, and replace its inputs by its outputs.

    Args:
        quantized: the layer, to be quantized.
        original: the same layer, which is kept.
        path: its name.
        xs, ys: inputs in the quantized and the original model.
        quantizer: writes the result.
    """
    modules = dict(quantized.named_modules())
    for half, steps in HALVES.items():
        for names in steps:
            inputs = Inputs()
            for x, y in zip(xs, ys, strict=True):
                inputs.add(_input_of(names[0], half, quantized, x), _input_of(names[0], half, original, y))
            for name in names:
                weight = quantizer(f"{path}.{name}", Tensor(modules[name].weight), inputs)
                modules[name].weight = weight.rows(slice(None))
                mx.eval(modules[name].weight)
        for layer, states in ((quantized, xs), (original, ys)):
            for i, x in enumerate(states):
                states[i] = half(layer, x)
                mx.eval(states[i])


def _input_of(name: str, half: Callable, layer: nn.Module, x: mx.array) -> mx.array:
    """Input of a module for its half's input `x`, not evaluated: nothing that follows the module is computed."""
    recorder = Recorder(dict(layer.named_modules())[name])
    layer.update_modules(tree_unflatten([(name, recorder)]))
    half(layer, x)
    layer.update_modules(tree_unflatten([(name, recorder.module)]))
    return recorder.input


class Recorder(nn.Module):
    """Apply a module, and keep its input."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __call__(self, x: mx.array) -> mx.array:
        self.input = x
        return self.module(x)


class Quantizer:
    """Quantize and write the modules of a plan."""

    def __init__(self, plan: Plan, writer: ShardWriter):
        self.done: set[str] = set()
        self._plan = plan
        self._writer = writer

    def __call__(self, path: str, weight: Tensor, inputs: Inputs | None) -> Tensor:
        """Quantize a module if the plan says so; return its weight as read from the result."""
        own = self._plan.quantized.get(path)
        if own is None:
            return weight
        check_values(f"{path}.weight", weight.weight, self._plan.dtype)
        out_bytes = self._plan.size(f"{path}.weight")
        self._writer.make_room(out_bytes, out_bytes)
        try:
            arrays = quantize(weight, inputs, own["group_size"], own["bits"], self._plan.dtype)
        except ArithmeticError as e:
            raise CheckpointError(f"{path}: cannot be calibrated: {e}; are the weights damaged?") from e
        if not mx.isfinite(arrays[1]).all().item():
            dtype = str(self._plan.dtype).removeprefix("mlx.core.")
            raise CheckpointError(f"{path}: has values that {dtype} cannot represent; use another --dtype")
        self._writer.add(dict(zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), arrays, strict=True)))
        self.done.add(path)
        mx.clear_cache()
        return Tensor(arrays[0], arrays[1:], own)

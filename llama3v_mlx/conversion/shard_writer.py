"""Stream a checkpoint's tensors into new shards, one tensor at a time, so that the weights are never all in memory."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder

from ..checkpoint import INDEX, CheckpointError, check_tensors
from ..files import writing
from ..loading import build_model
from ..models.llama3v import Model
from ..models.released import lay_out

# A shard is held in memory until it is written, and with it one tensor as read and as converted, up to WORKING_BYTES.
SHARD_BYTES = 10**9
WORKING_BYTES = 2_500_000_000
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Plan:
    """The output of a conversion, known before any tensor is read."""

    dtype: mx.Dtype  # of floating-point tensors
    quantized: dict[str, dict]  # module path → group_size, bits and mode
    sizes: dict[str, int]  # name of a written tensor → bytes
    num_parameters: int  # before packing

    @property
    def num_bytes(self) -> int:
        """Bytes of all written tensors, without headers."""
        return sum(self.sizes.values())

    @property
    def llama_bpw(self) -> float:
        """Bits per weight of Llama, its embedding, scales and biases included."""
        num_bytes = parameters = 0
        for name, size in self.sizes.items():
            path, _, kind = name.rpartition(".")
            if name.startswith("language_model."):
                num_bytes += size
                if path not in self.quantized:
                    parameters += size // self.dtype.size
                elif kind == "weight":
                    parameters += 8 * size // self.quantized[path]["bits"]
        return 8 * num_bytes / parameters

    def size(self, name: str) -> int:
        """Bytes of a tensor as written, including its scales and biases."""
        path = name.removesuffix(".weight")
        packed = (f"{path}.scales", f"{path}.biases") if path in self.quantized else ()
        return sum(self.sizes.get(part, 0) for part in (name, *packed))


def make_plan(
    folder: Path,
    config: dict,
    tensors: dict[str, mx.array],
    quantization: dict | None = None,
    recipe: str | dict[str, dict] | None = None,
) -> Plan:
    """Check a checkpoint's tensors against its config and plan the output.

    Args:
        folder: the checkpoint, for error messages.
        config: in our layout; `dtype` is the dtype of the floating-point tensors written.
        tensors: from `read_tensors`.
        quantization: group_size, bits and mode of quantized modules; None for no quantization.
        recipe: one of mlx-lm's mixed-bit recipes, which overrides `quantization` for some modules; or the settings of
            each module.

    Raises:
        CheckpointError: if tensors are missing, unknown, duplicated or of the wrong shape.
    """
    parts: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        for ours, part in lay_out(name, tensor).items():
            if ours in parts:
                raise CheckpointError(
                    f"{folder}: {ours} appears twice, once as {name}; are these two checkpoints in one folder?"
                )
            parts[ours] = part
    model = build_model(config, folder=folder)  # its lazy arrays are never evaluated
    check_tensors(folder, model, parts)
    dtype = getattr(mx, config["dtype"])
    quantized = _quantize_skeleton(model, quantization, recipe) if quantization else {}
    sizes = {name: p.size * _cast(p.dtype, dtype).size for name, p in tree_flatten(model.parameters())}
    return Plan(dtype, quantized, sizes, sum(part.size for part in parts.values()))


def _quantize_skeleton(model: Model, quantization: dict, recipe: str | dict | None) -> dict[str, dict]:
    """Quantize an unevaluated model as mlx-lm would; return the settings of each quantized module."""
    group_size = quantization["group_size"]
    choose = mixed_quant_predicate_builder(recipe, model, group_size) if isinstance(recipe, str) else None
    own = recipe if isinstance(recipe, dict) else {}
    chosen = {}

    def predicate(path: str, module: nn.Module) -> bool | dict:
        if not (hasattr(module, "to_quantized") and model.quant_predicate(path, module)):
            return False
        if module.weight.shape[-1] % group_size:
            return False
        chosen[path] = choose(path, module) if choose else own.get(path, quantization)
        return chosen[path]

    nn.quantize(model, class_predicate=predicate)
    return chosen


class ShardWriter:
    """Write tensors to `model-0000i-of-0000N.safetensors` in order of arrival, and their index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards: list[list[str]] = []
        self._waiting: dict[str, mx.array] = {}
        self._waiting_bytes = 0
        self._total_bytes = 0

    def make_room(self, out_bytes: int, working_bytes: int) -> None:
        """Flush the pending shard if a tensor of `out_bytes` would not fit in it, or its conversion not in memory."""
        over = self._waiting_bytes + out_bytes > SHARD_BYTES or self._waiting_bytes + working_bytes > WORKING_BYTES
        if self._waiting and over:
            self._write()

    def add(self, tensors: dict[str, mx.array]) -> None:
        """Add evaluated tensors, by name, to the pending shard."""
        self._waiting |= tensors
        self._waiting_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self, num_parameters: int) -> None:
        """Write the last shard, rename all of them, and write the index."""
        self._write()
        weight_map = {}
        for i, names in enumerate(self.shards, 1):
            final = f"model-{i:05d}-of-{len(self.shards):05d}.safetensors"
            os.rename(self._path(i), self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        metadata = {"total_size": self._total_bytes, "total_parameters": num_parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _path(self, i: int) -> Path:
        return self.folder / f"model-{i:05d}.safetensors"

    def _write(self) -> None:
        self.shards.append(list(self._waiting))
        path = self._path(len(self.shards))
        with writing(path):
            mx.save_safetensors(str(path), self._waiting, metadata={"format": "mlx"})
        self._total_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = {}, 0
        mx.clear_cache()


def write_tensors(
    tensors: dict[str, mx.array], plan: Plan, writer: ShardWriter, progress: Callable[[int], object]
) -> None:
    """Read, cast, quantize and write tensors in order, emptying `tensors` on the way.

    Args:
        tensors: from `read_tensors`.
        plan: from `make_plan`, for the same tensors.
        writer: destination.
        progress: called with the number of bytes read, after each tensor.

    Raises:
        CheckpointError: if a value is not finite, or overflows the plan's dtype.
    """
    for name in list(tensors):
        tensor = tensors.pop(name)
        laid_out = lay_out(name, tensor)
        source_bytes = tensor.nbytes
        del tensor
        out_bytes = sum(map(plan.size, laid_out))
        writer.make_room(out_bytes, source_bytes + out_bytes)
        for part in list(laid_out):
            converted = _convert(part, laid_out.pop(part), plan)
            mx.eval(converted)
            writer.add(converted)
        progress(source_bytes)
        mx.clear_cache()
    writer.finish(plan.num_parameters)


def _convert(name: str, tensor: mx.array, plan: Plan) -> dict[str, mx.array]:
    """Convert one tensor to what is written: a cast tensor, or packed weight, scales and (affine) biases."""
    dtype = _cast(tensor.dtype, plan.dtype)
    check_values(name, tensor, dtype)
    path = name.removesuffix(".weight")
    if path not in plan.quantized:
        return {name: tensor.astype(dtype)}
    packed = []
    for rows in row_slices(tensor.shape, dtype.size):
        packed.append(mx.quantize(tensor[rows].astype(dtype), **plan.quantized[path]))
        mx.eval(packed[-1])
    arrays = [mx.concatenate(parts) for parts in zip(*packed, strict=True)]
    return dict(zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), arrays, strict=False))


def check_values(name: str, tensor: mx.array, dtype: mx.Dtype) -> None:
    """Check that the values of a tensor are finite, and that a dtype can represent them.

    Raises:
        CheckpointError: naming the tensor, if that is not so.
    """
    if not mx.issubdtype(tensor.dtype, mx.floating):
        return
    # As integers, for which the CPU has fast reductions: the largest is the largest positive value if they are signed,
    # else the largest negative one.
    integers = {2: (mx.int16, mx.uint16), 4: (mx.int32, mx.uint32)}[tensor.dtype.size]
    extremes = [tensor.view(integer).max().reshape(1).view(tensor.dtype).item() for integer in integers]
    largest = max(map(abs, extremes)) if all(map(math.isfinite, extremes)) else math.inf
    if largest == math.inf:
        raise CheckpointError(f"{name} has values that are not finite; the checkpoint is damaged, download it again")
    if largest > mx.finfo(dtype).max:
        shown = str(dtype).removeprefix("mlx.core.")
        raise CheckpointError(
            f"{name} has values up to {largest:.3g}, which {shown} cannot represent; use another --dtype"
        )


def row_slices(shape: tuple[int, ...], item_bytes: int, chunk_bytes: int | None = None) -> list[slice]:
    """Slices of a tensor's rows of about `chunk_bytes` (default: CHUNK_BYTES) each."""
    rows = max(1, (chunk_bytes or CHUNK_BYTES) // (item_bytes * math.prod(shape[1:])))
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


def _cast(dtype: mx.Dtype, floating: mx.Dtype) -> mx.Dtype:
    return floating if mx.issubdtype(dtype, mx.floating) else dtype

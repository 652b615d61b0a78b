"""Compare a converted checkpoint with its source: error of its tensors, and agreement on the first token.

Both are read one tensor at a time and run one layer at a time, dequantized and in float32, so that only the weights
differ and a full-size pair takes less than 4 GB.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from tqdm import tqdm

from ..checkpoint import CheckpointError, check_tensors, read_config, read_tensors
from ..image import ImageSource, load_image
from ..loading import build_model
from ..models.llama3v import Model
from ..models.released import lay_out
from ..prompt import Processor
from ..tiling import TiledImage
from ..tokenizer import load_tokenizer
from .shard_writer import row_slices

PROMPT = "What is this image?"
# Part of a tensor's name → kind under which it is reported, in the order of the table.
KINDS = {
    "embed_tokens": "embed_tokens",
    "self_attn": "self_attn",
    "mlp": "mlp",
    "norm": "norms",
    "lm_head": "lm_head",
}


@dataclass(frozen=True)
class Loss:
    """Error of the tensors of one kind."""

    count: int
    relative_error: float  # of all tensors together: |result - source| / |source|, L2
    largest: float  # relative error of the worst tensor


@dataclass(frozen=True)
class Report:
    """Comparison of a conversion with its source."""

    tensors: dict[str, Loss]  # by kind
    kl: float  # KL(source || result) of the first token, in nats
    agrees: bool  # same most likely first token
    source_token: str  # most likely first token
    result_token: str
    image: str
    prompt: str

    @property
    def summary(self) -> str:
        verdict = "agrees:" if self.agrees else f"differs: {self.result_token!r} instead of"
        return (
            f"first token after {self.prompt!r} about {self.image}: KL {self.kl:.6f} nats, top-1 {verdict} "
            f"{self.source_token!r}"
        )

    def __str__(self) -> str:
        return f"{table(self.tensors)}\n{self.summary}"


def table(tensors: dict[str, Loss]) -> str:
    """Format the errors of tensors by kind."""
    lines = [f"{'tensors':<14}{'count':>6}{'relative error':>16}{'largest':>12}"]
    for kind, loss in tensors.items():
        lines.append(f"{kind:<14}{loss.count:>6}{loss.relative_error:>16.6f}{loss.largest:>12.6f}")
    return "\n".join(lines)


def verify(source: Path, result: Path, image: ImageSource, prompt: str = PROMPT) -> Report:
    """Compare a converted checkpoint with its source.

    Args:
        source: folder of the source checkpoint.
        result: folder of the conversion, quantized or not.
        image: the subject of the question.
        prompt: the question.

    Raises:
        CheckpointError: if one is unusable, or is not a conversion of the other.
        ImageError: if the image is unusable.
    """
    loaded = load_image(image)  # fail before minutes of work
    total = 2 * sum(Weights(folder).num_bytes for folder in (source, result))
    with tqdm(total=total, desc="Verifying", unit="B", unit_scale=True, disable=None) as bar:
        tensors = compare_tensors(source, result, bar.update)
        before, after = (first_token_logprobs(folder, loaded, prompt, bar.update) for folder in (source, result))
    tokens = [logprobs.argmax().item() for logprobs in (before, after)]
    tokenizer = load_tokenizer(source, read_config(source))
    return Report(
        tensors=tensors,
        kl=max((mx.exp(before) * (before - after)).sum().item(), 0.0),  # rounding may go below 0; NaN stays NaN
        agrees=tokens[0] == tokens[1],
        source_token=tokenizer.decode(tokens[:1]),
        result_token=tokenizer.decode(tokens[1:]),
        image=Path(image).name if isinstance(image, (str, Path)) else "an image",
        prompt=prompt,
    )


class Tensor:
    """Lazy, possibly quantized tensor whose rows are read in float32."""

    def __init__(self, weight: mx.array, scales_and_biases: Iterable[mx.array] = (), quantization: dict | None = None):
        self.weight = weight
        self.scales_and_biases = list(scales_and_biases)
        self.quantization = quantization
        self.nbytes = weight.nbytes + sum(array.nbytes for array in self.scales_and_biases)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape before packing."""
        *outer, inner = self.weight.shape
        return (*outer, inner * 32 // self.quantization["bits"] if self.quantization else inner)

    def rows(self, index: slice | mx.array) -> mx.array:
        """Rows of the tensor, dequantized, in float32."""
        weight = self.weight[index]
        if self.quantization is None:
            return weight.astype(mx.float32)
        packed = [array[index] for array in self.scales_and_biases]
        if self.quantization["mode"] == "affine":  # the scales' dtype is that of the result
            packed = [array.astype(mx.float32) for array in packed]
        return mx.dequantize(weight, *packed, **self.quantization).astype(mx.float32)


class Weights:
    """Lazy tensors of a checkpoint under our names; each is taken once and read only then."""

    def __init__(self, folder: Path, progress: Callable[[int], object] = lambda num_bytes: None):
        self.config = read_config(folder)
        self._progress = progress
        arrays: dict[str, mx.array] = {}
        for name, array in read_tensors(folder).items():
            arrays.update(lay_out(name, array))
        check_tensors(folder, build_model(self.config, arrays, folder), arrays)
        own = self.config.get("quantization") or {}
        keys = ("group_size", "bits", "mode")
        common = {"mode": "affine"} | {key: own[key] for key in keys if key in own}
        self._tensors: dict[str, Tensor] = {}
        for name, array in arrays.items():
            path, _, kind = name.rpartition(".")
            if f"{path}.scales" not in arrays:
                self._tensors[name] = Tensor(array)
            elif kind == "weight":
                packed = [arrays[part] for part in (f"{path}.scales", f"{path}.biases") if part in arrays]
                self._tensors[name] = Tensor(array, packed, own.get(path, common))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that were not taken yet."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes before packing, by name, of the tensors that were not taken yet."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def take(self, name: str) -> Tensor:
        """Remove and return a tensor."""
        tensor = self._tensors.pop(name)
        self._progress(tensor.nbytes)
        return tensor

    def fill(self, module: nn.Module, path: str) -> None:
        """Load a module's parameters in float32."""
        names = [name for name, _ in tree_flatten(module.parameters())]
        module.load_weights([(name, self.take(f"{path}.{name}").rows(slice(None))) for name in names])
        for _, parameter in tree_flatten(module.parameters()):
            mx.eval(parameter)  # one by one, so that not all packed tensors are in memory at once
        mx.clear_cache()

    def run(self, layers: list[nn.Module], path: str, xs: list[mx.array], *args: Any) -> list[mx.array]:
        """Run arrays through `layers`, loading each layer's weights into the first in turn. Empties the list."""
        for i in range(len(layers)):
            self.fill(layers[0], f"{path}.{i}")
            xs = [layers[0](x, *args) for x in xs]
            mx.eval(xs)
        layers.clear()
        return xs


def compare_tensors(
    source: Path, result: Path, progress: Callable[[int], object] = lambda num_bytes: None
) -> dict[str, Loss]:
    """Error by kind of tensor.

    Raises:
        CheckpointError: if names or shapes of the tensors differ.
    """
    ours, theirs = Weights(source, progress), Weights(result, progress)
    shapes = ours.shapes
    if shapes != theirs.shapes:
        raise CheckpointError(f"{result}: its tensors are not those of {source}; it was not converted from it")
    sums: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, shape in shapes.items():
        a, b = ours.take(name), theirs.take(name)
        error = norm = 0.0
        for rows in row_slices(shape, mx.float32.size):
            x, y = a.rows(rows), b.rows(rows)
            squares = mx.stack([(y - x).square().sum(), x.square().sum()]).tolist()
            error, norm = error + squares[0], norm + squares[1]
        sums[_kind(name)].append((error, norm))
        mx.clear_cache()
    return {
        kind: Loss(
            count=len(sums[kind]),
            relative_error=_ratio(*map(sum, zip(*sums[kind], strict=True))),
            largest=max(_ratio(*pair) for pair in sums[kind]),
        )
        for kind in (*KINDS.values(), "vision_tower", "projector")
        if kind in sums
    }


def first_token_logprobs(
    folder: Path, image: ImageSource, prompt: str, progress: Callable[[int], object] = lambda num_bytes: None
) -> mx.array:
    """Log-probabilities (vocab_size,), float32, of the first token of an answer about an image.

    Equal to those of the loaded model, with at most one layer in memory at a time.
    """
    weights = Weights(folder, progress)
    model = build_model(weights.config, folder=folder)  # lazy: what is not filled below takes no memory
    llama = model.language_model
    tokenizer = load_tokenizer(folder, weights.config)
    encoded = Processor.from_config(weights.config, tokenizer).encode(prompt, [image])

    (tiled,) = encoded.images
    visual = _visual_tokens(weights, model, tiled)
    embedding = weights.take("language_model.model.embed_tokens.weight")
    llama.model.embed_tokens = embedding.rows
    h = model.splice(mx.array(encoded.ids), [tiled.grid], [visual])[None]
    mx.eval(h)
    if "language_model.lm_head.weight" in weights:
        llama.model.embed_tokens = embedding = None

    (h,) = weights.run(llama.layers, "language_model.model.layers", [h], create_attention_mask(h, None))
    weights.fill(llama.model.norm, "language_model.model.norm")
    h = llama.model.norm(h[0, -1])
    head = embedding or weights.take("language_model.lm_head.weight")
    logits = []
    for rows in row_slices(head.shape, mx.float32.size):
        logits.append(head.rows(rows) @ h)
        mx.eval(logits)
    logits = mx.concatenate(logits)
    return logits - mx.logsumexp(logits)


def _visual_tokens(weights: Weights, model: Model, image: TiledImage) -> mx.array:
    """An image's visual tokens (tiles·num_queries, hidden_size)."""
    tower, patch = model.vision_tower, model.vision_tower.config.patch_size
    weights.fill(tower.embeddings, "vision_tower.embeddings")
    features = [tower.embeddings(mx.array(tile[None])) for tile in image.tiles]
    features = weights.run(tower.encoder.layers, "vision_tower.encoder.layers", features)
    weights.fill(tower.post_layernorm, "vision_tower.post_layernorm")
    weights.fill(model.projector, "projector")
    tokens = []
    for tile, x in zip(image.tiles, features, strict=True):
        grid = (tile.shape[0] // patch, tile.shape[1] // patch)
        tokens.append(model.projector(tower.post_layernorm(x), grid)[0])
    tokens = mx.concatenate(tokens)
    mx.eval(tokens)
    return tokens


def _kind(name: str) -> str:
    part = name.partition(".")[0]
    return next(kind for key, kind in KINDS.items() if key in name) if part == "language_model" else part


def _ratio(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else math.sqrt(error)

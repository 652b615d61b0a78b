"""Choose the bits of each matrix: measure what its rounding does to the answers, and spend bits where that is most.

The measure is the KL divergence of the answers to second order, ½·E[⟨G, ΔW⟩²]: ΔW is the rounding of a matrix, and
E[G·Gᵀ] the Fisher information of its weights. It takes one pass forward and one back, one decoder layer in memory at a
time, for all matrices and all bits.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models.base import create_attention_mask
from tqdm import tqdm

from ..loading import build_model
from ..prompt_tokens import PromptTokens
from .calibrate import EMBEDDING, HEAD, LLAMA, MATRICES, Recorder, fit_rows, working_bytes
from .rows import Row, embed_rows
from .shard_writer import Plan, row_slices
from .verify import Tensor, Weights

BITS = (2, 3, 4, 5, 6, 8)
POSITIONS = 1024  # of all prompts, whose predictions are differentiated
MAX_TOKENS = 8192  # of the prompts together: the inputs of all layers are kept for the pass back

Scores = dict[str, dict[int, float]]  # module path → bits → KL divergence, in nats, of all prompts


def choose_bits(folder: Path, plan: Plan, rows: Sequence[Row], target: float) -> dict[str, dict]:
    """Choose the bits of a plan's modules so that Llama takes at most `target` bits per weight.

    Args:
        folder: the source checkpoint, not quantized.
        plan: of the conversion with the same bits for all, in affine mode.
        rows: prompts with images and answers; the first that fit in memory are used.
        target: bits per weight of Llama, its embedding, scales and biases included.

    Returns:
        group_size, bits and mode of each module.

    Raises:
        ValueError: if `target` is out of reach.
        MemoryLimitError: if the memory is too small for one row.
    """
    weights = Weights(folder)
    shapes = {name: shape for name, shape in weights.shapes.items() if name.startswith("language_model.")}
    costs, rest = {}, 0
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        if path in plan.quantized:
            shared = 16 * plan.dtype.size / plan.quantized[path]["group_size"]  # a scale and a bias
            costs[path] = {bits: math.prod(shape) * (bits + shared) for bits in BITS}
        else:
            rest += 8 * plan.dtype.size * math.prod(shape)
    total = sum(map(math.prod, shapes.values()))
    least = (rest + sum(cost[BITS[0]] for cost in costs.values())) / total
    if not target >= least:
        raise ValueError(f"--q-target-bpw {target:g} is less than the {least:.2f} that {BITS[0]} bits take")
    text = weights.config["text_config"]
    hidden, mlp = text["hidden_size"], text["intermediate_size"]
    # Inputs of all layers; inputs and gradients of one layer's matrices; gradients of the logits.
    token_bytes = mx.float32.size * ((text["num_hidden_layers"] + 9) * hidden + 4 * mlp)
    working = working_bytes(text) + mx.float32.size * POSITIONS * text["vocab_size"]
    rows = fit_rows(rows, working, token_bytes, MAX_TOKENS)
    with tqdm(total=2 * weights.num_bytes, desc="Measuring", unit="B", unit_scale=True, disable=None) as bar:
        scores = measure(folder, plan, rows, bar.update)
    chosen = allocate(scores, costs, target * total - rest)
    return {path: {**plan.quantized[path], "bits": bits} for path, bits in chosen.items()}


def allocate(scores: Scores, costs: dict[str, dict[int, float]], budget: float) -> dict[str, int]:
    """Choose the bits of each module: again and again, raise those whose score falls most for the cost.

    Args:
        scores: from `measure`.
        costs: module path → bits → cost, rising with the bits.
        budget: of all costs together.
    """
    chosen = dict.fromkeys(costs, BITS[0])
    budget -= sum(cost[BITS[0]] for cost in costs.values())
    while True:
        best, gain = None, 0.0
        for path, now in chosen.items():
            for bits in BITS[BITS.index(now) + 1 :]:
                price = costs[path][bits] - costs[path][now]
                if price <= budget and (scores[path][now] - scores[path][bits]) / price > gain:
                    best, gain = (path, bits, price), (scores[path][now] - scores[path][bits]) / price
        if best is None:
            return chosen
        path, chosen[best[0]], price = best
        budget -= price


def measure(
    folder: Path, plan: Plan, rows: Sequence[Row], progress: Callable[[int], object] = lambda num_bytes: None
) -> Scores:
    """KL divergence of the answers when one module of a plan is rounded to nearest, for each of BITS."""
    weights, again = Weights(folder, progress), Weights(folder, progress)
    model = build_model(weights.config)  # lazy: what is not filled below takes no memory
    tokens, queries = model.prompt_tokens, model.projector.config.num_queries
    llama, layer, count = model.language_model.model, model.layers[0], len(model.layers)
    table = weights.take(f"{EMBEDDING}.weight")
    states = embed_rows(weights, model, rows, [table.rows])  # inputs of each layer, and outputs of the last
    del model
    for i in range(count):
        weights.fill(layer, f"{LLAMA}.layers.{i}")
        states.append([])
        for x in states[-2]:
            states[-1].append(layer(x, create_attention_mask(x, None)))
            mx.eval(states[-1])
    weights.fill(llama.norm, f"{LLAMA}.norm")
    head = weights.take(f"{HEAD}.weight") if f"{HEAD}.weight" in weights else table

    scores = {path: dict.fromkeys(BITS, 0.0) for path in plan.quantized}

    def add(path: str, weight: Tensor, dots: Callable[[mx.array, slice], mx.array]) -> None:
        """Add the scores of a matrix; `dots` maps the rounding of a slice of its rows to ⟨G, ΔW⟩ of each prompt."""
        own = plan.quantized.get(path)
        for bits in BITS if own else ():
            total = mx.zeros(len(rows))
            for part in row_slices(weight.shape, mx.float32.size):
                total += dots(_rounding(weight.rows(part), own["group_size"], bits, plan.dtype), part)
                mx.eval(total)
            scores[path][bits] += 0.5 * total.square().sum().item()

    def products(pairs: list[tuple[mx.array, mx.array]]) -> Callable[[mx.array, slice], mx.array]:
        return lambda error, part: mx.stack([((x @ error.T) * g[:, part]).sum() for x, g in pairs])

    pairs, gradients = [], []
    for x, row in zip(states.pop(), rows, strict=True):
        at = mx.array(row.positions[: max(1, POSITIONS // len(rows))])
        h = llama.norm(x[0, at])
        g = _random_gradient(h, head, mx.random.key(len(pairs)))
        pairs.append((h, g))
        gradients.append(mx.vjp(lambda x, at=at: llama.norm(x[0, at]), [x], [_back_through(g, head)])[1][0])
        mx.eval(pairs[-1], gradients[-1])
    add(HEAD if head is not table else EMBEDDING, head, products(pairs))
    for i in reversed(range(count)):
        again.fill(layer, f"{LLAMA}.layers.{i}")
        by_name = defaultdict(list)
        for j, x in enumerate(states.pop()):
            gradients[j], own = _backward(layer, x, gradients[j])
            mx.eval(gradients[j], own)
            for name, pair in own.items():
                by_name[name].append(pair)
        modules = dict(layer.named_modules())
        for name, pairs in by_name.items():
            add(f"{LLAMA}.layers.{i}.{name}", Tensor(modules[name].weight), products(pairs))
    # An embedding's gradient has a row for each text token; its rounding is that of the rows used.
    places = [_text_places(row, tokens, queries) for row in rows]
    used = mx.concatenate([table.rows(ids) for ids, _ in places])
    flat = mx.concatenate([g[0, at] for g, (_, at) in zip(gradients, places, strict=True)])
    owner = mx.concatenate([mx.full(len(at), i) for i, (_, at) in enumerate(places)])
    add(
        EMBEDDING,
        Tensor(used),
        lambda error, part: mx.zeros(len(rows)).at[owner[part]].add((error * flat[part]).sum(-1)),
    )
    return scores


def _random_gradient(h: mx.array, head: Tensor, key: mx.array) -> mx.array:
    """Random vectors g (positions, vocab_size) with E[g·gᵀ] = diag(p) - p·pᵀ, the Fisher information of logits.

    Gradients of sampled tokens have it too, but nearly all are 0 where the model is sure.
    """
    parts = row_slices(head.shape, mx.float32.size)
    p = mx.softmax(mx.concatenate([h @ head.rows(part).T for part in parts], axis=-1), axis=-1)
    signed = mx.sqrt(p) * (1 - 2 * mx.random.bernoulli(shape=p.shape, key=key))
    return signed - p * signed.sum(axis=-1, keepdims=True)


def _back_through(g: mx.array, head: Tensor) -> mx.array:
    return sum(g[:, part] @ head.rows(part) for part in row_slices(head.shape, mx.float32.size))


def _backward(layer: nn.Module, x: mx.array, gradient: mx.array) -> tuple[mx.array, dict[str, tuple]]:
    """Gradient by a layer's inputs; and for each matrix its inputs (L, in) and the gradient by its outputs (L, out).

    Args:
        layer: of Llama.
        x: its inputs (1, L, hidden_size).
        gradient: by its outputs.
    """
    modules = dict(layer.named_modules())
    shapes = [(*x.shape[:-1], modules[name].weight.shape[0]) for name in MATRICES]
    probes = {name: Probe(modules[name]) for name in MATRICES}

    def run(x: mx.array, *offsets: mx.array) -> mx.array:
        for probe, offset in zip(probes.values(), offsets, strict=True):
            probe.offset = offset
        return layer(x, create_attention_mask(x, None))

    layer.update_modules(tree_unflatten(list(probes.items())))
    _, (before, *own) = mx.vjp(run, [x, *map(mx.zeros, shapes)], [gradient])
    layer.update_modules(tree_unflatten([(name, modules[name]) for name in MATRICES]))
    return before, {name: (probes[name].input[0], g[0]) for name, g in zip(MATRICES, own, strict=True)}


class Probe(Recorder):
    """Apply a module, keep its input and add an offset, whose gradient is that of the module's output."""

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + self.offset


def _text_places(row: Row, tokens: PromptTokens, num_queries: int) -> tuple[mx.array, mx.array]:
    """Ids of a row's text tokens, and their positions."""
    ids = tokens.expand(row.ids, [image.grid for image in row.images], num_queries)
    places = np.flatnonzero(ids != tokens.image)
    return mx.array(ids[places]), mx.array(places)


def _rounding(w: mx.array, group_size: int, bits: int, dtype: mx.Dtype) -> mx.array:
    """Change of a matrix when it is rounded to nearest."""
    packed = mx.quantize(w.astype(dtype), group_size=group_size, bits=bits)
    return mx.dequantize(*packed, group_size=group_size, bits=bits).astype(mx.float32) - w

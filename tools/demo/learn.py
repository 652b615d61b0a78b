"""Losses of the demo's training, on labels of patches and pictures and on answers, and their reports."""

import itertools
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer

from llama3v_mlx.models.llama3v import Model
from llama3v_mlx.training.trainer import answer_logits

from . import world
from .data import CELLS, NUM_FACTS, Batch, ImageBatch

FACTS = ("shape", "count", "color", "background", "length", "digit 1", "digit 2", "digit 3")


class Labels(nn.Module):
    """Label heads for training only: a linear one for every patch, and one for the picture with learned queries.

    Facts about the picture are also predicted from one visual token of the overview each, where Llama then finds them.
    """

    def __init__(self, vision_width: int, width: int):
        super().__init__()
        sizes = (1 + len(world.SHAPES) + 10, len(world.COLORS), len(world.BACKGROUNDS), 2, 4)
        self.patch_heads = [nn.Linear(vision_width, n) for n in sizes]
        self.ink_head = nn.Linear(vision_width, CELLS * CELLS)
        self.queries = 0.5 * mx.random.normal((len(NUM_FACTS), width))
        self.attention = nn.MultiHeadAttention(width, 4)
        self.norm = nn.LayerNorm(width)
        self.fact_heads = [nn.Linear(width, n) for n in NUM_FACTS]
        self.token_heads = [nn.Linear(width, n) for n in NUM_FACTS]

    def read_patches(self, features: mx.array) -> list[mx.array]:
        return [head(features) for head in self.patch_heads]

    def read_picture(self, visual_tokens: mx.array) -> list[mx.array]:
        x = self.norm(visual_tokens)
        queries = mx.broadcast_to(self.queries, (x.shape[0], *self.queries.shape))
        y = self.attention(queries, x, x)
        return [head(y[:, i]) for i, head in enumerate(self.fact_heads)]

    def read_tokens(self, visual_tokens: mx.array) -> list[mx.array]:
        return [head(visual_tokens[:, i]) for i, head in enumerate(self.token_heads)]


def tower_states(model: Model, images: ImageBatch) -> list[tuple[mx.array, mx.array]]:
    """Hidden states after half the tower's layers, and patch features, of the overviews and then of the slices."""
    tower, states = model.vision_tower, []
    for tiles in (images.overviews, images.slices):
        if tiles is None:
            continue
        x = tower.embeddings(mx.array(tiles))
        for i, layer in enumerate(tower.encoder.layers):
            x = layer(x)
            if i + 1 == len(tower.encoder.layers) // 2:
                middle = x
        states.append((middle, tower.post_layernorm(x)))
    return states


def visual_tokens(model: Model, images: ImageBatch, states: list[tuple[mx.array, mx.array]]) -> mx.array:
    """(B, tiles·num_queries, hidden_size) in the order of the prompt."""
    patch, tokens = model.vision_tower.config.patch_size, []
    for (_, x), tiles in zip(states, (images.overviews, images.slices), strict=False):
        tokens.append(model.projector(x, (tiles.shape[1] // patch, tiles.shape[2] // patch)))
    B, _, D = tokens[0].shape
    return mx.concatenate([t.reshape(B, -1, D) for t in tokens], axis=1)


def see(model: Model, batch: Batch, freeze_tower: bool = False) -> tuple[list, list[mx.array]]:
    """Hidden states and visual tokens of every picture of the conversations."""
    states = [tower_states(model, images) for images in batch.images]
    if freeze_tower:
        states = [[(mx.stop_gradient(middle), mx.stop_gradient(x)) for middle, x in pairs] for pairs in states]
    return states, [visual_tokens(model, *pair) for pair in zip(batch.images, states, strict=True)]


def label_loss(model: Model, labels: Labels, batch: Batch) -> mx.array:
    """Loss of predicting labels of patches from patch features, and of pictures from visual tokens."""
    return _label_loss(labels, batch, *see(model, batch))


def answer_loss(model: Model, batch: Batch, freeze_tower: bool) -> mx.array:
    """Cross-entropy of the answers, in nats per token."""
    return _answer_loss(model, batch, see(model, batch, freeze_tower)[1])


def joint_loss(model: Model, labels: Labels, batch: Batch) -> mx.array:
    """Both losses in one pass, so that training on answers does not undo what the labels taught."""
    states, tokens = see(model, batch)
    return _answer_loss(model, batch, tokens) + 0.1 * _label_loss(labels, batch, states, tokens)


def _label_loss(labels: Labels, batch: Batch, states: list, tokens: list[mx.array]) -> mx.array:
    total = mx.array(0.0)
    for images, pairs, visual in zip(batch.images, states, tokens, strict=True):
        for (middle, x), patches, ink in zip(pairs, images.patches, images.ink, strict=True):
            targets = mx.array(patches)
            # Ink whatever its color is what shapes are recognized by, so it is predicted from the middle layers.
            total += 2 * nn.losses.binary_cross_entropy(labels.ink_head(middle), mx.array(ink), reduction="mean")
            region, color, background, center, place = labels.read_patches(x)
            inside = targets[..., 0] > 0
            # Most patches are empty and carry the least information.
            total += _weighted(nn.losses.cross_entropy(region, targets[..., 0]), mx.where(inside, 1.0, 0.1))
            total += 0.3 * _weighted(nn.losses.cross_entropy(color, targets[..., 1]), inside)
            total += 0.3 * nn.losses.cross_entropy(background, targets[..., 2]).mean()
            total += _weighted(nn.losses.cross_entropy(center, targets[..., 3]), 0.1 + targets[..., 3])
            if images.facts is not None:
                total += _weighted(nn.losses.cross_entropy(place, targets[..., 4]), targets[..., 4] > 0)
        if images.facts is None:
            continue
        facts = mx.array(images.facts)
        for readings in (labels.read_picture(visual), labels.read_tokens(visual)):
            losses = [nn.losses.cross_entropy(y, facts[:, i], reduction="mean") for i, y in enumerate(readings)]
            total += 0.5 * sum(losses)
    return total / max(len(batch.images), 1)


def _weighted(losses: mx.array, weights: mx.array) -> mx.array:
    return (losses * weights).sum() / mx.maximum(weights.sum(), 1)


def _answer_logits(model: Model, batch: Batch, tokens: list[mx.array]) -> mx.array:
    visual = [mx.concatenate(tokens, axis=1).flatten(0, 1)] if tokens else []
    source = mx.array(batch.source) if tokens else None
    return answer_logits(model.language_model, mx.array(batch.ids), visual, source, mx.array(batch.places))


def _answer_loss(model: Model, batch: Batch, tokens: list[mx.array]) -> mx.array:
    losses = nn.losses.cross_entropy(_answer_logits(model, batch, tokens), mx.array(batch.targets))
    return _weighted(losses, mx.array(batch.weights))


def label_report(model: Model, labels: Labels, easy: list[Batch], held_out: list[Batch]) -> str:
    """Accuracy on non-empty patches and on pictures, for easy pictures and for all."""
    return f"easy: {_label_report(model, labels, easy)}\nall:  {_label_report(model, labels, held_out)}"


def _label_report(model: Model, labels: Labels, held_out: list[Batch]) -> str:
    right, seen = Counter(), Counter()
    for images in (images for batch in held_out for images in batch.images):
        states = tower_states(model, images)
        visual = visual_tokens(model, images, states)
        for (_, x), patches in zip(states, images.patches, strict=True):
            region, _, _, center, place = (np.array(mx.argmax(y, axis=-1)) for y in labels.read_patches(x))
            truth = patches[..., 0]
            for name, hits, chosen in (
                ("shapes", region == truth, (truth > 0) & (truth <= len(world.SHAPES))),
                ("digits", region == truth, truth > len(world.SHAPES)),
                ("centers", center == 1, patches[..., 3] == 1),
                ("places", place == patches[..., 4], patches[..., 4] > 0),
            ):
                right[name] += int(hits[chosen].sum())
                seen[name] += int(chosen.sum())
        for how, readings in (("", labels.read_picture(visual)), (" by token", labels.read_tokens(visual))):
            hits = np.stack([np.array(mx.argmax(y, axis=-1)) for y in readings], axis=1) == images.facts
            length = images.facts[:, FACTS.index("length")]
            for name, chosen, columns in (
                ("shape", length == 0, slice(0, 1)),
                ("count", length == 0, slice(1, 2)),
                ("color", length >= 0, slice(2, 3)),
                ("background", length >= 0, slice(3, 4)),
                *((f"{n}-digit number", length == n, slice(4, 8)) for n in (1, 2, 3)),
            ):
                right[name + how] += int(hits[chosen, columns].all(axis=1).sum())
                seen[name + how] += int(chosen.sum())
    return " ".join(f"{name} {right[name] / n:.3f}" for name, n in seen.items() if n)


def answer_report(model: Model, tokenizer: Tokenizer, held_out: list[Batch]) -> str:
    """Share of answers with every token right, by kind."""
    right, seen = Counter(), Counter()
    for batch in held_out:
        _, tokens = see(model, batch)
        count = int(batch.weights.sum())
        targets = batch.targets[:count]
        hits = np.array(mx.argmax(_answer_logits(model, batch, tokens), axis=-1))[:count] == targets
        starts = np.r_[0, np.flatnonzero(targets == tokenizer.token_to_id("<|eot_id|>")) + 1]
        for a, b in itertools.pairwise(starts):
            words = tokenizer.decode(targets[a:b].tolist()).split()
            kind = "describe" if "on" in words else " ".join(words[:2])
            seen[kind] += 1
            right[kind] += bool(hits[a:b].all())
    return " ".join(f"{kind!r} {right[kind] / n:.3f}" for kind, n in seen.most_common(10))

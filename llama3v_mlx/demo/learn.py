"""What the demo learns from: readings of patches and pictures at first, then answers; and how well it does."""

import itertools
from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tokenizers import Tokenizer

from ..model import Model
from . import world
from .data import CELLS, NUM_FACTS, Batch, ImageBatch

FACTS = ("shape", "count", "color", "background", "length", "digit 1", "digit 2", "digit 3")


class Labels(nn.Module):
    """Readings for the first stage only: of every patch, linearly; of the picture, through a few learned queries."""

    def __init__(self, vision_width: int, width: int):
        super().__init__()
        sizes = (1 + len(world.SHAPES) + 10, len(world.COLORS), len(world.BACKGROUNDS), 2)
        self.patch_heads = [nn.Linear(vision_width, n) for n in sizes]
        self.ink_head = nn.Linear(vision_width, CELLS * CELLS)
        self.queries = 0.5 * mx.random.normal((len(NUM_FACTS), width))
        self.attention = nn.MultiHeadAttention(width, 4)
        self.norm = nn.LayerNorm(width)
        self.fact_heads = [nn.Linear(width, n) for n in NUM_FACTS]

    def read_patches(self, features: mx.array) -> list[mx.array]:
        return [head(features) for head in self.patch_heads]

    def read_picture(self, visual_tokens: mx.array) -> list[mx.array]:
        x = self.norm(visual_tokens)
        queries = mx.broadcast_to(self.queries, (x.shape[0], *self.queries.shape))
        y = self.attention(queries, x, x)
        return [head(y[:, i]) for i, head in enumerate(self.fact_heads)]


def tower_states(model: Model, tiles: np.ndarray) -> tuple[mx.array, mx.array]:
    """The tower's states after half its layers, and its patch features."""
    tower = model.vision_tower
    x = tower.embeddings(mx.array(tiles))
    for i, layer in enumerate(tower.encoder.layers):
        x = layer(x)
        if i + 1 == len(tower.encoder.layers) // 2:
            middle = x
    return middle, tower.post_layernorm(x)


def tower_features(model: Model, images: ImageBatch) -> list[mx.array]:
    """Patch features of the overviews, then of the slices."""
    return [model.vision_tower(mx.array(t)) for t in (images.overviews, images.slices) if t is not None]


def visual_tokens(model: Model, images: ImageBatch, features: list[mx.array]) -> mx.array:
    """(B, tiles·num_queries, hidden_size) in the order of the prompt."""
    patch, tokens = model.vision_tower.config.patch_size, []
    for x, tiles in zip(features, (images.overviews, images.slices), strict=False):
        tokens.append(model.projector(x, (tiles.shape[1] // patch, tiles.shape[2] // patch)))
    B, _, D = tokens[0].shape
    return mx.concatenate([t.reshape(B, -1, D) for t in tokens], axis=1)


def label_loss(model: Model, labels: Labels, batch: Batch) -> mx.array:
    """How badly patch features tell what is in the patch, and visual tokens what is in the picture."""
    total = mx.array(0.0)
    for images in batch.images:
        features = []
        tiles = [t for t in (images.overviews, images.slices) if t is not None]
        for t, patches, ink in zip(tiles, images.patches, images.ink, strict=True):
            middle, x = tower_states(model, t)
            features.append(x)
            targets = mx.array(patches)
            # Where the ink is, whatever its color: what a shape can be told from, so asked for half way up.
            total += 2 * nn.losses.binary_cross_entropy(labels.ink_head(middle), mx.array(ink), reduction="mean")
            region, color, background, center = labels.read_patches(x)
            inside = targets[..., 0] > 0
            # Most patches are empty, and tell the least.
            total += _weighted(nn.losses.cross_entropy(region, targets[..., 0]), mx.where(inside, 1.0, 0.1))
            total += 0.3 * _weighted(nn.losses.cross_entropy(color, targets[..., 1]), inside)
            total += 0.3 * nn.losses.cross_entropy(background, targets[..., 2]).mean()
            total += _weighted(nn.losses.cross_entropy(center, targets[..., 3]), 0.1 + targets[..., 3])
        if images.facts is None:
            continue
        facts = mx.array(images.facts)
        readings = labels.read_picture(visual_tokens(model, images, features))
        total += 0.5 * sum(nn.losses.cross_entropy(y, facts[:, i], reduction="mean") for i, y in enumerate(readings))
    return total / max(len(batch.images), 1)


def _weighted(losses: mx.array, weights: mx.array) -> mx.array:
    return (losses * weights).sum() / mx.maximum(weights.sum(), 1)


def answer_logits(model: Model, batch: Batch, freeze_tower: bool) -> mx.array:
    """Logits (n, vocab_size) at the batch's places."""
    llama, ids = model.language_model, mx.array(batch.ids)
    h = llama.model.embed_tokens(ids)
    if batch.images:
        B, L, D = h.shape
        visual = []
        for images in batch.images:
            features = tower_features(model, images)
            features = [mx.stop_gradient(x) for x in features] if freeze_tower else features
            visual.append(visual_tokens(model, images, features))
        rows = mx.concatenate(visual, axis=1).reshape(-1, D)
        h = mx.concatenate([h.reshape(B * L, D), rows])[mx.array(batch.source)].reshape(B, L, D)
    h = llama.model(ids, input_embeddings=h)
    return llama.lm_head(h.reshape(-1, h.shape[-1])[mx.array(batch.places)])


def answer_loss(model: Model, freeze_tower: bool, batch: Batch) -> mx.array:
    losses = nn.losses.cross_entropy(answer_logits(model, batch, freeze_tower), mx.array(batch.targets))
    return _weighted(losses, mx.array(batch.weights))


def label_report(model: Model, labels: Labels, easy: list[Batch], held_out: list[Batch]) -> str:
    """The share of patches of something, and of pictures, told rightly; for easy pictures, and for all."""
    return f"easy: {_label_report(model, labels, easy)}\nall:  {_label_report(model, labels, held_out)}"


def _label_report(model: Model, labels: Labels, held_out: list[Batch]) -> str:
    right, seen = Counter(), Counter()
    for images in (images for batch in held_out for images in batch.images):
        features = tower_features(model, images)
        for x, patches in zip(features, images.patches, strict=True):
            region, center = (np.array(mx.argmax(labels.read_patches(x)[i], axis=-1)) for i in (0, 3))
            truth = patches[..., 0]
            for name, chosen in (("shapes", (truth > 0) & (truth <= 6)), ("digits", truth > 6)):
                right[name] += int((region == truth)[chosen].sum())
                seen[name] += int(chosen.sum())
            right["centers"] += int(center[patches[..., 3] == 1].sum())
            seen["centers"] += int(patches[..., 3].sum())
        readings = labels.read_picture(visual_tokens(model, images, features))
        for i, (name, y) in enumerate(zip(FACTS, readings, strict=True)):
            right[name] += int((np.array(mx.argmax(y, axis=-1)) == images.facts[:, i]).sum())
            seen[name] += len(images.facts)
    return " ".join(f"{name} {right[name] / n:.3f}" for name, n in seen.items())


def answer_report(model: Model, tokenizer: Tokenizer, held_out: list[Batch]) -> str:
    """The share of answers with every token right, by their kind."""
    right, seen = Counter(), Counter()
    for batch in held_out:
        count = int(batch.weights.sum())
        targets = batch.targets[:count]
        hits = np.array(mx.argmax(answer_logits(model, batch, True), axis=-1))[:count] == targets
        starts = np.r_[0, np.flatnonzero(targets == tokenizer.token_to_id("<|eot_id|>")) + 1]
        for a, b in itertools.pairwise(starts):
            words = tokenizer.decode(targets[a:b].tolist()).split()
            kind = "describe" if "on" in words else " ".join(words[:2])
            seen[kind] += 1
            right[kind] += bool(hits[a:b].all())
    return " ".join(f"{kind!r} {right[kind] / n:.3f}" for kind, n in seen.most_common(10))

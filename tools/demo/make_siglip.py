"""Train the demo SigLIP with the pairwise sigmoid loss, and write it as Google publishes its own.

The tower starts from the layers of the demo checkpoint; the rest is trained from scratch. A model this small learns
little from captions alone, so embeddings and patches also predict facts and labels, through heads that are discarded.
About an hour on two cores (`python -m tools.demo.make_siglip`); needs the `demo` extra.
"""

import argparse
import json
import math
import multiprocessing
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import sentencepiece
from PIL import Image

from llama3v_mlx.demo import CHECKPOINT, SIGLIP
from llama3v_mlx.features.encoder import SENTENCEPIECE, TextEncoder, published_tensors
from llama3v_mlx.generation import load
from llama3v_mlx.models.siglip import SigLIP, TextConfig, VisionConfig, siglip_loss

from . import world
from .data import NUM_FACTS, facts_of
from .evaluate import retrieval
from .fast import use_fast_activations

BATCH_SIZE = 64
POOL, REUSE = 8192, 4  # pictures kept, and number of uses of each
VISION = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


def make_tokenizer(folder: Path) -> int:
    """Train a sentencepiece model on all captions, with the special ids of Google's; returns its size."""
    captions = sorted({TextEncoder.canonicalize(text) for text in world.all_texts()})
    folder.mkdir(parents=True, exist_ok=True)
    # Every digit is a piece of its own, so that numbers share their digits.
    with (folder / SENTENCEPIECE).open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions + [str(n) for n in range(1000)]),
            model_writer=file,
            normalization_rule_name="identity",
            vocab_size=256,
            hard_vocab_limit=False,
            split_digits=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            minloglevel=2,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE)).get_piece_size()


SIDE = VISION["image_size"] // VISION["patch_size"]


def draw(rng: np.random.Generator) -> tuple[np.ndarray, str, list[int], np.ndarray]:
    """Draw a picture (112, 112, 3), its caption, its facts, and the labels of its patches.

    Labels are int32 (patches, 2): the region (see `world.Scene`), and which digit of the number it is, 0 for none.
    """
    max_side = 400 if rng.random() < 0.8 else world.MAX_SIDE
    scene = world.draw_scene(rng, world.draw_size(rng, max_side), "train", numbers=0.7)
    pixels = np.asarray(scene.image.resize((VISION["image_size"],) * 2, Image.Resampling.BICUBIC))
    region = np.asarray(scene.regions.resize((SIDE, SIDE), Image.Resampling.NEAREST), np.int32)
    middles = (np.arange(SIDE) + 0.5) / SIDE
    nearest = np.abs(middles[:, None] - np.array([x for x, _ in scene.centers])).argmin(axis=1)
    digit = np.where(region > len(world.SHAPES), 1 + nearest, 0)
    patches = np.stack([region, digit], axis=-1).reshape(-1, 2).astype(np.int32)
    return pixels, world.answer(scene, "describe"), facts_of(scene), patches


def _work(queue, seed: int) -> None:
    rng, pool = np.random.default_rng(seed), []
    while True:
        for _ in range(BATCH_SIZE // REUSE):
            pool.append(draw(rng))
        del pool[:-POOL]
        chosen = {}  # by caption, so that no picture fits two captions
        for i in rng.permutation(len(pool)):
            chosen.setdefault(pool[i][1], pool[i])
            if len(chosen) == BATCH_SIZE:
                pixels, captions, facts, patches = zip(*chosen.values(), strict=True)
                queue.put((np.stack(pixels), captions, np.array(facts, np.int32), np.stack(patches)))
                break


def train(model: SigLIP, texts: TextEncoder, steps: int, seed: int) -> None:
    """AdamW with warm-up and cosine decay."""
    trained = nn.Module()
    trained.model, trained.heads = model, [nn.Linear(VISION["hidden_size"], n) for n in NUM_FACTS]
    trained.patch_heads = [nn.Linear(VISION["hidden_size"], n) for n in (1 + len(world.SHAPES) + 10, 4)]
    schedule = optim.join_schedules(
        [optim.linear_schedule(0, 1e-3, 100), optim.cosine_decay(1e-3, max(steps - 100, 1), 1e-5)], [100]
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.99], weight_decay=0.02)
    optimizer.init(trained.trainable_parameters())
    state = [trained.state, optimizer.state]

    def losses(pixels: mx.array, ids: mx.array, facts: mx.array, patches: mx.array) -> tuple[mx.array, mx.array]:
        features = model.vision_tower(pixels)
        images = model.vision_tower.pool(features)
        told = sum(nn.losses.cross_entropy(head(images), facts[:, i]).mean() for i, head in enumerate(trained.heads))
        for i, head in enumerate(trained.patch_heads):
            told += 2 * nn.losses.cross_entropy(head(features), patches[..., i]).mean()
        paired = siglip_loss(model.logits(images, model.text_tower(ids)))
        return paired + 0.5 * told, paired

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*batch: mx.array) -> mx.array:
        (_, paired), grads = nn.value_and_grad(trained, losses)(*batch)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(trained, grads)
        return paired

    context = multiprocessing.get_context("spawn")
    queue = context.Queue(maxsize=8)
    worker = context.Process(target=_work, args=(queue, seed), daemon=True)
    worker.start()
    start, recent = time.time(), []
    for i in range(1, steps + 1):
        pixels, captions, facts, patches = queue.get()
        paired = step(*map(mx.array, (pixels, texts.tokenize(captions), facts, patches)))
        mx.eval(state, paired)
        recent.append(paired.item())
        if i % 100 == 0:
            print(f"{i}/{steps} {time.time() - start:.0f}s loss {np.mean(recent):.4f}", flush=True)
            recent = []
    worker.terminate()


def build(vocab_size: int) -> SigLIP:
    """A SigLIP whose vision layers are the demo checkpoint's."""
    model = SigLIP(
        VisionConfig.from_dict({**VISION, "model_type": "siglip_vision_model"}),
        TextConfig.from_dict({**TEXT, "vocab_size": vocab_size}),
    )
    seen = load(CHECKPOINT, dtype=mx.float32)[0].vision_tower
    tower = model.vision_tower
    tower.encoder.update(seen.encoder.parameters())
    tower.post_layernorm.update(seen.post_layernorm.parameters())
    tower.embeddings.patch_embedding.update(seen.embeddings.patch_embedding.parameters())
    tower.embeddings.position_embedding.weight = 0.3 * _waves(tower.config.side, tower.config.hidden_size)
    tower.head.probe = 0.1 * mx.random.normal(tower.head.probe.shape)
    # Initial bias as in the paper: nearly all pairs do not match.
    model.logit_scale, model.logit_bias = mx.array([math.log(10.0)]), mx.array([-10.0])
    return model


def _waves(side: int, width: int) -> mx.array:
    """Position code (side², width): sines and cosines of the column in one half, of the row in the other."""
    angles = np.arange(side)[:, None] * math.pi / np.geomspace(1.0, 2 * side, width // 4)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    both = np.concatenate([np.tile(line, (side, 1)), np.repeat(line, side, axis=0)], axis=1)
    return mx.array(both.astype(np.float32))


def save(model: SigLIP, folder: Path, vocab_size: int) -> None:
    """Write the checkpoint in float16 with the names, layouts and configs of google/siglip-*."""
    model.set_dtype(mx.float16)
    tensors = published_tensors(model)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "text_config": {**TEXT, "model_type": "siglip_text_model", "vocab_size": vocab_size},
    }
    side = VISION["image_size"]
    preprocessor = {"image_processor_type": "SiglipImageProcessor", "do_resize": True, "do_rescale": True}
    preprocessor |= {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    preprocessor |= {"rescale_factor": 1 / 255, "size": {"height": side, "width": side}}
    tokenizer = {"tokenizer_class": "SiglipTokenizer", "model_max_length": TEXT["max_position_embeddings"]}
    tokenizer |= {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "do_lower_case": True}
    for name, content in (
        ("config", config),
        ("preprocessor_config", preprocessor),
        ("tokenizer_config", tokenizer),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.make_siglip", description=__doc__)
    parser.add_argument("--out", type=Path, default=SIGLIP, help="folder of the checkpoint (default: the bundled)")
    parser.add_argument("--steps", type=int, default=3500, help="training steps (default: 3500)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    use_fast_activations()
    mx.random.seed(args.seed)
    vocab_size = make_tokenizer(args.out)
    model = build(vocab_size)
    texts = TextEncoder(args.out, model)
    train(model, texts, args.steps, args.seed)
    save(model, args.out, vocab_size)
    for kind, (right, asked) in retrieval(args.out).items():
        print(f"{kind}: {right} of {asked}")


if __name__ == "__main__":
    main()

"""Train the demo checkpoint from scratch and write it in the released Hugging Face layout.

Three stages, because a model this small does not learn to see from captions alone: tower and projector learn to label
patches and pictures, then projector and Llama learn to talk about them, then all of them train together. About three
hours on two cores (`python -m tools.demo.make`); needs the `demo` extra, and OpenBLAS on Linux. The bundled model was
then finished by `llama3v train` on data of `rows.py`.
"""

import argparse
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from llama3v_mlx.demo import CHECKPOINT, IMAGES
from llama3v_mlx.models.llama3v import Model, ModelArgs
from llama3v_mlx.tiling import ImageConfig

from . import world
from .data import Batch, Batches, draw_batch, draw_easy_batch, split_arrays
from .fast import use_fast_activations
from .learn import Labels, answer_loss, answer_report, joint_loss, label_loss, label_report
from .tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, make_tokenizer

IMAGE = ImageConfig(scale_resolution=56, patch_size=14, max_slice_nums=4)
EASY_STEPS = 700
IMAGE_FILES = {
    "Three blue circles on a white background": "three-blue-circles.png",
    "Two red stars on a yellow background": "two-red-stars.jpg",
    "Four green triangles on a black background": "four-green-triangles.png",
    "One purple cross on an orange background": "one-purple-cross.jpg",
    "The number is 42": "42.png",
    "The number is 752": "752.jpg",
}
HF_CONFIG = {
    "architectures": ["Llama3v"],
    "model_type": "llama3v",
    "torch_dtype": "float16",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": VOCAB_SIZE - len(SPECIAL_TOKENS),
    "eos_token_id": VOCAB_SIZE - len(SPECIAL_TOKENS) + 1,
    "image_size": IMAGE.scale_resolution,
    "patch_size": IMAGE.patch_size,
    "query_num": 12,
    "slice_mode": True,
    "slice_config": {
        "max_slice_nums": IMAGE.max_slice_nums,
        "patch_size": IMAGE.patch_size,
        "scale_resolution": IMAGE.scale_resolution,
    },
    "vision_config": {
        "model_type": "idefics2",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": 32 * IMAGE.patch_size,
        "patch_size": IMAGE.patch_size,
    },
}


def train(
    name: str,
    trained: nn.Module,
    loss: Callable[[Batch], mx.array],
    batches: Batches,
    steps: int,
    learning_rate: float,
    report: Callable[[], str],
    keep: Callable[[], None],
) -> None:
    """Adam with warm-up and cosine decay; the ranks of `mlx.launch` average their gradients."""
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0, learning_rate, 100),
            optim.cosine_decay(learning_rate, max(steps - 100, 1), 0.02 * learning_rate),
        ],
        [100],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.99], weight_decay=0.02)
    optimizer.init(trained.trainable_parameters())
    state = [trained.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(grads: dict) -> None:
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(trained, grads)

    @partial(mx.compile, inputs=trained.state, outputs=trained.state)
    def gradient(arrays: list[mx.array]) -> tuple[mx.array, dict]:
        return nn.value_and_grad(trained, lambda: loss(rebuild(arrays)))()

    group = mx.distributed.init()
    start, recent = time.time(), []
    for step in range(1, steps + 1):
        arrays, rebuild = split_arrays(next(batches))
        value, grads = gradient([mx.array(array) for array in arrays])
        update(nn.average_gradients(grads))
        mx.eval(state, value)
        recent.append(value.item())
        if group.rank() == 0 and step % 100 == 0:
            print(f"{name} {step}/{steps} {time.time() - start:.0f}s loss {np.mean(recent):.4f}", flush=True)
            recent = []
        if group.rank() == 0 and (step % 200 == 0 or step == steps):
            print(report(), flush=True)
            keep()


def save(model: Model, folder: Path, config: dict = HF_CONFIG) -> None:
    """Write the checkpoint in float16, with the names and layouts of the released llama3v weights."""
    weights = {}
    packed: dict[str, list[mx.array]] = {}
    for name, tensor in tree_flatten(model.parameters()):
        part, _, rest = name.partition(".")
        if part == "projector" and rest.split(".")[0] in ("q_proj", "k_proj", "v_proj"):
            packed.setdefault(f"projection.attn.in_proj_{rest.split('.')[1]}", []).append((rest, tensor))
            continue
        if name == "projector.proj.weight":
            name, tensor = "projector.proj", tensor.T
        if name.endswith("patch_embedding.weight"):
            tensor = tensor.transpose(0, 3, 1, 2)
        for ours, released in (
            ("language_model.", "llm."),
            ("vision_tower.", "vison."),
            ("projector.out_proj.", "projection.attn.out_proj."),
            ("projector.", "projection."),
        ):
            if name.startswith(ours):
                name = released + name.removeprefix(ours)
                break
        weights[name] = tensor
    for name, parts in packed.items():
        order = sorted(parts, key=lambda part: "qkv".index(part[0][0]))
        weights[name] = mx.concatenate([tensor for _, tensor in order])
    weights = {name: mx.contiguous(tensor.astype(mx.float16)) for name, tensor in sorted(weights.items())}

    shard = "model-00001-of-00001.safetensors"
    mx.save_safetensors(str(folder / shard), weights, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in weights.values())},
        "weight_map": dict.fromkeys(weights, shard),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # No repetition penalty: a number may have the same digit twice.
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")} | {"repetition_penalty": 1.0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def build_model(tokenizer: Tokenizer, config: dict = HF_CONFIG) -> Model:
    vision = config["vision_config"]
    width = config["hidden_size"]
    names = {"image": "<unk>", "image_start": "<image>", "image_end": "</image>"}
    names |= {"slice_start": "<slice>", "slice_end": "</slice>", "newline": "Ċ"}
    args = ModelArgs(
        model_type="llama3v",
        text_config=config,
        vision_config=vision,
        projector_config={
            "hidden_size": width,
            "vision_hidden_size": vision["hidden_size"],
            "num_queries": config["query_num"],
            "num_attention_heads": max(1, width // 128),
        },
        prompt_tokens={key: tokenizer.token_to_id(token) for key, token in names.items()},
    )
    model = Model(args)
    model.projector.query = 0.02 * mx.random.normal(model.projector.query.shape)
    # Low-frequency cosines, in brightness and in colors, preserve more of a patch than random weights do.
    patches = model.vision_tower.embeddings.patch_embedding
    patches.weight = 0.15 * mx.array(_cosine_patches(patches.weight.shape[0], IMAGE.patch_size))
    # Cosines of all wavelengths with the patches' amplitude make neighbouring patches easy to find.
    table = model.vision_tower.embeddings.position_embedding
    side, dim = model.vision_tower.config.side, table.weight.shape[1]
    angles = np.arange(side)[:, None] * math.pi / np.geomspace(1.5, side, dim // 2)
    table.weight[:side] = 0.5 * mx.array(np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
    table.weight[side:] = 0
    return model


def _cosine_patches(count: int, patch: int) -> np.ndarray:
    """Two-dimensional cosines (count, patch, patch, 3), longest first, two of brightness to one of each color."""
    waves = sorted(((u, v) for u in range(patch) for v in range(patch)), key=lambda wave: (sum(wave), wave))
    line = np.cos(math.pi * np.outer(np.arange(patch), np.arange(patch) + 0.5) / patch)
    line /= np.linalg.norm(line, axis=1, keepdims=True)
    tints = [np.array(t) / np.linalg.norm(t) for t in ((1, 1, 1), (1, -1, 0), (1, 1, -2))]
    numbers = [count - 2 * (count // 4), count // 4, count // 4]
    filters = [
        np.einsum("i,j,c->ijc", line[v], line[u], tint)
        for tint, n in zip(tints, numbers, strict=True)
        for u, v in waves[:n]
    ]
    return np.stack(filters).astype(np.float32)


def draw_images(folder: Path) -> None:
    """Draw the bundled pictures, each named after its content."""
    folder.mkdir(exist_ok=True)
    for seed in range(10**7, 10**7 + 10**5):
        rng = np.random.default_rng(seed)
        scene = world.draw_scene(rng, world.draw_size(rng, 800), "test")
        title = world.answer(scene, "describe").rstrip(".")
        name = IMAGE_FILES.get(title)
        if name and min(scene.image.size) > 240 and not (folder / name).exists():
            scene.image.save(folder / name)
        if all((folder / name).exists() for name in IMAGE_FILES.values()):
            return


def start_ranks(count: int) -> int:
    """Run this command as `count` ranks; `mlx.launch` would spend a core on waiting."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(hosts, file)
        file.flush()
        # On a CPU, MLX runs everything but matmul on one thread, so processes use the cores better than BLAS threads.
        env = {**os.environ, "MLX_HOSTFILE": file.name, "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tools.demo.make", *sys.argv[1:]]
        ranks = [subprocess.Popen(command, env={**env, "MLX_RANK": str(i)}) for i in range(count)]
        try:
            return max(rank.wait() for rank in ranks)
        finally:
            for rank in ranks:
                rank.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.make", description=__doc__)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder of the checkpoint (default: the bundled)")
    parser.add_argument("--work", type=Path, help="folder that keeps the weights after each stage, to go on from them")
    parser.add_argument("--steps", type=int, nargs=3, default=[12000, 1500, 2500], help="training steps of each stage")
    parser.add_argument("--ranks", type=int, default=2, help="processes that share each step, one core each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.ranks > 1 and "MLX_RANK" not in os.environ:
        sys.exit(start_ranks(args.ranks))

    use_fast_activations()
    mx.random.seed(args.seed)
    group = mx.distributed.init()
    tokenizer = make_tokenizer(args.out)
    mx.eval(mx.distributed.all_sum(mx.array(0)))  # all ranks wrote the same files
    model = build_model(tokenizer)
    labels = Labels(HF_CONFIG["vision_config"]["hidden_size"], HF_CONFIG["hidden_size"])
    mx.eval(model.parameters(), labels.parameters())
    print(f"{sum(p.size for _, p in tree_flatten(model.parameters())) / 1e6:.2f} M parameters", file=sys.stderr)

    if group.rank() == 0 and args.out == CHECKPOINT:
        draw_images(IMAGES)
    options = {"config": IMAGE, "num_queries": HF_CONFIG["query_num"], "size": 16}
    rng = np.random.default_rng(10**6)
    held_out = [draw_batch(rng, tokenizer=tokenizer, split="test", **options) for _ in range(16)]
    easy = [draw_easy_batch(rng, 48, IMAGE, "test", plain=0.0) for _ in range(4)]

    sight, speech, both = nn.Module(), nn.Module(), nn.Module()
    sight.tower, sight.projector, sight.labels = model.vision_tower, model.projector, labels
    speech.projector, speech.llama = model.projector, model.language_model
    both.model, both.labels = model, labels
    read, speak = partial(label_report, model, labels, easy), partial(answer_report, model, tokenizer)
    stages = (
        ("sight", sight, partial(label_loss, model, labels), read, 16, 1e-3),
        ("speech", speech, partial(answer_loss, model, freeze_tower=True), speak, 16, 1.5e-3),
        ("all", both, partial(joint_loss, model, labels), speak, 16, 5e-4),
    )
    for steps, (name, trained, loss, report, size, rate) in zip(args.steps, stages, strict=True):
        kept = args.work and args.work / f"{name}.safetensors"
        if kept and kept.exists():
            model.load_weights(str(kept))
            continue
        options |= {"size": size, "num_images": 1 if name == "sight" else None}
        options |= {"easy": EASY_STEPS if name == "sight" else 0, "pages": name == "sight"}
        seed = args.seed + 1000 * group.rank() + len(name)
        batches = Batches(seed, tokenizer_file=str(args.out / "tokenizer.json"), split="train", **options)
        try:
            train(name, trained, loss, batches, steps, rate, partial(report, held_out), partial(save, model, args.out))
        finally:
            batches.close()
        if kept and group.rank() == 0:
            args.work.mkdir(parents=True, exist_ok=True)
            mx.save_safetensors(str(kept), dict(tree_flatten(model.parameters())))


if __name__ == "__main__":
    main()

"""Train a Llama3-V from stored features: `llama3v train --stage pretrain|finetune …`.

pretrain: the projector is trained on patch features. finetune: Llama is trained on visual tokens. Missing features are
embedded first; after that, neither the tower nor the images are needed.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from .cli import check_plot, count, note_slow_cpu, positive, run, seed, share, share_or_more
from .files import printable

LEARNING_RATES = {"pretrain": 1e-3, "lora": 2e-4, "full": 2e-5}
DTYPES = ("float16", "bfloat16", "float32")
SCHEDULES = ("cosine", "linear", "constant")
# Options that must be the same when a run is resumed.
OPTIONS = ("stage", "batch_size", "grad_accumulation_steps", "learning_rate", "warmup", "lr_schedule", "weight_decay")
OPTIONS += ("max_seq_length", "seed", "dtype", "lora_rank", "lora_layers", "lora_scale", "lora_dropout", "dora", "full")


def train(args: argparse.Namespace) -> None:
    """Prepare the data, train, save."""
    import mlx.core as mx

    from .checkpoint import name_of
    from .device import on_gpu
    from .generation import load
    from .training.data import Dialogues
    from .training.loop import Loop, LoopSettings
    from .training.prepare import agree, check_resume, prepare_features, say_rejected
    from .training.ranks import Ranks
    from .training.run import RunFolder
    from .training.trainer import Trainer

    ranks = Ranks()
    with ranks.together():
        if args.batch_size % ranks.size:
            raise ValueError(f"--batch-size {args.batch_size} cannot be shared by {ranks.size} ranks")
        if ranks.rank == 0:
            note_slow_cpu()
            if args.plot:
                check_plot(args.plot)
        args.dtype = args.dtype or ("bfloat16" if on_gpu() else "float32")
        model, processor = load(args.model, dtype=getattr(mx, args.dtype), lazy=True)
        sets = [Dialogues(path, args.image_folder, processor, args.strict) for path in (args.data, args.val) if path]
    store, tiler = prepare_features(args.features, args.model, args.stage, sets, args.workers, ranks)
    with ranks.together():
        for rows in sets:
            rows.find_images(tiler, min(args.max_seq_length, model.language_model.args.max_position_embeddings))
        if ranks.rank == 0:
            say_rejected(sets)
        per_epoch = max(1, len(sets[0]) // args.batch_size // args.grad_accumulation_steps)
        steps = args.iters or per_epoch * args.epochs
        args.warmup = round(0.03 * steps) if args.warmup is None else args.warmup
        options = _options(args, steps, sets, store)
    # Causes first: the number of steps follows from the rows, and the default of --warmup from that.
    facts = {key: getattr(args, key) for key in ("iters", "epochs", "eval_every")}
    facts |= {key: value for key, value in options.items() if key not in ("warmup", "steps")}
    agree(ranks, facts | {"warmup": args.warmup}, sets)
    if len(sets[0]) < args.batch_size:
        raise ValueError(f"{args.data}: {len(sets[0])} rows do not fill a batch of {args.batch_size}")

    with ranks.together():
        notes = {"model": name_of(args.model)}
        run_folder = RunFolder(args.out, options, args.resume, ranks.rank == 0, notes)
        newest = run_folder.newest_step() if args.resume else 0
    check_resume(ranks, args.out, newest)
    with ranks.together():
        adapter = _choose_parameters(model, args, keep_projector=store.info.kind == "patch")
        optimizer = _optimizer(args, steps)
        optimizer.init(model.trainable_parameters())
        state = {"step": 0, "best_loss": None, "best_step": None, "skipped": 0}
        if ranks.rank == 0:
            state |= run_folder.restore(model, optimizer)
    state = ranks.gather(state)[0]
    step = state.pop("step")
    model.update(ranks.take_first(model.trainable_parameters()))
    if step:
        optimizer.state = ranks.take_first(optimizer.state)
    if args.grad_checkpoint:
        from mlx_lm.tuner.trainer import grad_checkpoint

        grad_checkpoint(model.layers[0])
    trainer = Trainer(model.train(), optimizer)
    trainer.skipped = state["skipped"]
    if ranks.rank == 0:
        _say_start(model, sets, step, steps)
    with ranks.connected():
        intervals = {key: getattr(args, key) for key in ("report_every", "eval_every", "save_every")}
        settings = LoopSettings(steps, per_epoch, args.batch_size, args.grad_accumulation_steps, args.seed, **intervals)
        loop = Loop(
            settings,
            trainer,
            data=sets[0],
            validation=sets[1] if args.val else None,
            store=store,
            run_folder=run_folder,
            adapter=adapter,
            state=state,
        )
        loop.run(step)
    if ranks.rank == 0:
        out = printable(args.out)
        print(f"{out}: done; --adapter-path {out} uses it, train --fuse merges it", file=sys.stderr)
        if args.plot:
            plot(run_folder.metrics, args.plot)


def _options(args: argparse.Namespace, steps: int, sets: list, store) -> dict:
    """Everything the steps depend on, which must be equal on all ranks and when a run is resumed."""
    from .training.run import weights_digest

    options = {key: getattr(args, key) for key in OPTIONS} | {"steps": steps}
    options |= {"data": sets[0].digest(), "val": sets[1].digest() if args.val else None}
    options |= {"weights": weights_digest(args.model), "features": store.info.fingerprint}
    return options | {"store_dtype": store.info.dtype, "examples": [rows.examples_digest() for rows in sets]}


def _choose_parameters(model, args: argparse.Namespace, keep_projector: bool) -> dict:
    """Freeze everything but the parameters of the stage, drop unused modules, return the adapter's config."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(args.seed)
    model.pop("vision_tower")
    if not keep_projector:
        model.pop("projector")
    model.freeze()
    if args.stage == "pretrain":
        model.projector.set_dtype(mx.float32)
        model.projector.unfreeze()
        return {"fine_tune_type": "full", "num_layers": 0, "lora_parameters": {}}
    if args.full:
        if any(isinstance(module, nn.QuantizedLinear) for module in model.language_model.modules()):
            raise ValueError(f"{args.model}: is quantized; --full needs the original checkpoint, LoRA does not")
        model.language_model.unfreeze()
        return {"fine_tune_type": "full", "num_layers": 0, "lora_parameters": {}}
    lora = {"rank": args.lora_rank, "scale": args.lora_scale, "dropout": args.lora_dropout}
    layers = min(args.lora_layers, len(model.layers))
    linear_to_lora_layers(model, layers, lora, use_dora=args.dora)
    return {"fine_tune_type": "dora" if args.dora else "lora", "num_layers": layers, "lora_parameters": lora}


def _optimizer(args: argparse.Namespace, steps: int):
    import mlx.optimizers as optim
    from mlx_lm.tuner.utils import build_schedule

    rate, decay = args.learning_rate, max(1, steps - args.warmup)
    name, arguments = {
        "cosine": ("cosine_decay", [rate, decay]),
        "linear": ("linear_schedule", [rate, 0.0, decay]),
        "constant": ("linear_schedule", [rate, rate, decay]),
    }[args.lr_schedule]
    schedule = build_schedule({"name": name, "arguments": arguments, "warmup": args.warmup})
    return optim.AdamW(schedule, betas=[0.9, 0.999], weight_decay=args.weight_decay, bias_correction=True)


def _say_start(model, sets: list, step: int, steps: int) -> None:
    from mlx.utils import tree_flatten

    trained = sum(p.size for _, p in tree_flatten(model.trainable_parameters()))
    rows = " and ".join(f"{len(rows)} rows of {printable(str(rows.path))}" for rows in sets)
    begun = f", continued after step {step}" if step else ""
    print(f"{trained / 1e6:.3f} M trainable parameters; {rows}; {steps} steps{begun}", file=sys.stderr)


def plot(metrics: Path, picture: str) -> None:
    """Draw the loss curves of a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label in (("loss", "training"), ("validation_loss", "validation")):
        if points := [(row["step"], row[key]) for row in rows if row.get(key) is not None]:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key != "loss" else None)
    axes.set(xlabel="step", ylabel="loss per answer token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)
    print(f"{printable(picture)}: the loss curves", file=sys.stderr)


def fuse(args: argparse.Namespace) -> None:
    """Merge an adapter into its model and write a plain checkpoint."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.utils import save_model

    from .checkpoint import CONFIG, find_checkpoint, read_config, read_json
    from .files import list_folder, new_folder, writing
    from .loading import load_adapters, load_model

    folder, out = find_checkpoint(args.model), Path(args.out)
    if "text_config" not in read_json(folder / CONFIG):
        raise ValueError(
            f"{args.model}: not an MLX checkpoint; convert it first: llama3v convert --hf-path {args.model}"
        )
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already; remove it, or give another --out")
    model = load_model(folder, read_config(folder), lazy=True)
    dtypes = {name: tensor.dtype for name, tensor in tree_flatten(model.parameters())}
    load_adapters(model, args.adapter_path)
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))
    model.update(tree_unflatten([(n, t.astype(dtypes[n])) for n, t in tree_flatten(model.parameters())]))
    with new_folder(out, sum(t.nbytes for _, t in tree_flatten(model.parameters()))) as partial:
        for path in list_folder(folder):
            old = path.name.endswith((".safetensors", ".safetensors.index.json", "README.md"))  # of other weights
            if path.is_file() and not old:
                shutil.copyfile(path, partial / path.name)
        with writing(out):
            save_model(partial, model)
    merged = printable(f"{out}: {args.model} merged with {args.adapter_path}")
    print(f"{merged}; peak memory {mx.get_peak_memory() / 1e9:.2f} GB")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama3v train",
        usage="llama3v train --stage STAGE --model DIR --data FILE --out DIR [options]\n"
        "       llama3v train --fuse --model DIR --adapter-path DIR --out DIR",
        description="Train a Llama3-V on stored features: first its projector, then its Llama.",
    )
    parser.add_argument("--stage", choices=("pretrain", "finetune"), help="train the projector or Llama")
    parser.add_argument("--model", required=True, help="folder or Hub repository of a checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run: checkpoints, metrics, adapters")
    parser.add_argument("--fuse", action="store_true", help="merge --adapter-path into --model and write it to --out")
    parser.add_argument("--adapter-path", metavar="DIR", help="adapters of a run, for --fuse")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="FILE", help="conversations in LLaVA's format, .json or .jsonl")
    data.add_argument("--val", metavar="FILE", help="conversations to validate with")
    data.add_argument("--image-folder", metavar="DIR", help="folder that image paths start from")
    data.add_argument("--features", metavar="STORE", help="feature store of the images; missing features are embedded")
    data.add_argument("--workers", type=positive, default=4, help="threads that decode images (default: 4)")
    data.add_argument(
        "--max-seq-length", type=positive, default=2048, help="longest row in tokens; longer ones are skipped"
    )
    data.add_argument("--strict", action="store_true", help="stop at the first unusable row")
    what = parser.add_argument_group("trained parameters of finetune (default: LoRA)")
    what.add_argument("--full", action="store_true", help="train all of Llama")
    what.add_argument("--lora-rank", type=positive, default=16, help="rank (default: 16)")
    what.add_argument("--lora-layers", type=positive, default=16, help="number of last layers with LoRA (default: 16)")
    what.add_argument(
        "--lora-scale", type=share_or_more, default=2.0, help="scale, alpha / rank in other tools (default: 2)"
    )
    what.add_argument("--lora-dropout", type=share, default=0.0, help="dropout (default: 0)")
    what.add_argument("--dora", action="store_true", help="DoRA instead of LoRA")
    how = parser.add_argument_group("optimization")
    how.add_argument("--batch-size", type=positive, default=4, help="rows per batch, over all ranks (default: 4)")
    how.add_argument("--grad-accumulation-steps", type=positive, default=1, help="batches per step (default: 1)")
    how.add_argument("--iters", type=positive, help="steps, instead of --epochs")
    how.add_argument("--epochs", type=positive, default=1, help="passes over the data (default: 1)")
    how.add_argument(
        "--learning-rate",
        type=share_or_more,
        help="(default: 1e-3 for pretrain, 2e-4 for LoRA, 2e-5 for --full)",
    )
    how.add_argument("--warmup", type=count, help="warm-up steps (default: 3%% of all)")
    how.add_argument("--lr-schedule", choices=SCHEDULES, default="cosine", help="decay of the rate (default: cosine)")
    how.add_argument("--weight-decay", type=share_or_more, default=0.0, help="(default: 0)")
    how.add_argument("--grad-checkpoint", action="store_true", help="recompute activations to save memory")
    how.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="(default: bfloat16; float32 on a CPU)"
    )
    how.add_argument("--seed", type=seed, default=0, help="(default: 0)")
    keep = parser.add_argument_group("reports and checkpoints")
    keep.add_argument("--resume", action="store_true", help="continue the run in --out")
    keep.add_argument("--save-every", type=positive, default=100, metavar="STEPS", help="(default: 100)")
    keep.add_argument("--eval-every", type=positive, default=200, metavar="STEPS", help="(default: 200)")
    keep.add_argument("--report-every", type=positive, default=10, metavar="STEPS", help="(default: 10)")
    keep.add_argument("--plot", metavar="PNG", help="draw the loss curves; needs matplotlib")
    keep.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    needed = ("adapter_path",) if args.fuse else ("stage", "data", "features")
    if missing := [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]:
        parser.error(f"give {', '.join(missing)}")
    if args.stage == "pretrain" and (args.full or args.dora):
        parser.error("--full and --dora are for --stage finetune")
    if args.learning_rate is None:
        kind = "pretrain" if args.stage == "pretrain" else "full" if args.full else "lora"
        args.learning_rate = LEARNING_RATES[kind]
    run(lambda: fuse(args) if args.fuse else train(args), args.debug, awake=True)


if __name__ == "__main__":
    main()

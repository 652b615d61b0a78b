"""Write the model card (README.md) of a conversion."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from .. import __version__
from .rows import Row
from .shard_writer import Plan


def model_card(
    source: str | Path, name: str, config: dict, plan: Plan, rows: Sequence[Row] = (), comparison: str = ""
) -> str:
    """Model card in the Hub's form.

    Args:
        source: Hub repository, local folder or description of the source.
        name: of the result.
        config: of the result.
        plan: of the conversion.
        rows: prompts that the quantization was calibrated on.
        comparison: result of `--verify`, one line.
    """
    repo = None if " " in str(source) or Path(source).expanduser().is_dir() else str(source)
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="image-text-to-text",
        tags=["mlx", config["model_type"]],
        base_model=repo,
        base_model_relation="quantized" if repo and "quantization" in config else None,
    )
    origin = f"[{repo}](https://huggingface.co/{repo})" if repo else source if " " in source else "a local checkpoint"
    facts = [f"Language model: {_form(config, plan)}. Vision tower and projector are not quantized."]
    if rows:
        prompts, images = len(rows), sum(len(row.images) for row in rows)
        facts.append(f"Calibrated with GPTQ on {_count(prompts, 'prompt')} with {_count(images, 'image')}.")
    if comparison:
        facts.append(f"Compared with its source: {comparison}.")
    card = _CARD.format(name=name, origin=origin, facts="\n".join(facts), version=__version__)
    return f"---\n{data.to_yaml()}\n---\n\n{card}"


def _form(config: dict, plan: Plan) -> str:
    if "quantization" not in config:
        return config["dtype"]
    bits = sorted({own["bits"] for own in plan.quantized.values()})
    form = {**config["quantization"], "bits": bits[0] if len(bits) == 1 else f"{bits[0]}- to {bits[-1]}"}
    return "{bits}-bit {mode}, groups of {group_size}".format(**form) + f", {plan.llama_bpw:.2f} bits per weight"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


_CARD = """\
# {name}

Converted from {origin} to [MLX](https://github.com/ml-explore/mlx) with llama3v_mlx {version}.
{facts}

```bash
llama3v generate --model {name} --image photo.jpg --prompt "What is this image?"
```

```python
from llama3v_mlx import generate, load

model, processor = load("{name}")
print(generate(model, processor, "What is this image?", image="photo.jpg"))
```

The weights keep the licence of the checkpoint they were converted from.
"""

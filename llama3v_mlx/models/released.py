"""Names and layouts of the tensors of released checkpoints, mapped to our models' parameters."""

import re

import mlx.core as mx

# Released names → ours, in order. `vison` is the spelling of the llama3v weights.
RENAMES = (
    (r"^llm\.", "language_model."),
    (r"^(?:vison|vision|vpm|vision_model)\.", "vision_tower."),
    (r"^text_model\.", "text_tower."),
    (r"^(?:projection|resampler)\.", "projector."),
    (r"^projector\.attn\.", "projector."),
    (r"\.attention\.in_proj_(weight|bias)$", r".attention.in_proj.\1"),
)


def rename(name: str) -> str:
    """Map a released tensor name to this model's; our own names are unchanged."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def relayout(name: str, tensor: mx.array) -> list[tuple[str, mx.array]]:
    """Convert a renamed tensor to MLX's layout: unchanged, transposed, split, or dropped."""
    if name.endswith("rotary_emb.inv_freq"):
        return []
    if name == "vision_tower.embeddings.patch_embedding.weight" and tensor.shape[-1] != 3:
        return [(name, tensor.transpose(0, 2, 3, 1))]  # (out, in, kh, kw) → (out, kh, kw, in)
    if name == "projector.proj":
        return [("projector.proj.weight", tensor.T)]  # used as x @ proj
    if name.startswith("projector.in_proj_"):
        kind = name.rpartition("_")[2]
        parts = mx.split(tensor, 3)
        return [(f"projector.{p}_proj.{kind}", part) for p, part in zip("qkv", parts, strict=True)]
    return [(name, tensor)]


def lay_out(name: str, tensor: mx.array) -> dict[str, mx.array]:
    """Map one tensor to our model's parameters, lazily. A misfit is kept, for `check_tensors` to report."""
    try:
        return dict(relayout(rename(name), tensor))
    except (ValueError, IndexError):
        return {rename(name): tensor}

"""Both projectors at the released width against their formulas in torch."""

import mlx.core as mx
import pytest

from llama3v_mlx.models.llama3v import Model
from llama3v_mlx.models.projector import ProjectorConfig, Resampler, build_projector

from .parity import below, randomize, relative_error

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.reference

D, VISION, QUERIES, HEADS = 4096, 1152, 96, 32
LAYOUT = {
    "query": (QUERIES, D),
    "proj": (D, D),
    "kv_proj.weight": (D, VISION),
    "attn.in_proj_weight": (3 * D, D),
    "attn.in_proj_bias": (3 * D,),
    "attn.out_proj.weight": (D, D),
    "attn.out_proj.bias": (D,),
    **{f"{norm}.{kind}": (D,) for norm in ("ln_q", "ln_kv", "ln_post") for kind in ("weight", "bias")},
}
Weights = dict[str, torch.Tensor]


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * noise + name.endswith("weight")
    return noise * shape[-1] ** -0.5


def position_code(h: int, w: int, dim: int) -> torch.Tensor:
    """Position embeddings (h·w, dim): sin and cos of the column, then sin and cos of the row."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    x, y = (n.reshape(-1, 1).float() * omega for n in (x, y))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


def norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def resample(w: Weights, features: torch.Tensor, h: int, width: int) -> torch.Tensor:
    """Compute visual tokens (B, queries, dim) from features (B, h·width, vision)."""
    dim = w["proj"].shape[0]
    values = norm(w, "ln_kv", features @ w["kv_proj.weight"].T).transpose(0, 1)
    keys = values + position_code(h, width, dim)[:, None]
    queries = norm(w, "ln_q", w["query"])[:, None].expand(-1, len(features), -1)
    attended, _ = torch.nn.functional.multi_head_attention_forward(
        queries,
        keys,
        values,
        embed_dim_to_check=dim,
        num_heads=dim // 128,
        in_proj_weight=w["attn.in_proj_weight"],
        in_proj_bias=w["attn.in_proj_bias"],
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=w["attn.out_proj.weight"],
        out_proj_bias=w["attn.out_proj.bias"],
        training=False,
        need_weights=False,
    )
    return (norm(w, "ln_post", attended) @ w["proj"]).transpose(0, 1)


def random_features(*shape: int) -> torch.Tensor:
    """Draw small features, so that ln_kv's eps matters."""
    return 0.02 * torch.randn(*shape, VISION, generator=torch.Generator().manual_seed(1))


def sanitized(weights: Weights, prefix: str) -> dict[str, mx.array]:
    return Model.sanitize({f"{prefix}.{name}": mx.array(tensor.numpy()) for name, tensor in weights.items()})


def load_resampler(weights: dict[str, mx.array]) -> Resampler:
    resampler = Resampler(ProjectorConfig(D, VISION, QUERIES, HEADS))
    resampler.load_weights(below(weights, "projector"), strict=True)
    return resampler


@pytest.fixture(scope="module")
def weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {name: draw(name, shape, generator) for name, shape in LAYOUT.items()}


@pytest.fixture(scope="module")
def resampler(weights: Weights) -> Resampler:
    return load_resampler(sanitized(weights, "resampler"))


def test_both_releases_name_the_same_tensors(weights: Weights, resampler: Resampler) -> None:
    ours, theirs = sanitized(weights, "resampler"), sanitized(weights, "projection")
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


# 7x143 is wider than the initial 70x70 table of the released code.
@pytest.mark.parametrize("batch, h, w", [(1, 7, 143), (2, 12, 17), (3, 5, 3), (1, 1, 1)])
def test_resampler(weights: Weights, resampler: Resampler, batch: int, h: int, w: int) -> None:
    features = random_features(batch, h * w)
    with torch.no_grad():
        expected = resample(weights, features, h, w)
    # Measured 7e-7 to 1.4e-6: a different order of float32 sums.
    assert relative_error(resampler(mx.array(features.numpy()), (h, w)), expected) <= 1e-5


# Twice the measured 1.2e-3 and 9.2e-3, which include the rounding of weights and features.
@pytest.mark.parametrize("dtype, bound", [(mx.float16, 2.5e-3), (mx.bfloat16, 2e-2)])
def test_half_precision(weights: Weights, resampler: Resampler, dtype: mx.Dtype, bound: float) -> None:
    features = mx.array(random_features(1, 9 * 5).numpy())
    half = load_resampler(sanitized(weights, "resampler"))
    half.set_dtype(dtype)
    tokens = half(features.astype(dtype), (9, 5))
    assert tokens.dtype == dtype
    assert relative_error(tokens, resampler(features, (9, 5))) <= bound


class Block(torch.nn.Module):
    """Block of the article's projector, built from torch's own modules."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(dim, eps=1e-6)
        self.attention = torch.nn.MultiheadAttention(dim, dim // 128, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


def self_attention(vision: int, dim: int) -> torch.nn.Module:
    """Create the article's projector."""
    layers = (torch.nn.Linear(vision, dim), Block(dim), Block(dim), torch.nn.LayerNorm(dim, eps=1e-6))
    return randomize(torch.nn.Sequential(*layers), 0)


def named_as_ours(tensors: Weights) -> dict[str, mx.array]:
    """Return the tensors of `self_attention` under the names of our module."""
    found = {}
    for name, tensor in tensors.items():
        place, _, rest = name.partition(".")
        rest, tensor = rest.replace("attention.out_proj", "out_proj"), mx.array(tensor.numpy())
        where = {"0": "linear.", "1": "blocks.0.", "2": "blocks.1.", "3": "norm."}[place]
        if rest.startswith("attention.in_proj_"):
            for part, each in zip("qkv", mx.split(tensor, 3), strict=True):
                found[f"{where}{part}_proj.{rest.rpartition('_')[2]}"] = each
        else:
            found[where + rest] = tensor
    return found


def test_self_attention() -> None:
    theirs = self_attention(VISION, D)
    ours = build_projector(ProjectorConfig(D, VISION, 35, HEADS, projector_type="self-attention"))
    ours.load_weights(list(named_as_ours(theirs.state_dict()).items()), strict=True)
    features = torch.randn(2, 35, VISION, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(features)
    # A different order of float32 sums of thousands of terms.
    assert relative_error(ours(mx.array(features.numpy()), (5, 7)), expected) <= 1e-5

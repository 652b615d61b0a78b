"""Shared by the parity tests: weights that exercise every parameter, and a measure of error."""

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Randomize every parameter, including biases and norms, so that none can be lost or swapped unnoticed.

    Matrices keep a unit scale, so that attention is not uniform; embeddings are small, so that a norm's eps matters.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            for name, parameter in layer.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if isinstance(layer, torch.nn.Embedding):
                    parameter.copy_(0.02 * noise)
                elif parameter.ndim > 1:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                else:
                    parameter.copy_(0.1 * noise + (name == "weight"))
    return module.eval()


def released(module: torch.nn.Module, prefix: str) -> dict[str, mx.array]:
    """Return a module's tensors under the names of a released checkpoint."""
    return {f"{prefix}.{name}": mx.array(tensor.numpy()) for name, tensor in module.state_dict().items()}


def below(weights: dict[str, mx.array], prefix: str) -> list[tuple[str, mx.array]]:
    """Return the tensors under `prefix`, without it, as a list for `load_weights`."""
    return [(name.removeprefix(f"{prefix}."), w) for name, w in weights.items() if name.startswith(f"{prefix}.")]


def relative_error(ours: mx.array, reference: torch.Tensor | mx.array) -> float:
    """L2 norm of the difference divided by that of the reference."""
    ours = np.array(ours.astype(mx.float32), dtype=np.float64)
    reference = np.asarray(reference, dtype=np.float64)
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))

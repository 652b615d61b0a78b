"""Build the Llama3-V of a checkpoint, and load its weights strictly."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from .checkpoint import CONFIG, cast, check_tensors, read_tensors
from .config import one_line
from .fields import CheckpointError
from .models.llama3v import Model, ModelArgs
from .models.released import lay_out


def build_model(config: dict, tensors: dict[str, mx.array] | None = None, folder: Path = Path()) -> Model:
    """Build the model of a config in our layout, without weights, quantized as config and `tensors` say.

    Raises:
        CheckpointError: naming `folder`, if the config's sizes do not make a model.
    """
    try:
        model = Model(ModelArgs.from_dict(config))
        if tensors is not None:
            quantize_as_saved(model, config.get("quantization"), tensors)
    except (TypeError, ValueError, KeyError, ArithmeticError) as e:
        raise CheckpointError(f"{folder / CONFIG}: {one_line(e)}") from e
    return model


def quantize_as_saved(model: nn.Module, quantization: dict | None, tensors: dict[str, mx.array]) -> None:
    """Quantize the layers of a model without weights as a config's `quantization` and its tensors say."""
    if not quantization:
        return

    def as_saved(path: str, module: nn.Module) -> bool | dict:
        own = quantization.get(path)
        return own if isinstance(own, dict) else hasattr(module, "to_quantized") and f"{path}.scales" in tensors

    defaults = {key: quantization[key] for key in ("group_size", "bits")}
    nn.quantize(model, **defaults, mode=quantization.get("mode", "affine"), class_predicate=as_saved)


def load_model(folder: Path, config: dict, dtype: mx.Dtype | None = None, lazy: bool = False) -> Model:
    """Load the model of a folder in either layout, with strict weights.

    Args:
        folder: the checkpoint.
        config: its config, from `read_config`.
        dtype: dtype that floating-point tensors are cast to; by default they are not cast.
        lazy: read the tensors when they are first used.

    Raises:
        CheckpointError: if tensors are missing, unknown or of the wrong shape.
    """
    tensors = model_tensors(folder, dtype)
    model = build_model(config, tensors, folder)
    check_tensors(folder, model, tensors)
    model.load_weights(list(tensors.items()))
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    return model


def model_tensors(folder: Path, dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
    """Load the tensors of a folder lazily, by our model's names, floating-point ones cast to `dtype`."""
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        tensors.update(lay_out(name, tensor))
    return cast(tensors, dtype)

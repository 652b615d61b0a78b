"""Build the Llama3-V of a checkpoint, and load its weights and adapters strictly."""

from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .checkpoint import CONFIG, cast, check_tensors, read_shard, read_tensors
from .config import ADAPTER, LORA, one_line, read_json
from .fields import CheckpointError, check_fields
from .models.llama3v import Model, ModelArgs
from .models.released import lay_out

ADAPTERS, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"
ADAPTED = ("lora_a", "lora_b", "m")  # parameters of mlx-lm's LoRA and DoRA layers


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


def model_tensors(
    folder: Path, dtype: mx.Dtype | None = None, names: Iterable[str] | None = None
) -> dict[str, mx.array]:
    """Load the tensors of a folder lazily, by our model's names, floating-point ones cast to `dtype`.

    Args:
        folder: the checkpoint.
        dtype: None: they are not cast.
        names: of the tensors that are wanted; None: all.

    Raises:
        CheckpointError: if a shard is missing or damaged.
    """
    tensors = {}
    for name, tensor in read_tensors(folder).items():
        tensors.update(lay_out(name, tensor))
    if names is not None:
        tensors = {name: tensors[name] for name in names}
    return cast(tensors, dtype)


def load_adapters(model: Model, folder: str | Path) -> None:
    """Load adapters into a model: LoRA layers, or whole parameters, cast to the model's dtypes.

    Raises:
        CheckpointError: if the folder has no adapters, not all of them, or those of another model.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers  # slow to import

    path = Path(folder) / ADAPTER_CONFIG
    config = check_fields(str(path), read_json(path), ADAPTER, ("num_layers",))
    kind = config.get("fine_tune_type", "lora")
    if kind != "full":
        where = f"{path}: lora_parameters"
        parameters = check_fields(where, config.get("lora_parameters"), LORA, ("rank", "scale"))
        try:
            linear_to_lora_layers(model, config["num_layers"], {"dropout": 0.0, **parameters}, use_dora=kind == "dora")
        except (TypeError, ValueError, KeyError) as e:
            raise CheckpointError(f"{path}: {one_line(e)}") from e
    expected = dict(tree_flatten(model.parameters()))
    tensors = read_shard(Path(folder) / ADAPTERS)
    rest = {name: p for name, p in expected.items() if name.rpartition(".")[2] not in ADAPTED}
    check_tensors(Path(folder), model, {**rest, **tensors})
    model.load_weights([(name, tensor.astype(expected[name].dtype)) for name, tensor in tensors.items()], strict=False)
    model.eval()

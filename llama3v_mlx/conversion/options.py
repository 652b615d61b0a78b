"""The options of a conversion: what they may be, and whether they combine."""

from pathlib import Path

DTYPES = ("float16", "bfloat16", "float32")
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")  # mlx-lm's
SENSITIVE = "sensitive"
# MLX's quantization modes: supported group sizes and bits, the default first.
MODES = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "nvfp4": ((16,), (4,)),
    "mxfp8": ((32,), (8,)),
}


def check_quantization(
    quantize: bool,
    q_bits: int | None,
    q_group_size: int | None,
    q_mode: str,
    quant_predicate: str | None,
    q_target_bpw: float | None = None,
) -> dict | None:
    """Quantization settings (group_size, bits, mode) of the options, or None; ValueError if they do not combine."""
    if not quantize:
        given = {"q_bits": q_bits, "q_group_size": q_group_size, "quant_predicate": quant_predicate}
        given["q_target_bpw"] = q_target_bpw
        given["q_mode"] = q_mode if q_mode != "affine" else None
        if names := [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(names)} without -q: nothing would be quantized")
        return None
    if q_mode not in MODES:
        raise ValueError(f"--q-mode is {q_mode!r}; it must be one of {', '.join(MODES)}")
    for flag, value, allowed in zip(("--q-group-size", "--q-bits"), (q_group_size, q_bits), MODES[q_mode], strict=True):
        if value is not None and value not in allowed:
            raise ValueError(f"{flag} {value} does not work with {q_mode}, which takes {_either(allowed)}")
    if (quant_predicate == SENSITIVE) != (q_target_bpw is not None):
        raise ValueError("--quant-predicate sensitive and --q-target-bpw go together")
    if quant_predicate is not None:
        if quant_predicate not in (*RECIPES, SENSITIVE):
            names = ", ".join((*RECIPES, SENSITIVE))
            raise ValueError(f"--quant-predicate is {quant_predicate!r}; it must be one of {names}")
        low_bits = 4 if quant_predicate == SENSITIVE else int(quant_predicate.split("_")[1])
        if q_mode != "affine" or q_bits not in (None, quant_predicate != SENSITIVE and low_bits):
            raise ValueError(
                f"--quant-predicate {quant_predicate} is affine and sets the bits itself; drop --q-mode and --q-bits"
            )
        q_bits = low_bits
    group_sizes, bits = MODES[q_mode]
    return {"group_size": q_group_size or group_sizes[0], "bits": q_bits or bits[0], "mode": q_mode}


def check_prompts(options: dict, new: dict) -> None:
    """ValueError if the options of calibration and verification do not combine with the others."""
    if options["quant_predicate"] == SENSITIVE and options["calibrate"] is None:
        raise ValueError("--quant-predicate sensitive needs --calibrate, whose prompts it measures with")
    if options["calibrate"] is not None:
        if not options["quantize"]:
            raise ValueError("--calibrate without -q: nothing would be quantized")
        if options["q_mode"] != "affine":
            raise ValueError(f"--calibrate works with affine only, not with --q-mode {options['q_mode']}")
        if any(value is not None for value in new.values()):
            raise ValueError("--calibrate needs a trained model: give --hf-path")
    if options["calibrate"] is None and options["verify_data"] is None:
        for name in ("image_folder", "verify_prompts"):
            if options[name] is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --calibrate or --verify-data")
    for name in ("verify_data", "verify_prompts"):
        if options[name] is not None and not options["verify"]:
            raise ValueError(f"--{name.replace('_', '-')} without --verify")


def check_sources(hf_path: str | Path | None, new: dict, verify: bool) -> None:
    """ValueError unless there is exactly one source: a checkpoint, or the parts of a `new` model."""
    if hf_path is not None and not any(value is not None for value in new.values()):
        return
    if hf_path is not None or not (new["vision"] and new["llm"]):
        raise ValueError("give --hf-path, or both --vision and --llm")
    if verify:
        raise ValueError("--verify compares with a source checkpoint, which a new model does not have")


def _either(values: tuple[int, ...]) -> str:
    *most, last = map(str, sorted(values))
    return f"{', '.join(most)} or {last}" if most else last

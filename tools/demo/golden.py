"""Store what the bundled models make of bundled images, for `doctor` to compare: `python -m tools.demo.golden`.

It is computed in float32 on a CPU, as `pytest -m reference` has held against torch and transformers.
"""

import mlx.core as mx

from llama3v_mlx.device import on_gpu
from llama3v_mlx.selftest import GOLDEN, observe


def main() -> None:
    if on_gpu():
        raise SystemExit("error: the golden file is computed on a CPU; set LLAMA3V_DEVICE=cpu")
    found, _ = observe(mx.float32)
    mx.save_safetensors(str(GOLDEN), {name: mx.array(array) for name, array in found.items()})
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

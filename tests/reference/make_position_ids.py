"""Write tests/position_ids.json, torch's position ids for strips of every length, on an x86 CPU.

Run `python -m tests.reference.make_position_ids`. An id is 70·i // N, or one less at some of the ties, where 70·i is
divisible by N; the file lists those.
"""

import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import torch

SIDE = 70
STORED = Path(__file__).parents[1] / "position_ids.json"


def torch_ids(num_patches: int, side: int = SIDE) -> np.ndarray:
    """Compute the ids of a strip with the code of Idefics2 in transformers 4.40, the released checkpoints' version."""
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    fractions = torch.arange(0, 1 - 1e-6, 1 / num_patches)
    return torch.bucketize(fractions, bounds, right=True).numpy()


def main() -> None:
    digest, lower = hashlib.sha256(), {}
    for n in range(1, SIDE**2 + 1):
        ids = torch_ids(n)
        difference = SIDE * np.arange(n) // n - ids
        assert np.isin(difference, (0, 1)).all() and not difference[SIDE * np.arange(n) % n != 0].any()
        digest.update(ids.astype(np.uint8).tobytes())
        if difference.any():
            lower[n] = np.flatnonzero(difference).tolist()
    made = {"torch": torch.__version__, "machine": platform.machine(), "sha256": digest.hexdigest(), "lower": lower}
    STORED.write_text(json.dumps(made, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

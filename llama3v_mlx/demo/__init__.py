"""Bundled demo: a tiny Llama3-V and a tiny SigLIP in the published Hugging Face layouts, and a few images.

`CHECKPOINT`, `SIGLIP` and `IMAGES` are their folders; `tools/demo/` has the scripts that made them.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
SIGLIP = Path(__file__).parent / "siglip"
IMAGES = Path(__file__).parent / "images"

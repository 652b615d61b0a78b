"""The bundled demo: a Llama3-V and a SigLIP in miniature, in the published Hugging Face layouts, and a few images.

`CHECKPOINT`, `SIGLIP` and `IMAGES` are their folders; `make` and `make_siglip` are how they were made.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
SIGLIP = Path(__file__).parent / "siglip"
IMAGES = Path(__file__).parent / "images"

"""The bundled demo: a Llama3-V in miniature, in the released Hugging Face layout, and a few images for it.

`CHECKPOINT` is the folder of the model and `IMAGES` that of the images. `make` is how both were made.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
IMAGES = Path(__file__).parent / "images"

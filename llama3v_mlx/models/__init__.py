"""The networks: SigLIP tower, projector, and the whole model around mlx-lm's Llama."""

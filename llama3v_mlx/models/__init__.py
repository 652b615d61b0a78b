"""Networks: SigLIP tower, projector, and the complete model around mlx-lm's Llama."""

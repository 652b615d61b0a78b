"""Image features: computed in batches, kept on disk, looked up."""

"""Training from stored features."""

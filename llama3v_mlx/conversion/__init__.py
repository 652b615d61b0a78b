"""Conversion of published checkpoints, and its verification."""

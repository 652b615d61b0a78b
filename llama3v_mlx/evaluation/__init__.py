"""Benchmarks and their report."""

"""Metrics of a model's outputs: pure functions of numbers, without a run."""

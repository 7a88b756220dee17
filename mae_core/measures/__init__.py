"""Measures of what a model says: pure functions of numbers, without a run."""

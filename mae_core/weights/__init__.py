"""Checkpoint files: reading, writing, matching to a model."""

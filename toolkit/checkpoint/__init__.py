"""Checkpoints: one format for every engine, committed atomically."""

"""Callbacks: what happens around the loop."""

"""A training toolkit for language models on PyTorch, Accelerate and DeepSpeed."""

__version__ = "0.1.0"

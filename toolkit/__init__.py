"""A training toolkit for language models on PyTorch, Accelerate and DeepSpeed."""

__version__ = "0.1.0"

_LAZY = {
    "GPTConfig": "toolkit.models.config",
    "GPTModel": "toolkit.models.transformer",
    "Transformer": "toolkit.models.transformer",
    "TransformerConfig": "toolkit.models.config",
}


def __getattr__(name: str) -> object:
    """The public API by name, each imported when it is first asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

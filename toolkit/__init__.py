"""A training toolkit for language models on PyTorch, Accelerate and DeepSpeed."""

__version__ = "0.1.0"

_LAZY = {
    "GPTConfig": "toolkit.models.config",
    "GPTModel": "toolkit.models.transformer",
    "Transformer": "toolkit.models.transformer",
    "TransformerConfig": "toolkit.models.config",
    "EvalLoader": "toolkit.data.evaluation",
    "TrainLoader": "toolkit.data.loader",
    "get_dataloaders": "toolkit.data.loader",
    "PreparedDataset": "toolkit.data.tokens.prepared",
    "check_vocabulary": "toolkit.data.tokens.prepared",
    "read_prepared": "toolkit.data.tokens.prepared",
    "ensure_prepared": "toolkit.data.prepare.build.prepare",
    "prepare_dataset": "toolkit.data.prepare.build.prepare",
    "Tokenizer": "toolkit.data.prepare.tokenizers.tokenizer",
    "load_tokenizer": "toolkit.data.prepare.tokenizers.tokenizer",
}


def __getattr__(name: str) -> object:
    """The public API by name, each imported when it is first asked for."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

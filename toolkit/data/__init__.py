"""Tokens in, batches out: prepare a corpus, open it, draw batches from it.

Importing this package imports neither torch nor numpy; each name is loaded when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.data.loader import EvalLoader, TrainLoader, get_dataloaders
    from toolkit.data.prepare import ensure_prepared, prepare_dataset
    from toolkit.data.prepared import PreparedDataset, check_vocabulary, read_prepared
    from toolkit.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "EvalLoader",
    "PreparedDataset",
    "Tokenizer",
    "TrainLoader",
    "check_vocabulary",
    "ensure_prepared",
    "get_dataloaders",
    "load_tokenizer",
    "prepare_dataset",
    "read_prepared",
]

_MODULES = {
    "loader": ("EvalLoader", "TrainLoader", "get_dataloaders"),
    "prepare": ("ensure_prepared", "prepare_dataset"),
    "prepared": ("PreparedDataset", "check_vocabulary", "read_prepared"),
    "tokenizer": ("Tokenizer", "load_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"toolkit.data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

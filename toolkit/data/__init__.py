"""From raw text to the exact batch. Five rooms, in the order that data passes them:

    text/       sources and their documents: files, data sets, filters, conversations
    tokenizers/ from text to ids: bytes, BPE trained on the spot, files of other libraries
    tokens/     token files: built, checked, stored, cached
    instances/  token files as rows of one length: cut, packed, padded
    order/      which rows make up batch n: shuffles and mixtures, computed, never stored

`loader.py` puts the last two together for one rank.

Importing this package imports neither torch nor numpy; each name is loaded when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.data.evaluation import EvalLoader
    from toolkit.data.loader import TrainLoader, get_dataloaders
    from toolkit.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
    from toolkit.data.tokens.prepare import ensure_prepared, prepare_dataset
    from toolkit.data.tokens.prepared import PreparedDataset, check_vocabulary, read_prepared

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
    "evaluation": ("EvalLoader",),
    "loader": ("TrainLoader", "get_dataloaders"),
    "tokens.prepare": ("ensure_prepared", "prepare_dataset"),
    "tokens.prepared": ("PreparedDataset", "check_vocabulary", "read_prepared"),
    "tokenizers.tokenizer": ("Tokenizer", "load_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"toolkit.data.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

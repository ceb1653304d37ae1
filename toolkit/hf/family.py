"""How one `transformers` architecture relates to our parts: a table, one file per family."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.models.config import TransformerConfig


class Rule(NamedTuple):
    """One tensor of the family's state dict, made of one or more of ours."""

    target: str
    """Name in `transformers`."""
    sources: tuple[str, ...]
    """Our parameter names, in the order that `combine` takes them."""
    combine: Callable[..., Tensor]
    """Our tensors to theirs."""


class Family(NamedTuple):
    """One architecture of `transformers`."""

    architecture: str
    """Class name, as in `architectures` of config.json."""
    fits: Callable[[TransformerConfig], bool]
    """Whether the class can compute this combination of parts."""
    config: Callable[[TransformerConfig], dict[str, Any]]
    """Architecture fields of config.json."""
    rules: Callable[[TransformerConfig], list[Rule]]
    """All tensors of the state dict, in the model's order; a tied head is left out."""


def same(tensor: Tensor) -> Tensor:
    """Stored alike."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """For GPT-2's Conv1D, which keeps `(in, out)`."""
    return tensor.t().contiguous()


def joined_transposed(*tensors: Tensor) -> Tensor:
    """Several projections of one input as one Conv1D: `(in, out_1 + out_2 + ...)`."""
    return torch.cat(tensors, dim=0).t().contiguous()


def joined(*tensors: Tensor) -> Tensor:
    """The biases of joined projections."""
    return torch.cat(tensors, dim=0)

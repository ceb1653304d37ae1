"""Gradient and weight norms per layer, on the device, without waiting for it."""

import re
from collections.abc import Mapping
from typing import TypeVar

import torch

_INDEXED = re.compile(r"^(?:.*?\.)?[A-Za-z_]\w*\.\d+(?=\.|$)")
N = TypeVar("N", torch.Tensor, float)

TOTAL = "total"
"""Name of the global norm among those of the layers."""


def layer_of(name: str) -> str:
    """The layer of a parameter: `blocks.3.attention.q.weight` -> `blocks.3`; a parameter outside
    numbered blocks belongs to its module: `embedding.weight` -> `embedding`."""
    match = _INDEXED.match(name)
    return match[0] if match else name.rpartition(".")[0] or name


def layer_norms(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum of squares of all elements per layer, as fp32 scalars on the device, in name order of
    first appearance.

    Squares, because sums add up: over ranks that hold different shards of a parameter (give this
    function the local shards, all on one device), and over layers. `to_norms` takes the roots.
    """
    if not named:
        return {}
    layers: dict[str, list[torch.Tensor]] = {}
    for name, tensor in named.items():
        layers.setdefault(layer_of(name), []).append(tensor.detach())
    ordered = [tensor for tensors in layers.values() for tensor in tensors]
    norms = torch._foreach_norm(ordered, 2, dtype=torch.float32)
    squares = torch.stack(norms).square().split([len(tensors) for tensors in layers.values()])
    return {layer: part.sum() for layer, part in zip(layers, squares, strict=True)}


def to_norms(squares: Mapping[str, N]) -> dict[str, N]:
    """Roots of sums of squares per layer, and `total`: the root of their sum, first.

    Works alike for device scalars (no sync) and for numbers that were reduced over ranks.
    """
    if not squares:
        return {}
    total = sum(squares.values())
    return {TOTAL: total**0.5} | {layer: square**0.5 for layer, square in squares.items()}

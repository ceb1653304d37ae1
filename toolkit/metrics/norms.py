"""Gradient and weight norms per layer, on the device, without waiting for it."""

import re
from collections.abc import Mapping
from typing import TypeVar

import torch

_INDEXED = re.compile(r"^(?:.*?\.)?[A-Za-z_]\w*\.\d+(?=\.|$)")
N = TypeVar("N", torch.Tensor, float)


def layer_of(name: str) -> str:
    """The layer of a parameter: `blocks.3.attention.q.weight` -> `blocks.3`; a parameter outside
    numbered blocks belongs to its module: `embedding.weight` -> `embedding`."""
    match = _INDEXED.match(name)
    return match[0] if match else name.rpartition(".")[0] or name


def layer_norms(
    named: Mapping[str, torch.Tensor], copies: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """Sum of squares of all elements per layer, as fp32 scalars on the device, in name order of
    first appearance.

    Squares, because sums add up: over ranks that hold different shards of a parameter (give this
    function the local shards, all on one device), and over layers. `to_norms` takes the roots.

    copies: of how many ranks that add up each has the same elements, where that is not one.
    """
    if not named:
        return {}
    layers: dict[str, list[str]] = {}
    for name in named:
        layers.setdefault(layer_of(name), []).append(name)
    ordered = [name for names in layers.values() for name in names]
    norms = torch._foreach_norm([named[n].detach() for n in ordered], 2, dtype=torch.float32)
    squares = torch.stack(norms).square()
    if copies:
        squares /= squares.new_tensor([copies.get(name, 1) for name in ordered])
    parts = squares.split([len(names) for names in layers.values()])
    return {layer: part.sum() for layer, part in zip(layers, parts, strict=True)}


def to_norms(squares: Mapping[str, N]) -> dict[str, N]:
    """Roots of sums of squares per layer, and `total`: the root of their sum, first.

    Works alike for device scalars (no sync) and for numbers that were reduced over ranks.
    """
    if not squares:
        return {}
    total = sum(squares.values())
    return {"total": total**0.5} | {layer: square**0.5 for layer, square in squares.items()}

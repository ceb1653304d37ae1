"""Several linear layers of one input as one matrix product."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def projected(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each of `layers` makes of `x`, `(..., d_model)`.

    In a compiled block it is one product of their weights side by side, which are joined while they
    are cast: one launch and one pass over `x` instead of several, and in backward one product and
    no sum. The parameters stay apart. Layers that are more than a plain linear one (adapters,
    quantised or float8 weights, hooks that gather shards) are called one by one.
    """
    plain: list[Any] = [layer for layer in layers if _is_plain(layer)]
    joins = torch.compiler.is_compiling() and joins_products(x.device.type)
    if not joins or len(plain) < len(layers):
        return tuple(layer(x) for layer in layers)
    weights: list[Tensor] = [layer.weight for layer in plain]
    biases = [layer.bias for layer in plain if layer.bias is not None]
    if biases and len(biases) < len(plain):
        return tuple(layer(x) for layer in layers)
    bias = torch.cat(biases) if biases else None
    out = linear(x, torch.cat(weights), bias)
    return out.split([weight.shape[0] for weight in weights], dim=-1)


@torch.compiler.assume_constant_result
def joins_products(device_type: str) -> bool:
    """Whether one product of several weights is faster there. On a CPU the separate products reach
    the same share of its speed, and joining costs 2% of a step."""
    return device_type != "cpu"


def _is_plain(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and type(layer._parameters) is dict  # ZeRO-3 gathers on access
        and type(layer.weight) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
    )

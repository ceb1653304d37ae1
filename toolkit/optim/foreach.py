"""What optimizers of our own share: the engine's decision about a step, taken on the device."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def together(parameters: list[T], device: torch.device) -> list[list[T]]:
    """Parameters to update in one go: on a CPU each by itself, so that it stays in the cache from
    one operation to the next; elsewhere all, in few kernels."""
    return [[one] for one in parameters] if device.type == "cpu" else [parameters]


def prepare_gradients(optimizer: Any, gradients: Sequence[Tensor]) -> Tensor:
    """Divide `gradients` by `optimizer.grad_scale`, in place; 1.0, or 0.0 where the step is not to
    be taken (`optimizer.found_inf`, then all gradients are zero), 0-d.

    An update that multiplies its rate and what it forgets by this changes nothing at 0.0.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    scale = getattr(optimizer, "grad_scale", None)
    one = torch.ones((), dtype=gradients[0].dtype, device=gradients[0].device)
    if scale is not None:
        torch._foreach_div_(list(gradients), scale)
    if found_inf is None:
        return one
    skipped = found_inf.to(one.device) != 0
    for gradient in gradients:
        gradient.masked_fill_(skipped, 0.0)  # not by a product: 0 * NaN is NaN
    return one.masked_fill_(skipped, 0.0)

"""Liger's fused linear cross entropy (Hsu et al. 2024), where it fits and is installed."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from toolkit.models.kernels import loss_kernel
from toolkit.models.loss import IGNORE_INDEX, LossSums


def liger_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    z_loss_multiplier: float = 0.0,
    soft_cap: float | None = None,
    is_compiled: bool = False,
) -> LossSums | None:
    """The loss sums by Liger's kernel, or None where our own is to be used; see `loss_kernel`."""
    trains = torch.is_grad_enabled() and weight.requires_grad
    kernel = loss_kernel(
        hidden.device.type,
        dtype=hidden.dtype,
        vocab_size=vocab_size,
        has_z_loss=z_loss_multiplier != 0.0,
        has_soft_cap=soft_cap is not None,
        is_compiled=is_compiled,
        trains_head_alone=trains and not hidden.requires_grad,
    )
    if kernel != "liger":
        return None
    function = _liger_function()
    if function is None:
        return None
    loss = function(
        hidden,
        weight[:vocab_size],
        labels,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        accum_dtype=torch.float32,
    )
    return LossSums(loss, loss.detach(), torch.zeros_like(loss.detach()))


def is_liger_installed() -> bool:
    """Whether its function can be imported."""
    return _liger_function() is not None


@cache
def _liger_function() -> Any:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    return liger_fused_linear_cross_entropy

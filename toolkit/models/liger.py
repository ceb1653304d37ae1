"""Liger's fused linear cross entropy (Hsu et al. 2024), where it fits and is installed."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from toolkit.models.loss import IGNORE_INDEX, LossSums


def liger_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab_size: int, z_loss_multiplier: float
) -> LossSums | None:
    """The loss sums by Liger's kernel, or None where our own is to be used.

    Ours is used on other devices than CUDA; with z-loss, because Liger returns its sum in the
    compute type; and for a vocabulary that is no multiple of 8, because Liger knows no padding ids
    and the matrix product over the exact vocabulary is slow when its rows are not aligned.
    """
    fits = hidden.is_cuda and hidden.dtype != torch.float64 and vocab_size % 8 == 0
    if not fits or z_loss_multiplier != 0.0:
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


@cache
def _liger_function() -> Any:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        return None
    return liger_fused_linear_cross_entropy

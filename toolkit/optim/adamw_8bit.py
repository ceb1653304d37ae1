"""torchao's AdamW with moments of 8 bits (Dettmers et al. 2022)."""

import logging
import warnings
from typing import Any

import torch

log = logging.getLogger(__name__)


def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """`torchao.optim.AdamW8bit`, without torchao's notes on kernels of which this is none."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement")
    from torchao.optim import AdamW8bit

    log.info("adamw_8bit: the first step compiles its kernels, which may take a minute or two")

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, **settings)
    return optimizer

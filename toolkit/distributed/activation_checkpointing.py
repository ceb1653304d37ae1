"""Activation checkpointing applied from outside, without changing any parameter's name."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from toolkit.distributed.config import ActivationCheckpointingConfig


def apply_activation_checkpointing(
    blocks: "torch.nn.ModuleList", config: ActivationCheckpointingConfig
) -> None:
    """Recompute the chosen blocks in backward.

    The block's `forward` is replaced instead of wrapping the module, so names in checkpoints stay
    the same with and without. RNG state is not saved: the models draw no random numbers.
    """
    if config.mode == "budget":
        import torch._functorch.config as partitioner

        # Read by torch.compile when it splits each block's graph into forward and backward.
        partitioner.activation_memory_budget = config.budget
        return
    interval = 1 if config.mode == "full" else config.block_interval
    for index, block in enumerate(blocks):
        if index % interval == 0:
            block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    # A function, not a partial: torch.compile finds no frame to compile in one, and runs eagerly.
    def checkpointed(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)

    return checkpointed

"""torch.compile for a Transformer, block by block."""

from collections.abc import Callable
from typing import Any

import torch

from toolkit.models.transformer import Transformer


def compile_model(
    model: Transformer,
    *,
    fullgraph: bool = False,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Compile every block and the piece of the loss, in place; names and parameters stay.

    Blocks have one structure, so the first one's code serves them all: compile time does not grow
    with depth. Call it after activation checkpointing and before sharding.

    Args:
        fullgraph: raise where a block does not compile as one graph. Leave it off for engines whose
            hooks inside the block break graphs (ZeRO-3).
        backend: as for `torch.compile`.
    """
    options: dict[str, Any] = {"dynamic": False, "backend": backend}
    for block in model.blocks:
        block.compile(fullgraph=fullgraph, **options)
    model.head.loss_kernel = torch.compile(model.head.loss_kernel, fullgraph=True, **options)

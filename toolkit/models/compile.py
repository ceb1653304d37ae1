"""torch.compile for a Transformer, block by block."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from toolkit.models.transformer import Transformer

RECOMPILE_LIMIT = 64
"""Compilations of one piece of code before torch falls back to running it uncompiled: a curriculum
of a dozen lengths, each with and without gradients and documents, and in evaluation."""


def compile_model(
    model: "Transformer",
    *,
    fullgraph: bool = False,
    backend: str | Callable[..., Any] = "inductor",
) -> None:
    """Compile every block and the piece of the loss, in place; names and parameters stay.

    Each shape of batch is compiled when it first comes (kernels for fixed shapes are faster).

    Blocks have one structure, so the first one's code serves them all: compile time does not grow
    with depth. Call it after activation checkpointing and before sharding.

    Args:
        fullgraph: raise where a block does not compile as one graph. Leave it off for engines whose
            hooks inside the block break graphs (ZeRO-3).
        backend: as for `torch.compile`.
    """
    allow_recompilations()
    options: dict[str, Any] = {"dynamic": False, "backend": backend}
    for block in model.blocks:
        block.compile(fullgraph=fullgraph, **options)
    model.head.loss_kernel = torch.compile(model.head.loss_kernel, fullgraph=True, **options)


def allow_recompilations() -> None:
    """Let every length of a curriculum have its own compilation; torch's own limit is 8."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)

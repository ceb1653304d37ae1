"""torch.compile for a Transformer, block by block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from toolkit.models.architecture import CompileMode

RECOMPILE_LIMIT = 64
"""Compilations of one piece of code before torch falls back to running it uncompiled: a curriculum
of a dozen lengths, each with and without gradients and documents, and in evaluation."""


def compile_model(
    model: nn.Module,
    *,
    fullgraph: bool = False,
    backend: str | Callable[..., Any] = "inductor",
    inside_checkpoints: bool = False,
    mode: CompileMode = "default",
) -> None:
    """Compile every block and the loss kernel of a Transformer, in place; parameters keep names.

    Each shape of batch is compiled when it first comes (kernels for fixed shapes are faster), and
    the first block's code serves all: compile time does not grow with depth. Call it after
    activation checkpointing and before sharding. `fullgraph` raises where a block does not compile
    as one graph: not for engines whose hooks break graphs (ZeRO-3).

    `inside_checkpoints`: call it before activation checkpointing, which then recomputes compiled
    code. Otherwise a block that does not compile as one graph would run as it is, since torch gives
    up on a checkpoint with a break inside.

    `mode`: of torch.compile, for the blocks. The loss is never recorded as a CUDA graph, which
    would copy each chunk of logits into a memory of its own.
    """
    allow_recompilations()
    options: dict[str, Any] = {"dynamic": False, "backend": backend}
    own: dict[str, Any] = {} if mode == "default" else {"mode": mode}
    parts: Any = model
    for block in (*parts.blocks, *(layer.block for layer in parts.mtp)):
        if inside_checkpoints:
            block.forward = torch.compile(block.forward, fullgraph=fullgraph, **options, **own)
        else:
            block.compile(fullgraph=fullgraph, **options, **own)
    if parts.head is not None:
        loss = parts.head.loss
        if mode.startswith("max-autotune"):
            options["mode"] = "max-autotune-no-cudagraphs"
        loss.kernel = torch.compile(loss.kernel, fullgraph=True, **options)


def allow_recompilations() -> None:
    """Let every length of a curriculum have its own compilation; torch's own limit is 8."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)

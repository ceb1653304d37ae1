"""What blocks keep from forward to backward: computed again, or kept on the host instead.

A block's `forward` is replaced instead of wrapping the module, so names in checkpoints stay the
same with and without. RNG state is not saved: the models draw no random numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch._functorch.config as partitioner
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.models.transformer import Blocks

_OPERATORS = {
    "attention": (
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_fused_attention_overrideable",
        "higher_order.flex_attention",
        "higher_order.inductor_compiled_code",
    ),
    "matmuls": (
        "aten.mm",
        "aten.addmm",
        "aten._scaled_mm",
        "aten._grouped_mm",
        "toolkit.grouped_linear",
    ),
}
"""Operators whose results are kept, those of this torch: SDPA's, flex attention and what it was
compiled to; the products of linear layers and experts."""


def apply_activation_checkpointing(blocks: Blocks, config: ActivationCheckpointingConfig) -> None:
    """Recompute the chosen blocks in backward, in place."""
    if config.mode == "budget":
        # Read by torch.compile when it splits each block's graph into forward and backward.
        partitioner.activation_memory_budget = config.budget
        return
    interval = config.block_interval if config.mode == "selected_blocks" else 1
    options: dict[str, Any] = {}
    if config.mode == "selected_ops":
        options["context_fn"] = _saving(config.saved_ops)
    for block in (
        b for layer, b in zip(blocks.layers, blocks, strict=True) if layer % interval == 0
    ):
        block.forward = _checkpointed(block.forward, options)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # A function, not a partial: torch.compile finds no frame to compile in one, and runs eagerly.
    def checkpointed(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return checkpointed


def _saving(kinds: Sequence[str]) -> Callable[[], Any]:
    """The contexts of a block's forward and of its recomputation, which keep results of `kinds`."""
    attention = _operators("attention") if "attention" in kinds else set()
    matmuls = _operators("matmuls") if len({*kinds} - {"attention"}) else set()
    alternates = "every_second_matmul" in kinds

    def contexts() -> Any:
        seen = {False: 0, True: 0}  # in forward, in recomputation

        def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            saves = operator in attention
            if operator in matmuls:
                seen[context.is_recompute] += 1
                saves = not alternates or seen[context.is_recompute] % 2 == 1
            return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return contexts


def _operators(kind: str) -> set[Any]:
    found = set()
    for name in _OPERATORS[kind]:
        space, _, operator = name.partition(".")
        packet = getattr(getattr(torch.ops, space), operator, None)
        if packet is not None:
            found.add(getattr(packet, "default", packet))
    return found


def apply_offload(blocks: Blocks) -> None:
    """Keep what each block saves for backward in host memory until then, in place."""
    for block in blocks:
        block.forward = _offloaded(block.forward, list(block.parameters()))


def _offloaded(forward: Callable[..., Any], weights: Sequence[nn.Parameter]) -> Callable[..., Any]:
    # A copy of a weight in the compute type is no parameter, but has the shape of one.
    shapes = {shape for w in weights for shape in (tuple(w.shape), tuple(w.shape)[::-1])}

    def pack(tensor: torch.Tensor) -> Any:
        memory = tensor.untyped_storage().data_ptr()
        is_weight = tuple(tensor.shape) in shapes or any(
            weight.untyped_storage().data_ptr() == memory for weight in weights
        )
        # Masks, angles and the like are shared by all blocks, and integers are few.
        if is_weight or not tensor.is_floating_point() or tensor.numel() < LEAST:
            return tensor
        return to_host(tensor)

    def unpack(held: Any) -> torch.Tensor:
        return held if isinstance(held, torch.Tensor) else from_host(held)

    def offloaded(*args: Any) -> Any:
        with saved_tensors_hooks(pack, unpack):
            return forward(*args)

    return offloaded


LEAST = 256
"""Numbers that are worth a copy; and the statistics of a norm are not kept by less."""


class OnHost(NamedTuple):
    """A tensor that waits in host memory."""

    memory: torch.Tensor
    device: torch.device


def to_host(tensor: torch.Tensor) -> OnHost:
    """A copy in host memory, pinned where a GPU copies: in the order of its stream, so that neither
    side waits for the other."""
    on_gpu = tensor.device.type == "cuda"
    memory = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=on_gpu)
    memory.copy_(tensor, non_blocking=on_gpu)
    return OnHost(memory, tensor.device)


def from_host(held: OnHost) -> torch.Tensor:
    """The tensor, on its device again."""
    return held.memory.to(held.device, non_blocking=True)

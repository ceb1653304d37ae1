"""What blocks keep from forward to backward: computed again, or kept on the host instead.

A block's `forward` is replaced instead of wrapping the module, so names in checkpoints stay the
same with and without. RNG state is not saved: the models draw no random numbers.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch._functorch.config as partitioner
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
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
        "toolkit.delta_scan",
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
compiled to, and the scan of linear attention; the products of linear layers and experts."""


def set_memory_budget(config: ActivationCheckpointingConfig | None) -> None:
    """Tell torch.compile how much of a block's graph to keep for backward. The process has one
    budget: without one of its own, a model has none, whatever the model before had."""
    partitioner.activation_memory_budget = 1.0
    if config is not None and config.mode == "budget":
        partitioner.activation_memory_budget = config.budget


def apply_activation_checkpointing(blocks: Blocks, config: ActivationCheckpointingConfig) -> None:
    """Recompute the chosen blocks in backward, in place."""
    if config.mode == "budget":
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


LEAST = 256
"""Numbers that are worth a copy; and the statistics of a norm are not kept by less."""


class OnHost:
    """What a storage held, in host memory, for all tensors that lie in it."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.uses = 0
        """Tensors that wait for it."""
        # While this is there no other storage is known by the same number.
        self._source = StorageWeakRef(storage)
        self._device = storage.device
        self._memory = to_host(_bytes_of(storage))
        self._back: torch.Tensor | None = None

    def storage(self) -> torch.UntypedStorage:
        """It, on its device again: one copy for all that use it."""
        back = from_host(self._memory, self._device) if self._back is None else self._back
        self.uses -= 1
        self._back = back if self.uses > 0 else None
        return back.untyped_storage()


_Copies = WeakValueDictionary[tuple[int, int], OnHost]
"""By storage and version, as long as a graph holds them."""


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def to_host(memory: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where a GPU copies: in the order of its stream, so that neither
    side waits for the other."""
    on_gpu = memory.device.type == "cuda"
    copy = torch.empty(memory.size(), dtype=memory.dtype, pin_memory=on_gpu)
    return copy.copy_(memory, non_blocking=on_gpu)


def from_host(memory: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`memory` on `device`."""
    return memory.to(device, non_blocking=True)


def apply_offload(blocks: Blocks) -> None:
    """Keep what each block saves for backward in host memory until then, in place."""
    copies: _Copies = WeakValueDictionary()
    for block in blocks:
        block.forward = _offloaded(block.forward, block, copies)


def _offloaded(forward: Callable[..., Any], block: nn.Module, copies: _Copies) -> Any:
    def pack(tensor: torch.Tensor) -> Any:
        if not tensor.is_floating_point() or tensor.numel() < LEAST or _is_weight(tensor, block):
            return tensor
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor._version
        if (copy := copies.get(key)) is None:
            copy = copies[key] = OnHost(storage)
        copy.uses += 1
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        return copy, tensor.dtype, place

    def unpack(held: Any) -> torch.Tensor:
        if isinstance(held, torch.Tensor):
            return held
        copy, dtype, place = held
        storage = copy.storage()
        return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *place)

    def offloaded(*args: Any) -> Any:
        with saved_tensors_hooks(pack, unpack):
            return forward(*args)

    return offloaded


def _is_weight(tensor: torch.Tensor, block: nn.Module) -> bool:
    """Whether `tensor` lies in a weight of `block`, or is the copy of one in the compute type, or a
    weight that was gathered in 8 bits.

    Weights are those of this moment: FSDP2 and ZeRO-3 put others in the place of the model's."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return True
    node = tensor.grad_fn
    while node is not None and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    source = getattr(node, "variable", tensor)  # of what a parameter's gradient is collected in
    memory = source.untyped_storage()._cdata
    return any(
        own.untyped_storage()._cdata == memory
        for own in itertools.chain(block.parameters(), block.buffers())
    )

"""FSDP2 over a model: what is gathered at once, and for how long."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from toolkit.distributed.devices import compute_dtype
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.sizes import keeps_gathered, sharded_dimension

_KEPT = "kept_gathered"
"""Of a root, the units that are not freed after their forward; itself among them."""


def shard_fully(model: nn.Module, environment: TrainingEnvironment) -> None:
    """Shard `model` in place over the ranks that share the weights; experts that lie on several
    ranks, over those that share the same ones."""
    layout, settings = environment.layout, environment.layout.dp_config
    blocks: Any = model.blocks
    further: Any = list(model.mtp)  # type: ignore[arg-type]
    mesh = expert_mesh = environment.fsdp_mesh
    experts: list[Any] = []
    if layout.ep > 1:
        axes = ("dp_replicate", "efsdp") if layout.dp_replicate > 1 else ("efsdp",)
        expert_mesh = environment.expert_mesh[axes]
        inner = [*blocks, *(layer.block for layer in further)]
        experts = [block.feed_forward.experts for block in inner if block.has_experts]
    for module in model.modules():
        ranks = (expert_mesh if module in experts else mesh).size(-1)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if sharded_dimension(parameter.shape, ranks) is None:
                flat = nn.Parameter(parameter.detach().flatten(0, 1), parameter.requires_grad)
                setattr(module, key, flat)
    dtype = compute_dtype(layout.precision)
    shared: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=getattr(torch, settings.reduce_dtype),
            output_dtype=None,
            cast_forward_inputs=False,
        ),
    }
    if settings.cpu_offload:
        shared["offload_policy"] = CPUOffloadPolicy(pin_memory=environment.device.type == "cuda")
    keeps_all = keeps_gathered(
        settings,
        gathered_bytes(model, dtype),
        _least_memory(environment),
        has_pipeline=layout.pp > 1,
    )

    def shard(module: Any, over: DeviceMesh, *, reshard: bool) -> Any:
        def place(parameter: nn.Parameter) -> Shard:
            return Shard(sharded_dimension(parameter.shape, over.size(-1)) or 0)

        return fully_shard(
            module,
            mesh=over,
            reshard_after_forward=reshard,
            shard_placement_fn=place,
            **shared,
        )

    units: list[Any] = []
    kept: list[Any] = []
    asked_ahead: list[Any] = []  # not what evaluations leave out
    whole = [*blocks, *further]
    for number, unit in enumerate(whole, start=1):
        parts: list[Any] = [unit]
        block = unit if number <= len(blocks) else unit.block
        if settings.wrapping_strategy == "fine_grained":
            parts += [block.attention, block.feed_forward]
        if experts and block.has_experts:
            parts.append(block.feed_forward.experts)
        # Backward begins with the last one, which would be gathered again at once.
        is_kept = keeps_all or number == len(whole)
        for part in reversed(parts):  # inner ones first
            over = expert_mesh if part in experts else mesh
            shard(part, over, reshard=not is_kept)
        units += parts
        asked_ahead += parts if number <= len(blocks) else []
        kept += parts if is_kept else []
    head: Any = model.head
    if settings.wrapping_strategy != "blocks" and head is not None and head.weight is not None:
        units.append(shard(head, mesh, reshard=False))
        asked_ahead.append(head)
        kept.append(head)
    # The root holds what is left, which the forward needs first and last: never resharded in
    # between.
    root = shard(model, mesh, reshard=False)
    vars(root)[_KEPT] = (*kept, root)
    # What torch has as defaults, but may change: gradients are reduced every microbatch.
    root.set_requires_gradient_sync(True)
    root.set_requires_all_reduce(True)
    root.set_reshard_after_backward(True)
    for unit in (*units, root):
        # As a mean, which the collective takes where it can; or as a sum, where meshes of different
        # sizes would take different means. (A factor other than 1 is no way to the same: torch 2.13
        # divides by it twice in a group of one rank, and gloo has no such operation in fp32.)
        unit.set_force_sum_reduction_for_comms(layout.sums_gradients)
        if layout.sums_gradients:
            unit.set_gradient_divide_factor(1.0)
    # Where the host waits for the numbers of tokens of experts it cannot ask for the next weights
    # before they are needed: the next block and its experts are asked for beforehand.
    ahead = settings.prefetch_factor or (2 if layout.ep > 1 else 0)
    for index, unit in enumerate(asked_ahead if ahead else ()):
        unit.set_modules_to_forward_prefetch(asked_ahead[index + 1 : index + 1 + ahead])
        unit.set_modules_to_backward_prefetch(asked_ahead[max(0, index - ahead) : index][::-1])


def free_after_backward(model: nn.Module, *, frees: bool) -> None:
    """Of the units that stay gathered from forward to backward, whether the next backward frees
    them. Until the next forward of the same step they take no memory that the peak of this one,
    between forward and backward, did not take."""
    for unit in vars(model).get(_KEPT, ()):
        unit.set_reshard_after_backward(frees, recurse=False)


def describe_gathers(model: nn.Module) -> str:
    """How often weights are gathered, for the record of a run."""
    kept, blocks = vars(model).get(_KEPT, ()), list(getattr(model, "blocks"))  # noqa: B009
    if all(block in kept for block in blocks):
        return "gathers, one a step"
    return "gathers, two of each block but the last in each microbatch"


def gathered_bytes(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Of all weights in the compute type."""
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())


def _least_memory(environment: TrainingEnvironment) -> int | None:
    """Of all ranks' devices: what ranks gather together, all of them must decide alike."""
    found = environment.gather(device_memory(environment.device))
    return None if None in found else min(found)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None of other devices."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)

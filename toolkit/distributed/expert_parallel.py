"""Expert parallelism: each rank of a group holds some of the experts of every layer.

A row is a token on its way to one of its experts. `dispatch` has sorted the rows of this rank by
expert, so that those for one rank lie together. Between its sort and its sum:

1. Ranks tell one another how many rows they have for each expert.
2. Rows go to the ranks of their experts.
3. They arrive by source and expert, and are sorted by expert and source.
4. This rank's experts compute them, in the grouped products of one process.
5. The results go back the way the rows came.

Nothing is dropped, however unevenly tokens choose; a rank that gets no rows computes one of zeros.
All orders are fixed, so two runs are bit-equal. Router and shared expert stay as they are: they see
this rank's own tokens.

The sizes of step 2 are arguments of a collective, which the host must know: it waits for the device
once for each layer's forward, and once more where activations are recomputed.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from toolkit.distributed.collectives import all_to_all_rows
from toolkit.distributed.shards import ShardSpec
from toolkit.models.feed_forward import Experts, MoE, dispatch
from toolkit.models.init import canonical_name
from toolkit.models.router import Choice


def apply_expert_parallel(
    model: nn.Module, group: dist.ProcessGroup, shards: dict[str, ShardSpec]
) -> None:
    """Leave the ranks of `group` an equal range each of the experts of every MoE of `model`, in
    place, and let tokens find them. `shards` learns the ranges. The number of experts must be
    divisible by the number of ranks."""
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            _keep_own(module.experts, f"{canonical_name(name)}.experts", group, shards)
            module.dispatch = _dispatch_over(group)


def _keep_own(
    experts: Experts, name: str, group: dist.ProcessGroup, shards: dict[str, ShardSpec]
) -> None:
    number, left_over = divmod(experts.num_experts, group.size())
    assert not left_over, "sizes are checked before process groups exist"
    first = group.rank() * number
    for key, weight in list(experts.named_parameters(recurse=False)):
        own = weight.detach().narrow(0, first, number).clone()
        setattr(experts, key, nn.Parameter(own, requires_grad=weight.requires_grad))
        whole = f"{name}.{key}"
        shards[whole] = shards[whole]._replace(dim=0, start=first, length=number)
    experts.num_experts = number


def _dispatch_over(group: dist.ProcessGroup) -> Callable[..., Tensor]:
    def dispatch_over_ranks(
        tokens: Tensor, choice: Choice, experts: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        return dispatch(tokens, choice, lambda rows, ends: _computed(rows, ends, experts, group))

    return dispatch_over_ranks


# The numbers of rows differ from step to step: torch.compile would compile for each of them anew.
@torch.compiler.disable(reason="the number of rows is known to the host alone")
def _computed(
    rows: Tensor,
    ends: Tensor,
    experts: Callable[[Tensor, Tensor], Tensor],
    group: dist.ProcessGroup,
) -> Tensor:
    """`(rows, d_model)`, sorted by expert, through the experts of all ranks, to the same shape and
    order; `ends`, `(experts of all ranks,)` int32, says where the rows of each expert stop."""
    ours = ends.diff(prepend=ends.new_zeros(1)).view(group.size(), -1)  # rank, its expert
    theirs = torch.empty_like(ours)  # rank, expert of this one
    dist.all_to_all_single(theirs, ours, group=group)
    sent, received = numbers_of_rows(ours, theirs)
    arrived = all_to_all_rows(rows, group, sent=sent, received=received)
    expert = torch.arange(ours.shape[1], device=rows.device).repeat(group.size())
    expert = expert.repeat_interleave(theirs.flatten(), output_size=arrived.shape[0])
    order = expert.argsort(stable=True)
    place = order.argsort()
    own, own_ends = _Reordered.apply(arrived, order, place), theirs.sum(0).cumsum(0).int()
    if len(own):
        results = experts(own, own_ends)
    else:
        # Weights need a gradient all the same, which other ranks wait for, and grouped kernels of
        # GPUs take no matrix without rows: a row of zeros leaves zeros.
        results = experts(pad(own, (0, 0, 0, 1)), torch.ones_like(own_ends))[:0]
    results = _Reordered.apply(results, place, order)
    return all_to_all_rows(results, group, sent=received, received=sent)


def numbers_of_rows(ours: Tensor, theirs: Tensor) -> list[list[int]]:
    """How many rows this rank sends to each rank, and gets from it, of `(ranks, experts)`. The host
    waits for the device."""
    return torch.stack([ours.sum(1), theirs.sum(1)]).tolist()


class _Reordered(torch.autograd.Function):
    """`rows[order]`, where `place` is the inverse of `order`. The gradient is a selection too; that
    of indexing adds atomically."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None

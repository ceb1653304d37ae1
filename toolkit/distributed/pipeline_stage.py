"""A stage of a pipeline as torch's schedules see it: activations in, activations or loss out."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage

from toolkit.models.loss import LossSums
from toolkit.models.router import RouterSums, router_loss
from toolkit.models.transformer import Transformer


@dataclasses.dataclass
class StepTerms:
    """What the stages of a rank need to know of a step, and what they leave behind."""

    factor: float | Tensor = 1.0
    """Multiplies the loss."""
    z_loss_multiplier: float = 0.0
    losses: list[LossSums] = dataclasses.field(default_factory=list)
    """Of each microbatch, detached, where the last stage is."""
    routers: dict[int, list[RouterSums]] = dataclasses.field(default_factory=dict)
    """Of each microbatch by stage, detached."""


class Stage(PipelineStage):
    """Token ids `(rows, seq)` or the residual stream `(rows, seq, d_model)` in; that stream,
    or the loss times the factor, out. The router losses of a stage enter its own backward.

    torch keeps what it receives of all microbatches until the next step. Here there is room only
    from the request until it is used.
    """

    def __init__(
        self,
        module: Transformer,
        number: int,
        terms: StepTerms,
        *,
        has_whole_backward: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(module, number, **options)
        self._has_whole_backward = has_whole_backward
        self._terms = terms
        self._moe: Any = module.config.moe

    def forward_maybe_with_nosync(self, *args: Tensor, **kwargs: Any) -> Tensor:
        terms = self._terms
        result = self.submod(*args, z_loss_multiplier=terms.z_loss_multiplier, **kwargs)
        if isinstance(result, LossSums):
            sums, routers = result, result.router
            terms.losses.append(sums._replace(loss=sums.loss.detach(), router=None))
            output = _scaled(sums.loss, terms.factor)
        else:
            output, routers = result
            if routers is not None:
                loss = _scaled(router_loss(routers, self._moe), terms.factor)
                output = _WithLoss.apply(output, loss)
                routers = routers.detached()
        if routers is not None:
            terms.routers.setdefault(self.stage_index, []).append(routers)
        return output

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_memory():
            return super()._prepare_backward_infra(*args, **kwargs)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        self._make_room(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        self._make_room(self.grad_recv_info.get(bwd_chunk_id, ()))
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _drop_memory(self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Any = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        is_whole = full_backward or self._has_whole_backward
        super().backward_one_chunk(bwd_chunk_id, loss, is_whole, last_backward)
        _drop_memory(self.grad_recv_info.get(bwd_chunk_id, ()))

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if self._has_whole_backward:
            return
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        # The second half of a backward calls no hooks of FSDP2, by which gradients of a lower
        # precision add up in that of their reduction.
        for state in fully_shard.state(self.submod)._state_ctx.all_states:  # type: ignore[attr-defined]
            for group in state._fsdp_param_groups:
                group.post_backward()

    @contextlib.contextmanager
    def _without_memory(self) -> Iterator[None]:
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    def _make_room(self, infos: Iterable[Any]) -> None:
        for info in infos:
            if info.buffer is not None:
                info.buffer = torch.empty_like(info.buffer, device=self.device)


def _drop_memory(infos: Iterable[Any]) -> None:
    for info in infos:
        if info.buffer is not None:
            info.buffer = torch.empty_like(info.buffer, device="meta")


def _scaled(loss: Tensor, factor: float | Tensor) -> Tensor:
    # The factor itself for a finite loss; 0 * inf and 0 * NaN are NaN, as is every gradient then.
    return loss * (loss.detach() * 0.0 + factor)


class _WithLoss(torch.autograd.Function):
    """`x`, whose backward is that of `loss` too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.clone()  # a view cannot leave a stage that has its backward in two halves

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)

"""A stage of a pipeline as torch's schedules see it: activations in, activations or loss out."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
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
    """`(rows, seq)` token ids or the residual stream
    `(rows, seq, d_model)` in; the residual stream, or the loss times the factor, out. The router
    losses of a stage enter its own backward.
    """

    def __init__(self, module: Transformer, number: int, terms: StepTerms, **options: Any) -> None:
        super().__init__(module, number, **options)
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

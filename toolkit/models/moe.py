"""Mixture of experts: a feed-forward of which each token uses a few parts.

What happens to one token:
1. The router gives it a probability for every expert; the `top_k` likeliest are its own.
2. All pairs of token and expert are sorted by expert, so that each expert's tokens lie together.
3. Every expert computes its tokens, however many they are, in grouped matrix products.
4. The pairs are brought back into the order of tokens, and each token's `top_k` results are added
   up with the router's weights. A shared expert, where there is one, is added as it is.

Nothing is dropped, nothing padded, and where the device has a grouped kernel the host never waits
to learn who chose what.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from toolkit.models.config import TransformerConfig
from toolkit.models.feed_forward import ACTIVATIONS, GatedFeedForward
from toolkit.models.grouped import ends_for, grouped_linear
from toolkit.models.moe_config import MoEConfig
from toolkit.models.router_loss import RouterSums, router_sums


class Choice(NamedTuple):
    """What the router decided, for `tokens` tokens."""

    logits: Tensor
    """`(tokens, num_experts)` in fp32, or wider."""
    experts: Tensor
    """`(tokens, top_k)` int64: the likeliest experts, best first."""
    weights: Tensor
    """`(tokens, top_k)`: what their results are multiplied by, in the compute type."""


class Router(nn.Module):
    """Chooses the `top_k` experts of each token by a softmax over all of them, in fp32."""

    def __init__(self, d_model: int, moe: MoEConfig) -> None:
        super().__init__()
        self.top_k = moe.top_k
        self.normalize = moe.normalize_top_k
        self.weight = nn.Parameter(torch.empty(moe.num_experts, d_model))

    def forward(self, x: Tensor) -> Choice:
        """`(tokens, d_model)` to the experts of each token."""
        logits = nn.functional.linear(x, self.weight)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        weights, experts = wide.softmax(-1).topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Choice(wide, experts, weights.to(x.dtype))


class Experts(nn.Module):
    """Gated feed-forwards side by side, each matrix kept as one `(num_experts, out, in)` tensor."""

    def __init__(self, config: TransformerConfig, moe: MoEConfig) -> None:
        super().__init__()
        inputs = (moe.num_experts, moe.intermediate_size, config.d_model)
        self.gate = nn.Parameter(torch.empty(inputs))
        self.up = nn.Parameter(torch.empty(inputs))
        self.down = nn.Parameter(torch.empty(inputs[0], inputs[2], inputs[1]))
        self.num_experts = moe.num_experts
        self.activation = ACTIVATIONS[config.feed_forward]

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """`(rows, d_model)`, sorted by expert, to the same shape.

        Args:
            ends: `(num_experts,)` int32: where the rows of each expert stop.
        """
        gate, up, down = (self._stacked(weight) for weight in (self.gate, self.up, self.down))
        ends = ends_for(x, gate, ends)
        gated = self.activation(grouped_linear(x, gate, ends))
        return grouped_linear(gated * grouped_linear(x, up, ends), down, ends)

    def _stacked(self, weight: Tensor) -> Tensor:
        """`(num_experts, out, in)`; who stores the weights may keep them as one long matrix."""
        return weight if weight.dim() == 3 else weight.unflatten(0, (self.num_experts, -1))


class MoE(nn.Module):
    """Router, experts, perhaps a shared expert."""

    def __init__(self, config: TransformerConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.top_k = moe.top_k
        self.num_experts = moe.num_experts
        self.router = Router(config.d_model, moe)
        self.experts = Experts(config, moe)
        self.shared: nn.Module | None = None
        if moe.shared_expert_intermediate_size is not None:
            self.shared = GatedFeedForward(
                config.d_model,
                moe.shared_expert_intermediate_size,
                activation=ACTIVATIONS[config.feed_forward],
                bias=False,
            )

    def forward(
        self, x: Tensor, is_target: Tensor | None = None
    ) -> tuple[Tensor, RouterSums | None]:
        """`(batch, seq, d_model)` to the same shape, and what the router's losses need.

        Args:
            is_target: `(batch, seq)` bool: tokens that count in the router's losses; None: these
                are not wanted.
        """
        tokens = x.flatten(0, 1)
        choice = self.router(tokens)
        out = self._routed(tokens, choice).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        sums = None if is_target is None else router_sums(choice.logits, choice.experts, is_target)
        return out, sums

    def _routed(self, tokens: Tensor, choice: Choice) -> Tensor:
        """`(tokens, d_model)` through the experts, added up with their weights."""
        experts, order = choice.experts.flatten().sort(stable=True)
        numbers = torch.arange(self.num_experts, device=experts.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        place = order.argsort()
        results = self.experts(_Spread.apply(tokens, order, place, self.top_k), ends)
        return _Combined.apply(results, choice.weights, order, place)


class _Spread(torch.autograd.Function):
    """Each token as often as it has experts, sorted by expert.

    Its gradient gathers and adds in a fixed order; that of plain indexing adds atomically, which is
    slower and differs from run to run.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        grads = grad.index_select(0, place).unflatten(0, (-1, ctx.top_k))
        return grads.sum(1), None, None, None


class _Combined(torch.autograd.Function):
    """Each token's results, brought back from the order of experts and added up with weights.

    Keeps the results once, where indexing and multiplication would keep them in both orders.
    """

    @staticmethod
    def forward(ctx: Any, results: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(results, weights, order, place)
        own = results.index_select(0, place).unflatten(0, weights.shape)
        return torch.bmm(weights[:, None], own).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        results, weights, order, place = ctx.saved_tensors
        grads = grad.index_select(0, order // weights.shape[1])
        by_result = weights.flatten().index_select(0, order)[:, None]
        grad_weights = (grads * results).sum(-1).index_select(0, place).view_as(weights)
        return grads * by_result, grad_weights, None, None

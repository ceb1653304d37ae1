"""The position-wise half of a block: one feed-forward, or a mixture of experts.

What happens to one token in a mixture:
1. The router gives it a score for every expert; the `top_k` highest are its own.
2. All pairs of token and expert are sorted by expert, so that each expert's tokens lie together.
3. Every expert computes its tokens, however many they are, in grouped matrix products.
4. The pairs are brought back into the order of tokens, and each token's `top_k` results are added
   up with the router's weights. A shared expert, where there is one, is added as it is.

Nothing is dropped, nothing padded, and where the device has a grouped kernel the host never waits
to learn who chose what.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, silu

from toolkit.models.config import TransformerConfig
from toolkit.models.grouped import ends_for, grouped_linear
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.projections import projected
from toolkit.models.router import Choice, Router, RouterSums, sums_for


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (GPT-2, Gemma)."""
    return gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": silu,
    "geglu": gelu_tanh,
    "gelu": gelu_tanh,
    "gelu_exact": gelu,
}


class FeedForward(nn.Module):
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: TransformerConfig, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.feed_forward]
        self.gate: nn.Module | None = None
        if config.is_gated:
            self.gate = nn.Linear(config.d_model, intermediate_size, bias=bias)
        self.up = nn.Linear(config.d_model, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, seq, d_model)` to the same shape."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        gate, up = projected(x, self.gate, self.up)
        return self.down(self.activation(gate) * up)


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
        self.adapters = nn.ModuleDict()
        """Of a matrix by its name: what adds to the product with it (`lora.AdaptedExperts`)."""

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """`(rows, d_model)`, sorted by expert, to the same shape; `ends`, `(num_experts,)` int32,
        says where the rows of each expert stop."""
        ends = ends_for(x, self._stacked(self.gate), ends)
        gated = self.activation(self._product("gate", x, ends))
        return self._product("down", gated * self._product("up", x, ends), ends)

    def _product(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        out = grouped_linear(x, self._stacked(getattr(self, name)), ends)
        return self.adapters[name](out, x, ends) if name in self.adapters else out

    def _stacked(self, weight: Tensor) -> Tensor:
        """`(num_experts, out, in)`; who stores the weights may keep them as one long matrix."""
        return weight if weight.dim() == 3 else weight.unflatten(0, (self.num_experts, -1))


def dispatch(tokens: Tensor, choice: Choice, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`(tokens, d_model)` through the chosen of `experts` (see `Experts.forward`), added up with
    their weights."""
    numbers, order = choice.experts.flatten().sort(stable=True)
    known = torch.arange(choice.logits.shape[-1], device=numbers.device)
    ends = torch.searchsorted(numbers, known, right=True, out_int32=True)
    place = order.argsort()
    results = experts(_Spread.apply(tokens, order, place, choice.experts.shape[1]), ends)
    return _Combined.apply(results, choice.weights, order, place)


class MoE(nn.Module):
    """Router, experts, perhaps a shared expert.

    Where experts or rows lie on several ranks, `dispatch` and `router_sums` are replaced from
    outside: by one that sends rows to the ranks of their experts, by one that adds over ranks.
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.dispatch: Callable[..., Tensor] = dispatch
        self.router_sums: Callable[..., RouterSums] = sums_for(moe)
        self.router = Router(config.d_model, moe)
        self.experts = Experts(config, moe)
        self.shared: nn.Module | None = None
        if (shared := moe.shared_expert_intermediate_size) is not None:
            self.shared = FeedForward(config, shared, bias=False)

    def forward(
        self, x: Tensor, is_target: Tensor | None = None
    ) -> tuple[Tensor, RouterSums | None]:
        """`(batch, seq, d_model)` to the same shape, and what the router's losses need of the
        tokens in `is_target`, `(batch, seq)` bool; None where they are not wanted."""
        tokens = x.flatten(0, 1)
        choice = self.router(tokens)
        out = self.dispatch(tokens, choice, self.experts).view_as(x)
        if self.shared is not None:
            out = out + self.shared(x)
        if is_target is None:
            return out, None
        return out, self.router_sums(choice.logits, choice.experts, is_target)


class _Spread(torch.autograd.Function):
    """Each token as often as it has experts, sorted by expert. The gradient adds in a fixed order;
    that of indexing adds atomically, which is slower and differs from run to run."""

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
    """Each token's results, back from the order of experts and added up with weights. The results
    are kept once, where indexing and multiplication would keep them in both orders."""

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

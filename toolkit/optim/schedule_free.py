"""Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled", arXiv 2405.15682).

    y = (1 - beta1) * z + beta1 * x             gradients are taken here: what the parameters hold
    v = beta2 * v + (1 - beta2) * gradient^2    AdamW's second moment
    z = z - lr * (gradient / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay * y)
    x = (1 - c) * x + c * z                     the average, which is used and kept in checkpoints
    c = weight of the step / weights so far, weight = step^r * (largest rate so far)^weight_lr_power

The authors' package keeps y and z and computes x, and y again, by inverting: that rounds, so a run
that is interrupted would differ. Here x and z are kept, and y is made of them in one way.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from toolkit.optim.foreach import prepare_gradients, together

_SCALARS = ("step", "weight_sum", "lr_max", "beta1")


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """State of a parameter: x, z, exp_avg_sq like it, and 0-d tensors which those share that took
    their first step together: step, weight_sum, lr_max and beta1 (of the last step)."""

    takes_found_inf = True
    keeps_average = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings | {"r": r, "weight_lr_power": weight_lr_power})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; uses up the gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            self._make_state([p for p in params if not self.state[p]])
            alike: dict[int, list[Tensor]] = {}
            for p in params:
                alike.setdefault(id(self.state[p]["step"]), []).append(p)
            for own in alike.values():
                self._step(own, group)

    @torch.no_grad()
    def show(self, *, average: bool) -> None:
        """Let the parameters hold x, or else y, from what the state holds: after it was filled, and
        around evaluations. Before a first step z is x, which weights alone may have been loaded
        into."""
        for parameter, state in self.state.items():
            if average:
                parameter.copy_(state["x"])
            elif state:
                state["z"].copy_(torch.where(state["step"] == 0, state["x"], state["z"]))
                _interpolate_(parameter, state)

    def _make_state(self, params: list[Tensor]) -> None:
        if not params:
            return
        shared = {name: params[0].new_zeros(()) for name in _SCALARS}
        for p in params:
            copies = {"x": p.clone(), "z": p.clone(), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p] = {**{n: t.detach() for n, t in copies.items()}, **shared}

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Of parameters that share their 0-d tensors."""
        step, weight_sum, lr_max, beta1 = (self.state[params[0]][name] for name in _SCALARS)
        taken = prepare_gradients(self, [p.grad for p in params])  # type: ignore[misc]
        rate = group["lr"] * taken
        tiny = torch.finfo(step.dtype).tiny
        step += taken
        torch.maximum(lr_max, rate, out=lr_max)
        # The step by which state is made, of rate 0, weighs nothing, whatever the power.
        weight = taken * (lr_max > 0) * step ** group["r"] * lr_max ** group["weight_lr_power"]
        weight_sum += weight
        beta1.fill_(group["betas"][0])
        share = weight / weight_sum.clamp(min=tiny)
        # Where no step was taken yet, the correction is 0, and so are the squares.
        correction = (1 - group["betas"][1] ** step).clamp(min=tiny)
        for own in together(params, step.device):
            self._update(own, group, taken, rate, correction, share)

    def _update(
        self,
        params: list[Tensor],
        group: dict[str, Any],
        taken: Tensor,
        rate: Tensor,
        correction: Tensor,
        share: Tensor,
    ) -> None:
        states = [self.state[p] for p in params]
        x, z, squares = ([s[name] for s in states] for name in ("x", "z", "exp_avg_sq"))
        update: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        forgets = 1 - group["betas"][1]
        torch._foreach_mul_(squares, 1 - taken * forgets)
        torch._foreach_addcmul_(squares, update, update, value=forgets)
        room = torch._foreach_div(squares, correction)
        torch._foreach_sqrt_(room)
        torch._foreach_add_(room, group["eps"])
        torch._foreach_div_(update, room)
        if group["weight_decay"]:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
        torch._foreach_mul_(update, rate)
        torch._foreach_sub_(z, update)
        torch._foreach_copy_(room, z)
        torch._foreach_sub_(room, x)
        torch._foreach_mul_(room, share)
        torch._foreach_add_(x, room)
        for p, state in zip(params, states, strict=True):
            _interpolate_(p, state)


def _interpolate_(parameter: Tensor, state: dict[str, Tensor]) -> None:
    """Let `parameter` hold y."""
    parameter.copy_(state["z"]).lerp_(state["x"], state["beta1"])

"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from toolkit.optim.foreach import prepare_gradients, together


class Lion(torch.optim.Optimizer):
    """weights -= lr * (sign(beta1 * average + (1 - beta1) * gradient) + weight_decay * weights);
    then average = beta2 * average + (1 - beta2) * gradient."""

    takes_found_inf = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; uses up the gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
            taken = prepare_gradients(self, [p.grad for p in params])
            for own in together(params, params[0].device):
                self._step(own, group, taken)

    def _step(self, params: list[Tensor], group: dict[str, Any], taken: Tensor) -> None:
        gradients: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        averages = [self.state[p]["exp_avg"] for p in params]
        beta1, beta2 = group["betas"]
        rate = group["lr"] * taken
        update = torch._foreach_mul(averages, beta1)
        torch._foreach_add_(update, gradients, alpha=1 - beta1)
        torch._foreach_sign_(update)
        torch._foreach_mul_(update, rate)
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(params, update)
        torch._foreach_mul_(averages, 1 - taken * (1 - beta2))
        torch._foreach_add_(averages, gradients, alpha=1 - beta2)

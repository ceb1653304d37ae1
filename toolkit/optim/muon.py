"""Muon (Jordan et al. 2024) and NorMuon (Li et al. 2025, arXiv 2510.05491) for matrices, AdamW for
all other parameters.

    average = momentum * average + (1 - momentum) * gradient
    direction = momentum * average + (1 - momentum) * gradient      with `nesterov`, else average
    update = U V', nearly, where direction = U S V'                 by `orthogonalized`
    weights -= lr * (scale * update + weight_decay * weights)

`scale` is 0.2 * sqrt(max(rows, columns)) for `match_rms_adamw` (Liu et al. 2025, arXiv 2502.16982):
updates have the root mean square of AdamW's, whose rate and weight decay they can take. It is
sqrt(max(1, rows / columns)) for `original`. NorMuon divides each row of the update by the root of
an average of its mean square, and gives the matrix back its norm (`original`), or a root mean
square of 0.2.

Stacked matrices (experts) are each a matrix.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from toolkit.optim.foreach import prepare_gradients

Compute = Callable[[Tensor, Tensor | None], Tensor]
"""Of matrices (number, rows, columns), and of what is kept for their rows (number, rows), which it
may change, a tensor like the first."""

_EPS = 1e-7
_ROW_EPS = 1e-10
_ALIKE = ("ns_steps", "ns_coefficients", "ns_dtype", "adjust_lr", "beta2")
"""Settings by which matrices are computed; those with equal ones are computed together."""


def orthogonalized(matrices: Tensor, steps: int, coefficients: Sequence[float]) -> Tensor:
    """`(number, rows, columns)` with singular values near 1, by a Newton-Schulz iteration in their
    own type; zero stays zero. Jordan's coefficients leave values between 0.7 and 1.2."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if is_tall else x


def working_dtype(asked: str, weights: Tensor, device: torch.device) -> torch.dtype:
    """The type in which matrices are orthogonalized. `auto`: bf16 as in the paper where that is
    fast, on accelerators; on CPUs that of the weights."""
    if asked != "auto":
        return getattr(torch, asked)
    is_slow_at_bf16 = device.type == "cpu" or weights.dtype == torch.float64
    return weights.dtype if is_slow_at_bf16 else torch.bfloat16


class Muon(torch.optim.Optimizer):
    """Groups with `is_matrix` are stepped by Muon, the others by AdamW, each with its own settings.

    State of a matrix: momentum_buffer, like it. Engines give `whole_matrices` where ranks may hold
    parts of them.
    """

    takes_found_inf = True
    needs_whole_matrices = True
    takes_whole_matrices = True
    whole_matrices: Any = None
    keeps: str | None = None
    """Name of what is kept for each row of a matrix."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        others = [group for group in self.param_groups if not group["is_matrix"]]
        self._adamw: Any = torch.optim.AdamW(others, fused=True) if others else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; uses up the gradients of matrices."""
        together: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        others = []
        for group in self.param_groups:
            if not group["is_matrix"]:
                others.append(group)
            elif any(p.grad is not None for p in group["params"]):
                key = tuple(group.get(name) for name in _ALIKE)
                together.setdefault(key, []).append(group)
        for groups in together.values():
            self._step_matrices(groups)
        if others:
            adamw = self._adamw
            adamw.param_groups, adamw.state = others, self.state
            for name in ("found_inf", "grad_scale"):
                setattr(adamw, name, getattr(self, name, None))
            adamw.step()

    def _step_matrices(self, groups: list[dict[str, Any]]) -> None:
        members = [[p for p in group["params"] if p.grad is not None] for group in groups]
        params = [p for own in members for p in own]
        values: list[Any] = [p.grad for p in params]
        taken = prepare_gradients(self, values)
        for group, own in zip(groups, members, strict=True):
            self._average(group, own, taken)
        first = groups[0]
        matrices = self.whole_matrices or _Alone(self.state)
        device = getattr(matrices, "device", values[0].device)
        matrices.apply(
            partial(self._update, first, taken.to(device)),
            params,
            values,
            dtype=working_dtype(first["ns_dtype"], values[0], device),
            scale=partial(self._scale, first["adjust_lr"]),
            keeps=self.keeps,
        )
        for group, own in zip(groups, members, strict=True):
            rate = group["lr"] * taken
            update: list[Any] = [p.grad for p in own]
            torch._foreach_mul_(own, 1 - rate * group["weight_decay"])
            torch._foreach_mul_(update, rate)
            torch._foreach_sub_(own, update)

    def _average(self, group: dict[str, Any], params: list[Tensor], taken: Tensor) -> None:
        """Let the gradients be directions, of which their averages learn."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        averages = [self.state[p]["momentum_buffer"] for p in params]
        gradients: list[Any] = [p.grad for p in params]
        momentum = group["momentum"]
        torch._foreach_mul_(averages, 1 - taken * (1 - momentum))
        torch._foreach_add_(averages, gradients, alpha=1 - momentum)
        if group["nesterov"]:
            torch._foreach_lerp_(gradients, averages, momentum)
        else:
            torch._foreach_copy_(gradients, averages)

    def _update(
        self, group: dict[str, Any], taken: Tensor, matrices: Tensor, kept: Tensor | None
    ) -> Tensor:
        return orthogonalized(matrices, group["ns_steps"], group["ns_coefficients"])

    def _scale(self, adjust_lr: str, rows: int, columns: int) -> float:
        if adjust_lr == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))


class NorMuon(Muon):
    """Muon whose updates have rows of about one size. Besides Muon's state: row_squares, a number
    for each row of a matrix, the same on all ranks."""

    keeps = "row_squares"

    def _update(
        self, group: dict[str, Any], taken: Tensor, matrices: Tensor, kept: Tensor | None
    ) -> Tensor:
        assert kept is not None, "asked for by `keeps`"
        update = super()._update(group, taken, matrices, kept).to(kept.dtype)
        norm = update.norm(dim=(-2, -1), keepdim=True)
        if group["adjust_lr"] == "match_rms_adamw":
            norm = torch.where(norm > 0, math.sqrt(update[0].numel()), 0.0)
        kept.lerp_(update.square().mean(-1), (1 - group["beta2"]) * taken.to(kept.dtype))
        update = update / (kept.sqrt()[..., None] + _ROW_EPS)
        return update * (norm / (update.norm(dim=(-2, -1), keepdim=True) + _ROW_EPS))

    def _scale(self, adjust_lr: str, rows: int, columns: int) -> float:
        return 0.2 if adjust_lr == "match_rms_adamw" else super()._scale(adjust_lr, rows, columns)


class _Alone:
    """What `toolkit.distributed.whole_matrices` does, where each parameter is whole."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def apply(
        self,
        compute: Compute,
        params: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        scale: Callable[[int, int], float],
        keeps: str | None,
    ) -> None:
        for p, value in zip(params, values, strict=True):
            stack = value.view(-1, *value.shape[-2:])
            kept = None
            if keeps is not None:
                state = self._state[p]
                if keeps not in state:
                    state[keeps] = value.new_zeros(value.shape[:-1])
                kept = state[keeps].view(stack.shape[:2])
            result = compute(stack.to(dtype), kept)
            stack.copy_(result).mul_(scale(*stack.shape[1:]))

"""Which steps a skip-step optimizer leaves out, decided on the device."""

from typing import Any

import torch

from toolkit.models.kernels import widest_float


class SpikeDetector:
    """The losses and gradient norms of the last accepted steps.

    A step is a spike where its loss, or its norm, exceeds mean + `sigma_factor` * standard
    deviation (unbiased) of theirs. It is judged as soon as half of the window is filled. Spikes do
    not enter the window, so that a run of them cannot make itself normal.
    """

    def __init__(self, length: int, sigma_factor: float, *, device: torch.device) -> None:
        self._factor = sigma_factor
        self._needed = max(2, length // 2)
        wide = widest_float(device)
        self._values = torch.zeros(3, length, dtype=wide, device=device)
        """Losses, norms, and 1 where there is a step; where `_count` has passed the end, it began
        anew."""
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        """Accepted steps so far."""
        self._one = torch.ones((), dtype=wide, device=device)

    def is_spike(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Whether a step with these (0-d, on the device) is one; 0-d, bool. NaN is."""
        sums = self._values.sum(-1)
        squares = (self._values * self._values).sum(-1)
        number, sums, squares = sums[2], sums[:2], squares[:2]
        mean = sums / number.clamp(min=1)
        variance = (squares - sums * mean) / (number - 1).clamp(min=1)
        limit = torch.add(mean, variance.clamp(min=0).sqrt(), alpha=self._factor)
        is_normal = (torch.stack((loss, norm)) <= limit).all()
        return (is_normal | (number < self._needed)).logical_not()

    def add(self, loss: torch.Tensor, norm: torch.Tensor, skipped: torch.Tensor) -> None:
        """Let a step that was not `skipped` (0-d, 0.0 or 1.0) enter the window; not one without
        targets, whose loss is NaN."""
        is_kept = (skipped == 0) & torch.isfinite(loss)
        place = self._count.remainder(self._values.shape[1])
        new = torch.stack((loss, norm, self._one)).unsqueeze(1)
        old = self._values.index_select(1, place)
        self._values.index_copy_(1, place, torch.where(is_kept, new, old))
        self._count += is_kept

    def state_dict(self) -> dict[str, Any]:
        """A copy on the host."""
        return {"values": self._values.cpu().clone(), "count": self._count.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`. A window of another length keeps its newest steps."""
        values, count = state["values"], int(state["count"])
        old, new = values.shape[1], self._values.shape[1]
        kept = [i % old for i in range(max(0, count - min(old, new)), count)]
        self._values.zero_()
        if old == new:
            self._values.copy_(values)
            self._count.fill_(count)
        else:
            self._values[:, : len(kept)] = values[:, kept].to(self._values)
            self._count.fill_(len(kept))

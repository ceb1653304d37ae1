"""Which steps a skip-step optimizer leaves out, decided on the device."""

from typing import Any

import torch


class SpikeDetector:
    """The losses and gradient norms of the last accepted steps.

    A step is a spike where its loss, or its norm, exceeds mean + `sigma_factor` * standard
    deviation (unbiased) of theirs. It is judged as soon as half of the window is filled. Spikes do
    not enter the window, so that a run of them cannot make itself normal.
    """

    def __init__(self, length: int, sigma_factor: float, *, device: torch.device) -> None:
        self._factor = sigma_factor
        self._needed = max(2, length // 2)
        self._values = torch.zeros(2, length, device=device)
        """Losses and norms; where `_count` has passed the end, it began anew."""
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        """Accepted steps so far."""
        self._places = torch.arange(length, device=device)

    def is_spike(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Whether a step with these (0-d, on the device) is one; 0-d, bool. NaN is."""
        filled = (self._places < self._count).to(self._values.dtype)
        number = filled.sum()
        mean = (self._values * filled).sum(-1) / number.clamp(min=1)
        squares = ((self._values - mean[:, None]).square() * filled).sum(-1)
        limit = mean + self._factor * (squares / (number - 1).clamp(min=1)).sqrt()
        is_normal = (torch.stack((loss, norm)).to(limit.dtype) <= limit).all()
        return ~is_normal & (number >= self._needed)

    def add(self, loss: torch.Tensor, norm: torch.Tensor, skipped: torch.Tensor) -> None:
        """Let a step that was not `skipped` (0-d, 0.0 or 1.0) enter the window."""
        is_accepted = skipped == 0
        is_here = (self._places == self._count % len(self._places)) & is_accepted
        values = torch.stack((loss, norm)).to(self._values.dtype)
        self._values = torch.where(is_here, values[:, None], self._values)
        self._count = self._count + is_accepted

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

"""`Callback`: hooks of the training loop."""

from collections.abc import Collection
from typing import Any

import torch

from toolkit.train.module import Metric
from toolkit.train.state import TrainState


class Callback:
    """Every hook does nothing by default; the trainer calls only those that a class overrides.

    All ranks run all callbacks, so collectives are fine everywhere but in `on_metrics` and `close`.
    docs/callbacks.md says when each event comes, and what may be done there.
    """

    state: TrainState
    """Set before `pre_train`."""
    state_follows_metrics = False
    """Whether `state_dict` depends on what `on_metrics` was given: it is then called in the metrics
    thread too, when all records up to the checkpoint have come, and no later ones."""

    def pre_train(self) -> None:
        """Before the first step, after a checkpoint was loaded."""

    def pre_step(self) -> None:
        """Before each step, when its batch is there."""

    def pre_optim_step(self) -> None:
        """Between the last backward and the optimizer: gradients exist."""

    def post_step(self) -> dict[str, Metric] | None:
        """After each step, before it is recorded; returned metrics join the step's record."""

    def post_record(self) -> None:
        """After the step was recorded: evaluation, checkpoints."""

    def on_metrics(self, stream: str, records: list[dict[str, Any]]) -> None:
        """Reduced records as written, on every rank, in the metrics thread: no collectives."""

    def on_stop(self) -> None:
        """Training stops early on request; a checkpoint must be committed now."""

    def on_failure(self) -> None:
        """Training ends by a failure that all ranks know of: finish what is under way."""

    def post_train(self) -> None:
        """After the last step."""

    def close(self) -> None:
        """Always called once at the end, after errors too."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Counterpart of `state_dict`."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Live tensors for the checkpoint, by any names; like `TrainModule.state_tensors` each rank
        gives its part of them, which is read and filled in place (see `twin_tensor`)."""
        return {}

    def state_filled(self, names: Collection[str]) -> None:
        """Called after those of `state_tensors` that the checkpoint has were filled: `names`."""

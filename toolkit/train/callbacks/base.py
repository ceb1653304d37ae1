"""`Callback`: hooks of the training loop."""

from typing import Any

from toolkit.train.module import Metric
from toolkit.train.state import TrainState


class Callback:
    """Every hook does nothing by default; the trainer calls only those that a class overrides.

    All ranks run all callbacks, so collectives are fine everywhere but in `on_metrics`.
    """

    state: TrainState
    """Set before `pre_train`."""

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

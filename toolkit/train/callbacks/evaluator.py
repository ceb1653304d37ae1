"""`Evaluator`: a callback that evaluates the model at fixed steps, and each step once."""

from abc import abstractmethod
from typing import Any

from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config_base import EvaluatorConfig


class Evaluator(Callback):
    """Every `interval` steps, and at the start and the end where the config says so. After a
    resume, a step whose result is in the checkpoint is not evaluated again."""

    def __init__(self, config: EvaluatorConfig) -> None:
        self._config = config
        self._done_at = -1

    def pre_train(self) -> None:
        step = self.state.step
        # After a stop inside an evaluation, the checkpoint of its step comes without the result.
        is_due = step % self._config.interval == 0 if step else self._config.at_start
        if is_due:
            self.evaluate()

    def post_record(self) -> None:
        if self.state.step % self._config.interval == 0:
            self.evaluate()

    def post_train(self) -> None:
        if self._config.at_end:
            self.evaluate()

    def state_dict(self) -> dict[str, Any]:
        return {"done_at": self._done_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done_at = state["done_at"]

    def evaluate(self) -> None:
        """Evaluate the weights that evaluations use, once per step."""
        state = self.state
        if state.config.no_evals or self._done_at == state.step:
            return
        with state.train_module.evaluating():
            if self.record_results():
                self._done_at = state.step

    @abstractmethod
    def record_results(self) -> bool:
        """Evaluate, and give results to `state.record_eval`; False: asked to stop before the end,
        nothing was recorded. Every rank calls it."""

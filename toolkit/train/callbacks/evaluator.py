"""`Evaluator`: a callback that evaluates the model at fixed steps, and each step once."""

from abc import abstractmethod
from collections.abc import Mapping
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
        """Evaluate all weights that evaluations look at, once per step."""
        state = self.state
        if state.config.no_evals or self._done_at == state.step:
            return
        found: dict[str, Mapping[str, Any]] = {}
        num_own = 0
        for suffix, holding in state.evaluated_weights.items():
            with holding():
                results = self.find_results()
            if results is None:
                return
            found |= {f"{name}{suffix}": numbers for name, numbers in results.items()}
            num_own = num_own or len(found)
        if found:
            self._done_at = state.step
            recorded = [state.record_eval(name, numbers) for name, numbers in found.items()]
            self.keep(recorded, num_own)

    @abstractmethod
    def find_results(self) -> Mapping[str, Mapping[str, Any]] | None:
        """Evaluate the weights that the model has now: name -> numbers; None: asked to stop before
        the end, nothing is recorded. Every rank calls it."""

    def keep(self, results: list[dict[str, Any]], num_own: int) -> None:
        """Called with what was recorded; the first `num_own` are of the model's own weights."""

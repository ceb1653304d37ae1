"""Evaluations during training are of the weights to use."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from toolkit.train.callbacks.config import LMEvaluatorConfig
from toolkit.train.callbacks.lm_evaluator import LMEvaluator
from toolkit.train.eval_sums import EvalSums
from toolkit.train.module import TrainModule


class Averaged(SimpleNamespace):
    """A train module whose loss tells which weights it has."""

    averages = TrainModule.averages
    evaluating = TrainModule.evaluating
    begin_evaluation = TrainModule.begin_evaluation
    _is_evaluating = False
    loss = 4.0

    @contextlib.contextmanager
    def other(self, loss: float) -> Iterator[None]:
        before, self.loss = self.loss, loss
        yield
        self.loss = before

    def eval_batch(self, batch: Any) -> EvalSums:
        return EvalSums(torch.tensor(self.loss), torch.tensor(1))


class Loader(list):
    bytes_per_token = 1.0
    is_held_out = True


def test_the_evaluator_scores_the_average_that_was_added_last() -> None:
    module = Averaged()
    module.averages.extend([lambda: module.other(3.0), lambda: module.other(2.0)])
    found: dict[str, Any] = {}
    evaluator = LMEvaluator(LMEvaluatorConfig())
    evaluator.state = SimpleNamespace(  # type: ignore[assignment]
        step=1,
        config=SimpleNamespace(no_evals=False),
        eval_loaders={"val": Loader([{}])},
        environment=SimpleNamespace(cpu_group=None),
        train_module=module,
        evaluated_weights={"": module.evaluating},
        should_stop=lambda: False,
        record_eval=lambda name, numbers: found.update(numbers) or {"name": name, **numbers},
    )
    evaluator.evaluate()
    assert found["loss"] == 2.0
    assert module.loss == 4.0

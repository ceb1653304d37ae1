"""Loss, perplexity and bits per byte on the validation split, during training."""

import logging
from typing import Any

import torch.distributed as dist

from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import LMEvaluatorConfig
from toolkit.train.eval_sums import TokenSums, evaluate_sets
from toolkit.train.scores import scores_of

log = logging.getLogger(__name__)


class LMEvaluator(Callback):
    """Every validation instance once; sums over all ranks, so the number does not depend on the
    number of ranks or the batch size."""

    def __init__(self, config: LMEvaluatorConfig) -> None:
        self._config = config
        self._done_at = -1
        self._without_targets: set[str] = set()

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
        last, scores = self.state.last_eval, self.state.last_scores
        return {"done_at": self._done_at, "last": last, "scores": scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done_at = state["done_at"]
        last = self.state.last_eval = state["last"]
        # Older checkpoints have only the result of the last set.
        self.state.last_scores = state.get("scores") or scores_of([] if last is None else [last])

    def evaluate(self) -> None:
        """Evaluate the current weights once per step: every set of validation instances, and where
        there are several, their sum as "val", last."""
        state = self.state
        if not state.eval_loaders or state.config.no_evals or self._done_at == state.step:
            return
        found: dict[str, TokenSums] = {}
        own = 0
        for suffix, holding in state.evaluated_weights.items():
            with holding():
                sums_of = self._evaluate_sets()
            if sums_of is None:
                return
            found |= {f"{name}{suffix}": sums for name, sums in sums_of.items()}
            own = own or len(found)
        self._done_at = state.step
        results = []
        for name, sums in found.items():
            if not sums.num_targets and name not in self._without_targets:
                self._without_targets.add(name)
                log.warning(
                    "%s: the rows of this evaluation have no target token, so its loss is nan; "
                    "raise data_loader.eval_tokens or dataset.sequence_length",
                    name,
                )
            results.append(state.record_eval(name, sums.numbers()))
        state.last_eval, state.last_scores = results[own - 1], scores_of(results)

    def _evaluate_sets(self) -> dict[str, TokenSums] | None:
        state, group = self.state, self.state.environment.cpu_group
        return evaluate_sets(
            state.eval_loaders,
            state.train_module.eval_batch,
            should_stop=state.should_stop,
            reduce=lambda totals: None if group is None else dist.all_reduce(totals, group=group),
        )

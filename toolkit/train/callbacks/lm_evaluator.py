"""Loss, perplexity and bits per byte of sets of validation instances, during training."""

import logging
from typing import Any

import torch.distributed as dist

from toolkit.train.callbacks.config import LMEvaluatorConfig
from toolkit.train.callbacks.evaluator import Evaluator
from toolkit.train.eval_sums import evaluate_sets
from toolkit.train.scores import scores_of

log = logging.getLogger(__name__)


class LMEvaluator(Evaluator):
    """Every instance once; sums over all ranks, so the numbers do not depend on the number of ranks
    or the batch size. Where several sets were held out, their sum is "val", last."""

    def __init__(self, config: LMEvaluatorConfig) -> None:
        super().__init__(config)
        self._without_targets: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        last, scores = self.state.last_eval, self.state.last_scores
        return {**super().state_dict(), "last": last, "scores": scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        last = self.state.last_eval = state["last"]
        # Older checkpoints have only the result of the last set.
        self.state.last_scores = state.get("scores") or scores_of([] if last is None else [last])

    def find_results(self) -> dict[str, dict[str, Any]] | None:
        state = self.state
        if not state.eval_loaders:
            return {}
        group = state.environment.cpu_group
        found = evaluate_sets(
            state.eval_loaders,
            state.train_module.eval_batch,
            should_stop=state.should_stop,
            begin=state.train_module.begin_evaluation,
            reduce=lambda totals: None if group is None else dist.all_reduce(totals, group=group),
        )
        if found is None:
            return None
        for name, sums in found.items():
            if not sums.num_targets and name not in self._without_targets:
                self._without_targets.add(name)
                log.warning(
                    "%s: the rows of this evaluation have no target token, so its loss is nan; "
                    "raise data_loader.eval_tokens or dataset.sequence_length",
                    name,
                )
        return {name: sums.numbers() for name, sums in found.items()}

    def keep(self, results: list[dict[str, Any]], num_own: int) -> None:
        self.state.last_eval = results[num_own - 1]
        self.state.last_scores = scores_of(results)

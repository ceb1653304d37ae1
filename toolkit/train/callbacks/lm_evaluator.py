"""Loss, perplexity and bits per byte on the validation split, during training."""

import logging
import math
import time
from typing import Any

import torch
import torch.distributed as dist

from toolkit.train.callbacks.base import Callback
from toolkit.train.config import LMEvaluatorConfig

log = logging.getLogger(__name__)


class LMEvaluator(Callback):
    """Every instance of `eval_dl` once; sums over all ranks, so the number does not depend on the
    number of ranks or the batch size."""

    def __init__(self, config: LMEvaluatorConfig) -> None:
        self._config = config
        self._done_at = -1

    def pre_train(self) -> None:
        step = self.trainer.step
        # After a stop inside an evaluation, the checkpoint of its step comes without the result.
        is_due = step % self._config.interval == 0 if step else self._config.at_start
        if is_due:
            self.evaluate()

    def post_record(self) -> None:
        if self.trainer.step % self._config.interval == 0:
            self.evaluate()

    def post_train(self) -> None:
        if self._config.at_end:
            self.evaluate()

    def state_dict(self) -> dict[str, Any]:
        return {"done_at": self._done_at, "last": self.trainer.last_eval}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done_at = state["done_at"]
        self.trainer.last_eval = state["last"]

    def evaluate(self) -> None:
        """Evaluate the current weights once per step."""
        trainer = self.trainer
        if trainer.eval_loader is None or trainer.config.no_evals or self._done_at == trainer.step:
            return
        started = time.perf_counter()
        totals = self._totals()
        if totals is None:
            return
        self._done_at = trainer.step
        loss, num_targets = totals
        mean = loss / num_targets
        result = {
            "tokens": trainer.tokens,
            "time": time.time(),
            "name": "val",
            "loss": mean,
            "ppl": math.exp(min(mean, 700.0)),
            "num_targets": int(num_targets),
            "seconds": time.perf_counter() - started,
        }
        if trainer.eval_loader.bytes_per_token:
            result["bits_per_byte"] = mean / math.log(2) / trainer.eval_loader.bytes_per_token
        trainer.record_eval(result)

    def _totals(self) -> tuple[float, float] | None:
        """Summed loss and number of targets over all ranks; None: asked to stop meanwhile."""
        trainer = self.trainer
        assert trainer.eval_loader is not None
        totals: torch.Tensor | None = None
        for batch in trainer.eval_loader:
            if trainer.should_stop():
                return None
            sums = trainer.train_module.eval_batch(batch)
            pair = torch.stack([sums.loss.double(), sums.num_targets.double()])
            totals = pair if totals is None else totals + pair
        assert totals is not None, "an evaluation loader has at least one batch"
        totals = totals.cpu()
        if trainer.environment.cpu_group is not None:
            dist.all_reduce(totals, group=trainer.environment.cpu_group)
        loss, num_targets = totals.tolist()
        return loss, num_targets

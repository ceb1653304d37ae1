"""Loss, perplexity and bits per byte on the validation split, during training."""

import logging
import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from toolkit.data.evaluation import EvalLoader
from toolkit.train.callbacks.base import Callback
from toolkit.train.config import LMEvaluatorConfig

log = logging.getLogger(__name__)

VAL = "val"


class LMEvaluator(Callback):
    """Every validation instance once; sums over all ranks, so the number does not depend on the
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
        """Evaluate the current weights once per step: every set of validation instances, and where
        there are several, their sum as "val", last."""
        trainer = self.trainer
        if not trainer.eval_loaders or trainer.config.no_evals or self._done_at == trainer.step:
            return
        found: dict[str, _Sums] = {}
        for name, loader in trainer.eval_loaders.items():
            sums = self._evaluate_one(loader)
            if sums is None:
                return
            found[name] = sums
        self._done_at = trainer.step
        if len(found) > 1:
            found[VAL] = _total(found.values())
        for name, sums in found.items():
            trainer.record_eval(self._result(name, sums))

    def _result(self, name: str, sums: "_Sums") -> dict[str, Any]:
        mean = sums.loss / max(1.0, sums.num_targets)
        result: dict[str, Any] = {
            "tokens": self.trainer.tokens,
            "time": time.time(),
            "name": name,
            "loss": mean,
            "ppl": math.exp(min(mean, 700.0)),
            "num_targets": int(sums.num_targets),
            "seconds": sums.seconds,
        }
        if sums.num_bytes:
            result["bits_per_byte"] = sums.loss / math.log(2) / sums.num_bytes
        return result

    def _evaluate_one(self, loader: EvalLoader) -> "_Sums | None":
        """Sums over all ranks; None: asked to stop meanwhile."""
        started = time.perf_counter()
        totals: torch.Tensor | None = None
        for batch in loader:
            if self.trainer.should_stop():
                return None
            sums = self.trainer.train_module.eval_batch(batch)
            pair = torch.stack([sums.loss.double(), sums.num_targets.double()])
            totals = pair if totals is None else totals + pair
        assert totals is not None, "an evaluation loader has at least one batch"
        totals = totals.cpu()
        if self.trainer.environment.cpu_group is not None:
            dist.all_reduce(totals, group=self.trainer.environment.cpu_group)
        loss, num_targets = totals.tolist()
        num_bytes = num_targets * loader.bytes_per_token
        return _Sums(loss, num_targets, num_bytes, time.perf_counter() - started)


class _Sums(NamedTuple):
    """Over the validation instances of all ranks."""

    loss: float
    num_targets: float
    num_bytes: float
    """UTF-8 bytes of the targets' text; 0 where that is not known."""
    seconds: float


def _total(sums: Iterable[_Sums]) -> _Sums:
    loss, num_targets, num_bytes, seconds = zip(*sums, strict=True)
    # Bits per byte of all need the bytes of all.
    return _Sums(sum(loss), sum(num_targets), sum(num_bytes) if all(num_bytes) else 0, sum(seconds))

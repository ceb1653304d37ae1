"""One model out of several moments of training: the mean of checkpoints, or of the last steps."""

import logging
import math
from collections.abc import Collection
from typing import Any

import torch

from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.folder import MODEL_PREFIX, saved_steps, step_folder
from toolkit.checkpoint.merge import merge_checkpoints
from toolkit.errors import ToolkitError
from toolkit.runs.files import RUN_FILES
from toolkit.train.callbacks.averages import Average
from toolkit.train.callbacks.base import Callback
from toolkit.train.callbacks.config import ModelMergerConfig
from toolkit.train.saving import describe_model

log = logging.getLogger(__name__)


class ModelMerger(Callback):
    """Writes merged/step{N} into the run folder after the last step: a checkpoint of weights, which
    `toolkit eval`, `toolkit export-hf` and `trainer.load_path` read. (Izmailov et al. 2018.)"""

    def __init__(self, config: ModelMergerConfig) -> None:
        self._config = config
        self._average: Average | None = None
        self._count = 0
        """Steps that the average is of."""

    def state_tensors(self) -> dict[str, torch.Tensor]:
        if self._config.last_percent is None:
            return {}
        if self._average is None:
            self._average = Average(self.state.train_module)
        return dict(self._average.tensors)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]

    def state_filled(self, names: Collection[str]) -> None:
        if self._average is not None and len(names) < len(self._average.tensors):
            self._count = 0  # of other parameters than now

    def post_step(self) -> None:
        percent, state = self._config.last_percent, self.state
        if percent is None:
            return
        if state.step <= math.ceil(state.total_steps * (1 - percent / 100)):
            self._count = 0  # what a shorter run has averaged is not of the last steps any more
            return
        self.state_tensors()
        assert self._average is not None
        self._count += 1
        if self._count == 1:
            self._average.copy()
        else:
            self._average.update(1 / self._count)

    def post_train(self) -> None:
        number = self._config.num_checkpoints
        try:
            if number is None:
                self._save_average()
            elif self.state.is_main:
                self._merge(number)
        except (ToolkitError, OSError) as error:  # training is worth more than a mean
            log.error("model_merger: %s", error)

    def _merge(self, wanted: int) -> None:
        run = self.state.run
        root = run.path(RUN_FILES.checkpoints)
        steps = saved_steps(root)[-wanted:]
        if len(steps) < wanted:
            log.warning("model_merger: %d of %d checkpoints are there", len(steps), wanted)
        if steps:
            checkpoints = [step_folder(root, step) for step in steps]
            folder = merge_checkpoints(checkpoints, run.path(RUN_FILES.merged))
            log.info("mean of the checkpoints at steps %s: %s", _listed(steps), folder)

    def _save_average(self) -> None:
        state, environment = self.state, self.state.environment
        if self._average is None or not self._count:
            if state.is_main:
                log.warning("model_merger: training ended before the last steps it is to average")
            return
        tensors = {
            key: tensor
            for key, tensor in state.train_module.state_tensors().items()
            if key.startswith(MODEL_PREFIX)
        }
        tensors |= {f"{MODEL_PREFIX}{name}": t for name, t in self._average.tensors.items()}
        folder = save_checkpoint(
            state.run.path(RUN_FILES.merged),
            tensors=tensors,
            rank_state={},
            rank=environment.rank,
            group=environment.checkpoint_group,
            step=state.step,
            tokens=state.tokens,
            engine=environment.layout.description,
            extra=describe_model(state.train_module),
        )
        if state.is_main:
            log.info("mean of the last %d steps: %s", self._count, folder)


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))

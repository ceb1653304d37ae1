"""`EngineTrainModule`: the optimizer's side of a step, the same for every model over an engine."""

from typing import Any

import torch
import torch.distributed as dist

from toolkit.distributed.engine import Engine, StepOutcome
from toolkit.distributed.environment import TrainingEnvironment, single_environment
from toolkit.metrics.norms import to_norms
from toolkit.optim.loss_scale import LossScale
from toolkit.optim.spikes import SpikeDetector
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Metric, Progress, TrainModule
from toolkit.train.scheduled import ScheduledSettings


class EngineTrainModule(TrainModule):
    """A train module whose `engine` steps: schedule, clipping, steps that are left out, loss
    scaling. `train_batch` keeps this rank's summand of the loss in `_loss`, and scales the loss by
    `_loss_scale` where there is one."""

    engine: Engine

    def __init__(
        self, config: TransformerTrainModuleConfig, environment: TrainingEnvironment | None
    ) -> None:
        """Without `environment`: one process without a launcher."""
        self.config, self.optim_config = config, config.optim
        self.environment = environment or single_environment(precision=config.precision)

    def begin_stepping(self) -> None:
        """Called once, when `engine` is there."""
        config, device = self.config, self.environment.device
        if self.engine.keeps_average:
            self.averages.append(self.engine.averaged)
        self._scheduled = ScheduledSettings(config, self.engine.optimizer)
        self.max_consecutive_skipped_steps = config.max_consecutive_skipped_steps
        self._loss = torch.zeros((), device=device)
        """This rank's summand of the last step's loss."""
        found = config.optim.skip_step
        self._spikes = SpikeDetector(*found, device=device) if found else None
        is_fp16 = self.environment.layout.precision == "fp16"
        self._loss_scale = LossScale(device) if is_fp16 else None

    def optim_step(self, progress: Progress) -> dict[str, Metric]:
        scheduled = self._scheduled.apply(progress)
        if not progress.step:
            self.engine.is_first_step = True
        outcome = self._step()
        metrics = {
            **{name: Metric(value) for name, value in scheduled.items()},
            "grad_norm": Metric(outcome.grad_norm),
            "skipped": Metric(outcome.skipped),
        }
        if (scaling := self._loss_scale) is not None:
            metrics["loss_scale"] = Metric(scaling.scale)
            scaling.update(torch.isfinite(outcome.grad_norm))
        return metrics

    def network_norms(self) -> dict[str, torch.Tensor]:
        squares = {
            "grad_norm": self.engine.grad_squares(),
            "weight_norm": self.engine.weight_squares(),
        }
        return {
            f"{kind}/{layer}": norm
            for kind, of_layers in squares.items()
            for layer, norm in to_norms(of_layers).items()
        }

    def shards(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return self.engine.gradient_shards(), self.engine.weight_shards()

    @property
    def parameter_names(self) -> list[str]:
        return list(self.engine.shards)

    def state_filled(self) -> None:
        self.engine.state_filled()

    def extra_state(self) -> dict[str, Any]:
        kept = {"spikes": self._spikes, "loss_scale": self._loss_scale}
        return {name: part.state_dict() for name, part in kept.items() if part is not None}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        for name, part in (("spikes", self._spikes), ("loss_scale", self._loss_scale)):
            if part is not None and name in state:
                part.load_state_dict(state[name])

    def _step(self) -> StepOutcome:
        """The engine's step, but for a spike where the optimizer leaves them out."""
        if (spikes := self._spikes) is None:
            return self.engine.step(self.config.max_grad_norm)
        loss = self._loss if self.environment.owns_loss else torch.zeros_like(self._loss)
        loss = loss.to(torch.float32, copy=True)  # which ranks add up in place
        if self.environment.world_size > 1:
            dist.all_reduce(loss)
        outcome = self.engine.step(
            self.config.max_grad_norm, lambda norm: spikes.is_spike(loss, norm)
        )
        spikes.add(loss, outcome.grad_norm, outcome.skipped)
        return outcome

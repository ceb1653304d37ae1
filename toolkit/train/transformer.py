"""`TransformerTrainModule`: a language model, its optimizer and its loss, under any engine.

Loss = sum of cross entropy over the targets of the GLOBAL batch / their number, whatever the
microbatch size, the number of ranks or the engine. The number is known before the first forward;
engines average gradients over ranks, so each local sum is scaled by ranks / number.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from toolkit.distributed.environment import TrainingEnvironment, single_environment
from toolkit.distributed.materialize import materialize
from toolkit.distributed.prepare import prepare_runtime
from toolkit.distributed.runtime import EngineRuntime
from toolkit.errors import ConfigError
from toolkit.metrics.norms import layer_norms, layer_of, to_norms
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.module import Batch, EvalSums, Metric, Progress, TrainModule

IGNORE_INDEX = -100


class TransformerTrainModule(TrainModule):
    """Wraps a model (usually still on the meta device) for training.

    Args:
        config: loss, optimizer, schedule, precision, parallelism.
        model: a `toolkit.models` Transformer; materialised here, in place.
        environment: where this process stands; default: one process without a launcher.
    """

    def __init__(
        self,
        config: TransformerTrainModuleConfig,
        model: nn.Module,
        *,
        environment: TrainingEnvironment | None = None,
    ) -> None:
        self.config = config
        self.environment = environment or single_environment(precision=config.precision)
        self._num_parameters = sum(p.numel() for p in model.parameters())
        self._model_config: Any = getattr(model, "config")  # noqa: B009 (modules type it Tensor)
        assert self._num_parameters == self._model_config.num_parameters, "parameter count mismatch"
        materialize(
            model,
            self.environment,
            ac_config=config.ac_config,
            compile_model=config.compile_model,
        )
        self.runtime: EngineRuntime = prepare_runtime(
            self.environment, model, config.optim.build, max_grad_norm=config.max_grad_norm
        )
        self._peak_rates = [group["lr"] for group in self.runtime.optimizer.param_groups]
        self.max_consecutive_skipped_steps = config.max_consecutive_skipped_steps
        self._z_loss = config.z_loss_multiplier or 0.0

    def train_batch(self, batch: Batch) -> dict[str, Metric]:
        input_ids, labels, num_targets = self._prepare(batch)
        factor = self.runtime.data_parallel_size / num_targets
        pieces = self._microbatches(input_ids, labels)
        ce = z = None
        for index, (ids, targets) in enumerate(pieces):
            with self.runtime.microbatch(is_last=index == len(pieces) - 1):
                with self.runtime.autocast():
                    sums = self.runtime.model(ids, targets, z_loss_multiplier=self._z_loss)
                self.runtime.backward(sums.loss, factor)
            ce = sums.ce if ce is None else ce + sums.ce
            z = sums.z if z is None else z + sums.z
        assert ce is not None, "a batch has at least one microbatch"
        metrics = {"loss": Metric(ce / num_targets, "sum")}
        if self._z_loss:
            assert z is not None
            metrics["z_loss"] = Metric(self._z_loss * z / num_targets, "sum")
        return metrics

    def optim_step(self, progress: Progress) -> dict[str, Metric]:
        factor = self._rate_factor(progress)
        for group, peak in zip(self.runtime.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor
        outcome = self.runtime.step(self.config.max_grad_norm)
        return {
            "lr": Metric(self.config.optim.lr * factor),
            "grad_norm": Metric(outcome.grad_norm),
            "skipped": Metric(outcome.skipped),
        }

    @torch.no_grad()
    def eval_batch(self, batch: Batch) -> EvalSums:
        device = self.environment.device
        input_ids = batch["input_ids"].to(device, non_blocking=True)
        labels = shift_labels(input_ids, _on_device(batch.get("label_mask"), device))
        with self.runtime.autocast():
            sums = self.runtime.model(input_ids, labels)
        return EvalSums(sums.ce, (labels != IGNORE_INDEX).sum())

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, seq, vocab) of the current weights; every rank must call it."""
        with self.runtime.autocast():
            return self.runtime.model(input_ids.to(self.environment.device))

    def network_norms(self) -> dict[str, torch.Tensor]:
        norms: dict[str, torch.Tensor] = {}
        for kind, shards in (
            ("grad_norm", self.runtime.gradient_shards()),
            ("weight_norm", self.runtime.weight_shards()),
        ):
            named = to_norms(self._square_sums(shards))
            norms |= {f"{kind}/{layer}": value for layer, value in named.items()}
        return norms

    def flops_per_token(self, sequence_length: int) -> float:
        return self._model_config.flops_per_token(sequence_length)

    @property
    def num_parameters(self) -> int:
        return self._num_parameters

    @property
    def model_config(self) -> Any:
        return self._model_config

    @property
    def optim_config(self) -> Any:
        return self.config.optim

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return self.runtime.state_tensors()

    def state_filled(self) -> None:
        self.runtime.state_filled()

    def _prepare(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
        """(input_ids, labels, number of targets in the global batch)."""
        device = self.environment.device
        input_ids = batch["input_ids"].to(device, non_blocking=True)
        mask = _on_device(batch.get("label_mask"), device)
        labels = shift_labels(input_ids, mask)
        if mask is None:
            rows, length = input_ids.shape
            return input_ids, labels, rows * (length - 1) * self.runtime.data_parallel_size
        count = (labels != IGNORE_INDEX).sum()
        if self.environment.world_size > 1:
            dist.all_reduce(count)
        # A batch without any target has no loss; 1 keeps it zero instead of dividing by zero.
        return input_ids, labels, count.clamp(min=1)

    def _microbatches(
        self, input_ids: torch.Tensor, labels: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        length = input_ids.shape[1]
        if self.config.rank_microbatch_size is None:
            return [(input_ids, labels)]
        size = self.config.rank_microbatch_size // length
        if size < 1:
            raise ConfigError(
                f"train_module.rank_microbatch_size {self.config.rank_microbatch_size} is smaller "
                f"than one instance of dataset.sequence_length {length}; use a multiple of it"
            )
        return list(zip(input_ids.split(size), labels.split(size), strict=True))

    def _rate_factor(self, progress: Progress) -> float:
        if self.config.scheduler.units == "tokens":
            per_step = progress.total_tokens // progress.total_steps
            return self.config.scheduler.factor(
                progress.tokens, progress.total_tokens, step_size=per_step
            )
        return self.config.scheduler.factor(progress.step, progress.total_steps)

    def _square_sums(self, shards: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums of squares by layer over all shards; the same layers on every rank."""
        layers = {name: layer_of(name) for name, _ in self.runtime.module.named_parameters()}
        order = list(dict.fromkeys(layers.values()))
        device = self.environment.device
        sums = layer_norms(shards)
        packed = torch.stack(
            [sums.get(layer, torch.zeros(())).to(device, torch.float32) for layer in order]
        )
        if self.runtime.shard_group is not None:
            dist.all_reduce(packed, group=self.runtime.shard_group)
        return dict(zip(order, packed.unbind(), strict=True))


def shift_labels(input_ids: torch.Tensor, label_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Next-token targets (batch, seq): shifted inside each instance, -100 where there is none.

    `label_mask` (batch, seq), bool: which tokens of `input_ids` are targets, by position.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    if label_mask is None:
        labels[:, :-1] = input_ids[:, 1:]
    else:
        labels[:, :-1] = torch.where(label_mask[:, 1:], input_ids[:, 1:], IGNORE_INDEX)
    return labels


def _on_device(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)

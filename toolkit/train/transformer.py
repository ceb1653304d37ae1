"""`TransformerTrainModule`: a language model, its optimizer and its loss, under any engine.

Loss = sum of cross entropy over the targets of the GLOBAL batch / their number, whatever the
microbatch size, the number of ranks or the engine. The number is known before the first forward;
each local sum is scaled by ranks / number where the engine averages gradients over ranks, and by
1 / number where it adds them up.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from toolkit.checkpoint.folder import MODEL_PREFIX
from toolkit.distributed.devices import compute_dtype
from toolkit.distributed.engine import Microbatch, StepOutcome
from toolkit.distributed.environment import TrainingEnvironment, single_environment
from toolkit.distributed.low_precision import describe_float8
from toolkit.distributed.materialize import prepare_engine
from toolkit.distributed.stages import Stages
from toolkit.distributed.tensor_parallel import share_of_model
from toolkit.errors import ConfigError, TrainingError
from toolkit.metrics.norms import to_norms
from toolkit.models.init import canonical_parameters
from toolkit.models.kernels import kernel_record
from toolkit.models.lora import choose_trained
from toolkit.models.loss import IGNORE_INDEX, shift_labels
from toolkit.models.parameters import flops_per_token, is_adapter, is_trained
from toolkit.models.router import RouterSums
from toolkit.optim.loss_scale import LossScale
from toolkit.optim.spikes import SpikeDetector
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.eval_sums import Batch, EvalSums
from toolkit.train.module import Metric, Progress, TrainModule

log = logging.getLogger(__name__)


class TransformerTrainModule(TrainModule):
    """Wraps a Transformer of `toolkit.models`, usually still on the meta device, which is
    materialised here, in place. Without `environment`: one process without a launcher."""

    def __init__(
        self,
        config: TransformerTrainModuleConfig,
        model: nn.Module,
        *,
        environment: TrainingEnvironment | None = None,
    ) -> None:
        self.config = config
        self.environment = environment or single_environment(precision=config.precision)
        self.model_config: Any = getattr(model, "config")  # noqa: B009 (modules type it Tensor)
        self.optim_config, self.adapter_config = config.optim, config.lora
        num_parameters = sum(p.numel() for p in model.parameters())
        assert num_parameters == self.model_config.num_parameters, "parameter count mismatch"
        self._parameters = choose_trained(model, freeze=config.freeze, lora=config.lora)
        self.num_parameters = self._parameters.num_parameters
        infos = self._parameters.infos.items()
        self.trained_names = frozenset(name for name, info in infos if info.is_trained)
        if self.environment.is_main and (config.freeze or config.lora is not None):
            log.info("%s", self._parameters)
        optim = config.optim.of_model(self.model_config.to_transformer().d_model)
        self.engine = prepare_engine(
            self.environment,
            model,
            optim.build,
            max_grad_norm=config.max_grad_norm,
            ac_config=config.ac_config,
            compile_model=config.compile_model,
            float8_config=config.float8_config,
            activation_offload=config.activation_offload,
            width_multiplier=1.0 if optim.mup is None else optim.mup.multiplier,
        )
        if self.engine.keeps_average:
            self.averages.append(self.engine.averaged)
        self._peak_rates = [float(group["lr"]) for group in self.engine.optimizer.param_groups]
        self.max_consecutive_skipped_steps = config.max_consecutive_skipped_steps
        self._z_loss = config.z_loss_multiplier or 0.0
        layout = self.environment.layout
        self.kernels = kernel_record(
            share_of_model(
                self.model_config.to_transformer(), layout.tp, experts_are_sharded=layout.ep > 1
            ),
            self.environment.device,
            compute_dtype(layout.precision) or torch.float32,
            is_compiled=config.compile_model,
            has_z_loss=self._z_loss != 0.0,
            trains_head_alone=self.trained_names == {"head.weight"},
            vocabulary_is_cut=layout.tp > 1,
        )
        if (float8 := config.float8_config) is not None:
            self.kernels["linear layers"] = describe_float8(
                self.model_config.to_transformer(), float8
            )
        if self.environment.is_main and (float8 or self.environment.device.type != "cpu"):
            log.info("kernels: %s", "; ".join(f"{k} by {v}" for k, v in self.kernels.items()))
        self._loss = torch.zeros((), device=self.environment.device)
        """This rank's summand of the last step's loss."""
        found = config.optim.skip_step
        self._spikes = SpikeDetector(*found, device=self.environment.device) if found else None
        is_fp16 = layout.precision == "fp16"
        self._loss_scale = LossScale(self.environment.device) if is_fp16 else None
        self._is_checked = False

    def train_batch(self, batch: Batch) -> dict[str, Metric]:
        inputs = self._inputs(batch)
        # Without targets the mean is NaN; what is scaled by 1 then, not divided by 0, is zero.
        count = self._num_targets(batch, inputs.labels)
        num_targets = max(count, 1) if isinstance(count, int) else count.clamp(min=1)
        factor = self.environment.layout.grad_ranks / num_targets
        if (scaling := self._loss_scale) is not None:
            factor = scaling.scale * factor
        sums = self.engine.forward_backward(
            self._microbatches(inputs), factor, z_loss_multiplier=self._z_loss
        )
        if not self._is_checked:
            self._check_gradients()
        if scaling is not None:
            self.engine.scale_gradients(1 / scaling.scale)
        self._loss = sums.ce / count
        metrics = {"loss": Metric(self._loss, "sum")}
        if self._z_loss:
            metrics["z_loss"] = Metric(self._z_loss * (sums.z / count), "sum")
        if sums.router is not None:
            metrics |= self._router_metrics(sums.router, count)
        return metrics

    def optim_step(self, progress: Progress) -> dict[str, Metric]:
        factor = self._rate_factor(progress)
        for group, peak in zip(self.engine.optimizer.param_groups, self._peak_rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):  # a compiled step reads it
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor
        outcome = self._step()
        metrics = {
            "lr": Metric(self.config.optim.lr * factor),
            "grad_norm": Metric(outcome.grad_norm),
            "skipped": Metric(outcome.skipped),
        }
        if (scaling := self._loss_scale) is not None:
            metrics["loss_scale"] = Metric(scaling.scale)
            scaling.update(torch.isfinite(outcome.grad_norm))
        return metrics

    def eval_batch(self, batch: Batch) -> EvalSums:
        inputs = self._inputs(batch)
        ce = self.engine.forward(inputs).ce
        layout, rank = self.environment.layout, self.environment.rank
        count = (inputs.labels != IGNORE_INDEX).sum()
        # Each rank of a cp group has the loss of its own positions, and knows all labels.
        return EvalSums(
            ce if layout.owns_loss(rank) else torch.zeros_like(ce),
            count if layout.owns_rows(rank) else torch.zeros_like(count),
        )

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (batch, seq, vocab) of the current weights; every rank must call it."""
        return self.engine.logits(input_ids.to(self.environment.device))

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

    @property
    def blocks(self) -> dict[str, nn.Module | None]:  # type: ignore[override]
        module: Any = self.engine.module
        parts = module.modules_in_order() if isinstance(module, Stages) else [module]
        own = {
            layer: block
            for part in parts
            for layer, block in zip(part.blocks.layers, part.blocks, strict=True)
        }
        number = self.model_config.to_transformer().num_layers
        return {f"blocks.{layer}": own.get(layer) for layer in range(number)}

    def flops_per_token(self, sequence_length: int) -> float:
        model = self.model_config.to_transformer()
        return flops_per_token(model, self._parameters, sequence_length)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        tensors, lora = self.engine.state_tensors(), self.config.lora
        if lora is None:
            return tensors
        return {
            key: tensor
            for key, tensor in tensors.items()
            if not key.startswith(MODEL_PREFIX) or is_trained(key.removeprefix(MODEL_PREFIX), lora)
        }

    def base_tensors(self) -> dict[str, torch.Tensor]:
        if self.config.lora is None:
            return {}
        tensors = self.engine.state_tensors().items()
        return {k: t for k, t in tensors if k.startswith(MODEL_PREFIX) and not is_adapter(k)}

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
        loss = self._loss.float() if self.environment.owns_loss else torch.zeros_like(self._loss)
        if self.environment.world_size > 1:
            dist.all_reduce(loss)
        outcome = self.engine.step(
            self.config.max_grad_norm, lambda norm: spikes.is_spike(loss, norm)
        )
        spikes.add(loss, outcome.grad_norm, outcome.skipped)
        return outcome

    def _check_gradients(self) -> None:
        """After the first backward: that it reached all that is trained. A kernel that forgets a
        gradient would leave a parameter as it is, without a word."""
        self._is_checked = True
        if self.environment.layout.zero_stage:  # DeepSpeed has taken them away
            return
        parameters = canonical_parameters(self.engine.module)
        missing = [name for name, p in parameters.items() if p.requires_grad and p.grad is None]
        if missing:
            raise TrainingError(
                f"{', '.join(missing[:3])}: trained, but without a gradient after the first "
                "backward; add what is not used to train_module.freeze"
            )

    def _inputs(self, batch: Batch) -> Microbatch:
        moved = {
            name: batch[name].to(self.environment.device, non_blocking=True)
            for name in ("input_ids", "document_ids", "label_mask")
            if name in batch
        }
        input_ids, document_ids = moved["input_ids"], moved.get("document_ids")
        labels = shift_labels(input_ids, moved.get("label_mask"), document_ids)
        return Microbatch(input_ids, labels, document_ids)

    def _num_targets(self, batch: Batch, labels: torch.Tensor) -> int | torch.Tensor:
        """Targets in the global batch."""
        if "label_mask" not in batch and "document_ids" not in batch:
            rows, length = labels.shape
            return rows * (length - 1) * self.environment.layout.batch_ranks
        count = (labels != IGNORE_INDEX).sum()
        self._add_up(count)
        return count

    def _add_up(self, value: torch.Tensor) -> None:
        """Over the ranks that read distinct rows, in place."""
        if (group := self.environment.loss_group) is not None:
            dist.all_reduce(value, group=group)

    def _router_metrics(self, sums: RouterSums, count: int | torch.Tensor) -> dict[str, Metric]:
        """Losses without their multipliers, and the assignments of the busiest expert of any layer
        relative to an even share."""
        balance, z, load = sums
        self._add_up(load)
        share = load.amax(-1) / load.sum(-1).clamp(min=1)
        return {
            "load_balancing_loss": Metric(balance / count, "sum"),
            "router_z_loss": Metric(z / count, "sum"),
            "expert_load_max": Metric(share.amax() * load.shape[-1]),
        }

    def _microbatches(self, inputs: Microbatch) -> list[Microbatch]:
        size, length = self.config.rank_microbatch_size, inputs.input_ids.shape[1]
        if size is None:
            return [inputs]
        if size < length:
            raise ConfigError(
                f"train_module.rank_microbatch_size {size} is smaller than one instance of "
                f"dataset.sequence_length {length}; use a multiple of it"
            )
        return inputs.split(size // length)

    def _rate_factor(self, progress: Progress) -> float:
        if self.config.scheduler.units == "tokens":
            return self.config.scheduler.factor(
                progress.tokens, progress.total_tokens, step_size=progress.tokens_per_step
            )
        return self.config.scheduler.factor(progress.step, progress.total_steps)

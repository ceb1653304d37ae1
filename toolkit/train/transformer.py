"""`TransformerTrainModule`: a language model, its optimizer and its loss, under any engine.

Loss = sum of cross entropy over the targets of the GLOBAL batch / their number, whatever the
microbatch size, the number of ranks or the engine. The number is known before the first forward;
each local sum is scaled by ranks / number where the engine averages gradients over ranks, and by
1 / number where it adds them up.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from toolkit.checkpoint.folder import MODEL_PREFIX
from toolkit.distributed.devices import compute_dtype
from toolkit.distributed.engine import Microbatch
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.fully_sharded import describe_gathers
from toolkit.distributed.low_precision import describe_float8
from toolkit.distributed.materialize import prepare_engine
from toolkit.distributed.shards import fill_part
from toolkit.distributed.sizes import share_of_model
from toolkit.distributed.stages import Stages
from toolkit.errors import ConfigError, DataError, TrainingError
from toolkit.models.adapter_state import dropout_keys
from toolkit.models.attention import Attention
from toolkit.models.init import canonical_parameters, spec_of_weight
from toolkit.models.kernels import kernel_record
from toolkit.models.lora import choose_trained
from toolkit.models.loss import IGNORE_INDEX, shift_labels
from toolkit.models.parameters import (
    describe_quantised,
    flops_per_token,
    is_adapter,
    is_trained,
    quantised_layers,
)
from toolkit.models.quantised import quantised_linears
from toolkit.models.router import RouterSums
from toolkit.models.sdpa import choose_attention, masked_backend
from toolkit.optim.groups import describe_groups, group_records
from toolkit.train.config import TransformerTrainModuleConfig
from toolkit.train.eval_sums import Batch, EvalSums
from toolkit.train.module import Metric, Progress
from toolkit.train.router_biases import RouterBiases
from toolkit.train.stepping import EngineTrainModule

log = logging.getLogger(__name__)


PART_BYTES = 256 << 20
"""Of a base that is kept in few bits, the most that is there in fp32 at once, or one layer."""


class TransformerTrainModule(EngineTrainModule):
    """Wraps a Transformer of `toolkit.models`, usually still on the meta device, which is
    materialised here, in place."""

    def __init__(
        self,
        config: TransformerTrainModuleConfig,
        model: nn.Module,
        *,
        environment: TrainingEnvironment | None = None,
    ) -> None:
        super().__init__(config, environment)
        self.model_config: Any = getattr(model, "config")  # noqa: B009 (modules type it Tensor)
        self.adapter_config = config.lora
        num_parameters = sum(p.numel() for p in model.parameters())
        assert num_parameters == self.model_config.num_parameters, "parameter count mismatch"
        self._parameters = choose_trained(model, freeze=config.freeze, lora=config.lora)
        self.num_parameters = self._parameters.num_parameters
        infos = self._parameters.infos.items()
        self.trained_names = frozenset(name for name, info in infos if info.is_trained)
        if self.environment.is_main and (config.freeze or config.lora is not None):
            log.info("%s", self._parameters)
        dtype = compute_dtype(self.environment.layout.precision) or torch.float32
        order = choose_attention(
            config.attention_backend,
            self.environment.device,
            dtype=dtype,
            head_dim=self.model_config.to_transformer().attention_head_dim,
            measured=self.environment.choices.attention,
        )
        masked = masked_backend(
            config.attention_backend,
            self.model_config.to_transformer(),
            self.environment.device,
            dtype,
        )
        model.masked_backend = masked  # type: ignore[assignment]
        for part in model.modules():
            if isinstance(part, Attention):
                part.may_block = masked is None
        quantised = quantised_layers(self.model_config.to_transformer(), config.lora)
        optim = config.optim.of_model(self.model_config.to_transformer().d_model)
        shapes = {name: info.shape for name, info in infos}
        self.optimizer_groups = group_records(optim, shapes, self.trained_names)
        if self.environment.is_main and len(self.optimizer_groups) > 1:
            for line in describe_groups(optim, self.optimizer_groups):
                log.info("%s", line)
        is_compiled = config.compile_model is True or (
            config.compile_model == "auto" and bool(self.environment.choices.compile_model)
        )
        if is_compiled and self.environment.is_main:
            log.info("compiling: the first step takes longer")
        self.engine = prepare_engine(
            self.environment,
            model,
            optim.build,
            max_grad_norm=config.max_grad_norm,
            ac_config=config.ac_config,
            compile_model=is_compiled,
            compile_mode=config.compile_mode,
            float8_config=config.float8_config,
            activation_offload=config.activation_offload,
            quantised=quantised,
            width_multiplier=1.0 if optim.mup is None else optim.mup.multiplier,
        )
        self.begin_stepping()
        layout, device = self.environment.layout, self.environment.device
        self.kernels = kernel_record(
            share_of_model(
                self.model_config.to_transformer(), layout.tp, experts_are_sharded=layout.ep > 1
            ),
            device,
            dtype,
            attention_order=order,
            masked_backend=masked,
            is_compiled=is_compiled,
            has_z_loss=bool(config.z_loss_multiplier),
            trains_head_alone=self.trained_names == {"head.weight"},
            vocabulary_is_cut=layout.tp > 1,
        )
        if layout.is_fsdp and layout.pp == 1:
            self.kernels["weights"] = describe_gathers(self.engine.module)
        if (float8 := config.float8_config) is not None:
            self.kernels["linear layers"] = describe_float8(
                self.model_config.to_transformer(), float8
            )
        if quantised is not None:
            self.kernels["linear layers"] = describe_quantised(
                self.model_config.to_transformer(), quantised
            )
        is_said = float8 or quantised or masked or device.type != "cpu"
        if self.environment.is_main and is_said:
            log.info("kernels: %s", "; ".join(f"{k} by {v}" for k, v in self.kernels.items()))
        self._is_checked = False
        self._load: torch.Tensor | None = None
        """How often each router chose each expert for the targets of the last global batch."""

    def train_batch(self, batch: Batch) -> dict[str, Metric]:
        inputs = self._inputs(batch)
        inputs = inputs._replace(dropout_keys=self._dropout_keys(inputs.input_ids))
        # Without targets the mean is NaN; what is scaled by 1 then, not divided by 0, is zero.
        count = self._num_targets(batch, inputs.labels)
        num_targets = max(count, 1) if isinstance(count, int) else count.clamp(min=1)
        factor = self.environment.layout.grad_ranks / num_targets
        z_loss = self._scheduled.z_loss(self.progress)
        if (scaling := self._loss_scale) is not None:
            factor = scaling.scale * factor
        sums = self.engine.forward_backward(
            self._microbatches(inputs), factor, z_loss_multiplier=z_loss
        )
        if not self._is_checked:
            self._check_gradients()
        if scaling is not None:
            self.engine.scale_gradients(1 / scaling.scale)
        self._loss = sums.ce / count
        metrics = {"loss": Metric(self._loss, "sum")}
        if self.config.z_loss_multiplier:
            metrics["z_loss"] = Metric(z_loss * (sums.z / count), "sum")
        if sums.router is not None:
            metrics |= self._router_metrics(sums.router, count)
        if sums.mtp is not None:
            self._add_up(sums.mtp.num_targets)
            # Rows of two tokens have no target further ahead.
            mtp_loss = sums.mtp.ce / sums.mtp.num_targets.clamp(min=1)
            metrics["mtp_loss"] = Metric(mtp_loss, "sum")
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

    @property
    def blocks(self) -> dict[str, nn.Module | None]:  # type: ignore[override]
        """The model's blocks by name; None for those that another pipeline stage holds."""
        own = {
            layer: block
            for part in self._stages()
            for layer, block in zip(part.blocks.layers, part.blocks, strict=True)
        }
        number = self.model_config.to_transformer().num_layers
        return {f"blocks.{layer}": own.get(layer) for layer in range(number)}

    def flops_per_token(self, sequence_length: int) -> float:
        model = self.model_config.to_transformer()
        return flops_per_token(model, self._parameters, sequence_length)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        tensors, lora = self._whole_state(), self.config.lora
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
        layers = quantised_linears(self.engine.module).items()
        few = {f"{MODEL_PREFIX}{n}": torch.empty(x.shape, device="meta") for n, x in layers}
        return few | {
            key: tensor
            for key, tensor in self._whole_state().items()
            if key.startswith(MODEL_PREFIX) and not is_adapter(key)
        }

    def base_parts(self) -> Iterator[dict[str, torch.Tensor]]:
        layers = quantised_linears(self.engine.module)
        yield {
            key: tensor
            for key, tensor in self.base_tensors().items()
            if key.removeprefix(MODEL_PREFIX) not in layers
        }
        for names in _parts({name: layer.shape for name, layer in layers.items()}):
            device = self.environment.device
            part = {
                f"{MODEL_PREFIX}{name}": torch.empty(layers[name].shape, device=device)
                for name in names
            }
            yield part
            for name in names:  # each goes before the next part comes
                layers[name].fill_(part.pop(f"{MODEL_PREFIX}{name}"))

    def optim_step(self, progress: Progress) -> dict[str, Metric]:
        metrics = super().optim_step(progress)
        if self._load is not None:
            self._biases.update(self._load, torch.as_tensor(metrics["skipped"].value))
        return metrics

    def _whole_state(self) -> dict[str, torch.Tensor]:
        """What the engine holds, and the biases of routers."""
        biases = {f"{MODEL_PREFIX}{name}": bias for name, bias in self._biases.tensors.items()}
        return {**self.engine.state_tensors(), **biases}

    @functools.cached_property
    def _biases(self) -> RouterBiases:
        return RouterBiases(self.model_config.to_transformer(), self._stages())

    def _stages(self) -> list[Any]:
        """The model, or this rank's stages of it."""
        module: Any = self.engine.module
        return module.modules_in_order() if isinstance(module, Stages) else [module]

    def fill_from_base(self, read: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Fill what begins as a part of the base's weights, of whole ones that `read` fills."""
        tensors, shards = self.engine.state_tensors(), self.engine.shards
        specs = {name: spec_of_weight(name, self.engine.module) for name in shards}
        wanted = {name: spec for name, spec in specs.items() if spec is not None}
        sources = {spec.weight: shards[spec.weight].shape for spec in wanted.values()}
        for names in _parts(sources):
            whole = {f"{MODEL_PREFIX}{name}": torch.empty(sources[name]) for name in names}
            read(whole)
            for name, spec in wanted.items():
                if spec.weight in names:
                    values = spec.part_of(whole[f"{MODEL_PREFIX}{spec.weight}"])
                    fill_part(tensors[f"{MODEL_PREFIX}{name}"], shards[name], values)

    def _check_gradients(self) -> None:
        """After the first backward: that it reached all that is trained. A kernel that forgets a
        gradient would leave a parameter as it is, without a word."""
        self._is_checked = True
        lora, adapters = self.config.lora, getattr(self.engine.module, "adapters", None)
        if lora is not None and lora.dropout and (adapters is None or adapters.keys is None):
            raise TrainingError(
                "train_module.lora.dropout: this train module gives the model no dropout_keys; set "
                "it to 0"
            )
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
        if "units" in batch:
            raise DataError(
                "the batch holds pairs or marked answers, which a language model does not learn "
                "from; set train_module.objective"
            )
        moved = {
            name: batch[name].to(self.environment.device, non_blocking=True)
            for name in ("input_ids", "document_ids", "label_mask")
            if name in batch
        }
        input_ids, document_ids = moved["input_ids"], moved.get("document_ids")
        labels = shift_labels(input_ids, moved.get("label_mask"), document_ids)
        return Microbatch(input_ids, labels, document_ids)

    def _dropout_keys(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Of this rank's rows of the global batch, `(rows, seq)`; None: adapters have no dropout.
        A train module that calls the model itself gives it these (`dropout_keys=`)."""
        lora = self.config.lora
        if lora is None or not lora.dropout:
            return None
        environment, (rows, length) = self.environment, input_ids.shape
        first = environment.layout.batch_rank(environment.rank) * rows
        step = 0 if self.progress is None else self.progress.step
        own = range(first, first + rows)
        return dropout_keys(environment.seed, step, own, length, input_ids.device)

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
        self._load = load
        share = load.amax(-1) / load.sum(-1).clamp(min=1)
        return {
            "load_balancing_loss": Metric(balance / count, "sum"),
            "router_z_loss": Metric(z / count, "sum"),
            "expert_load_max": Metric(share.amax() * load.shape[-1]),
        }

    def _microbatches(self, inputs: Microbatch) -> list[Microbatch]:
        rows = self._rows_at_once(inputs.input_ids)
        return [inputs] if rows is None else inputs.split(rows)

    def _rows_at_once(self, input_ids: torch.Tensor) -> int | None:
        """Rows of a microbatch; None: all of them."""
        size, length = self.config.rank_microbatch_size, input_ids.shape[1]
        if size is None:
            return None
        if size < length:
            raise ConfigError(
                f"train_module.rank_microbatch_size {size} is smaller than one instance of "
                f"dataset.sequence_length {length}; use a multiple of it"
            )
        self.config.check_graphs(input_ids.numel())
        rows = size // length
        return None if len(input_ids) <= rows else rows


def _parts(shapes: Mapping[str, Sequence[int]]) -> Iterator[list[str]]:
    """Their names, of as many at once as `PART_BYTES` hold."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        own = 4 * math.prod(shape)
        if names and size + own > PART_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += own
    if names:
        yield names

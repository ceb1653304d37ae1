"""`BasicTrainModule`: any model of torch, trained like a language model on one process or with DDP.

Loss = sum over the examples of the GLOBAL batch / their number, whatever the microbatch size or the
number of ranks. The number is known before the first forward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from toolkit.config.base import matching
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.materialize import prepare_engine
from toolkit.errors import ConfigError
from toolkit.models.init import canonical_parameters
from toolkit.train.config import TransformerTrainModuleConfig, check_basic
from toolkit.train.eval_sums import Batch, EvalSums
from toolkit.train.module import Metric
from toolkit.train.stepping import EngineTrainModule


class BasicTrainModule(EngineTrainModule):
    """Derive from it, and say what `forward` and `loss` are. Optimizer, schedule, clipping, skipped
    steps, accumulation, checkpoints, resuming and evaluation are there.

    A batch is what the data loader gives: `input_ids` int64 (rows, seq), and `label_mask` bool of
    the same shape. `model` has storage; its own initial values are where training starts.

    Raises ConfigError: the engine is neither `single` nor `ddp`, or an option of language models is
    set.
    """

    is_language_model = False

    def __init__(
        self,
        config: TransformerTrainModuleConfig,
        model: nn.Module,
        *,
        environment: TrainingEnvironment | None = None,
    ) -> None:
        super().__init__(config, environment)
        check_basic(config, self.environment.layout.name)
        kind = type(model)
        self.model_config = {"type": "module", "target": f"{kind.__module__}:{kind.__qualname__}"}
        parameters = canonical_parameters(model)
        for pattern in config.freeze:
            for name in matching("train_module.freeze", pattern, list(parameters)):
                parameters[name].requires_grad_(False)
        self.num_parameters = sum(p.numel() for p in parameters.values())
        self.trained_names = frozenset(n for n, p in parameters.items() if p.requires_grad)
        if not self.trained_names:
            raise ConfigError("nothing is left to train", key="train_module.freeze")
        config.optim.check_groups(parameters)
        self.engine = prepare_engine(
            self.environment, model, config.optim.build, max_grad_norm=config.max_grad_norm
        )
        self.begin_stepping()

    @property
    def model(self) -> nn.Module:
        """What `forward` calls, once for each batch: the model inside of the engine."""
        return self.engine.model

    def forward(self, batch: Batch) -> Any:
        """What the model makes of `batch`; default: `self.model(batch["input_ids"])`."""
        return self.model(batch["input_ids"])

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The loss of `outputs`, summed over the examples of `batch`, 0-d."""
        raise NotImplementedError("say what the loss is: derive from BasicTrainModule")

    def num_examples(self, batch: Batch) -> int | torch.Tensor:
        """Over how many `loss` sums up: the rows of `batch`, or what you return here."""
        return len(batch["input_ids"])

    def train_batch(self, batch: Batch) -> dict[str, Metric]:
        batch = self._on_device(batch)
        count = self._count(batch)
        if (group := self.environment.loss_group) is not None:
            dist.all_reduce(count, group=group)
        factor = self.environment.layout.grad_ranks / count.clamp(min=1)
        if (scaling := self._loss_scale) is not None:
            factor = scaling.scale * factor

        def loss_of(part: Batch) -> torch.Tensor:
            return self.loss(self.forward(part), part)

        total = self.engine.accumulate(self._microbatches(batch), loss_of, factor)
        if scaling is not None:
            self.engine.scale_gradients(1 / scaling.scale)
        self._loss = total / count
        return {"loss": Metric(self._loss, "sum")}

    @torch.no_grad()
    def eval_batch(self, batch: Batch) -> EvalSums:
        batch = self._on_device(batch)
        # Rows that only fill up the last batch have nothing in their mask.
        rows = batch["label_mask"].any(1) if "label_mask" in batch else None
        if rows is not None and not rows.all():
            batch = {key: tensor[rows] for key, tensor in batch.items()}
        if not len(batch["input_ids"]):
            zero = torch.zeros((), device=self.environment.device)
            return EvalSums(zero, zero)
        total = self.engine.evaluate(lambda: self.loss(self.forward(batch), batch))
        return EvalSums(total, self._count(batch))

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise ConfigError(f"{type(self).__name__} is no language model: it writes no samples")

    def flops_per_token(self, sequence_length: int) -> float:
        """Not known; a class that says it gets MFU."""
        return 0.0

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {**self.engine.state_tensors(), **self._buffers()}

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Running statistics, as of batch norms."""
        return {f"model.{name}": buffer for name, buffer in self.engine.module.named_buffers()}

    def _count(self, batch: Batch) -> torch.Tensor:
        """Made on the device: a number that is copied there would be waited for."""
        number, device = self.num_examples(batch), self.environment.device
        return (
            number.clone()
            if isinstance(number, torch.Tensor)
            else torch.full((), number, device=device)
        )

    def _on_device(self, batch: Batch) -> Batch:
        device = self.environment.device
        return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}

    def _microbatches(self, batch: Batch) -> Sequence[Batch]:
        size, (rows, length) = self.config.rank_microbatch_size, batch["input_ids"].shape
        if size is None:
            return [batch]
        if size < length:
            raise ConfigError(
                f"{size} is smaller than one row of {length} numbers; use a multiple of it",
                key="train_module.rank_microbatch_size",
            )
        parts = {key: tensor.split(size // length) for key, tensor in batch.items()}
        return [
            {key: part[number] for key, part in parts.items()}
            for number in range(-(-rows // (size // length)))
        ]

"""What differs between engines inside one optimizer step, behind one interface.

`prepare_engine` makes one per run: a `TorchEngine`, or a `DeepSpeedEngine` for ZeRO. Per step the
train module calls `microbatch` + `backward` for each microbatch and then `step`; checkpointing
reads and fills `state_tensors`.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from toolkit.distributed.environment import TrainingEnvironment

BuildOptimizer = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]


class StepOutcome(NamedTuple):
    """Result of one optimizer step, on the device, the same on every rank."""

    grad_norm: torch.Tensor
    """Global L2 norm before clipping, 0-d."""
    skipped: torch.Tensor
    """1.0 when the step was not applied because the norm was not finite, 0-d."""


class Engine(ABC):
    """One engine at work on one model."""

    model: nn.Module
    """What to call for a forward: the engine's wrapper, or the module itself."""
    module: nn.Module
    """The bare module, with canonical parameter names."""
    optimizer: torch.optim.Optimizer
    """Its `param_groups` carry the learning rates."""

    def __init__(self, environment: TrainingEnvironment, module: nn.Module) -> None:
        self.environment = environment
        self.module = module
        self.model = module

    @abstractmethod
    def microbatch(self, *, is_last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of one microbatch: gradients are exchanged on the last."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, factor: float | torch.Tensor) -> None:
        """Backward of `loss * factor`. A non-finite loss makes every gradient NaN, so that all
        ranks see it in the global norm and skip together."""

    @abstractmethod
    def step(self, max_grad_norm: float | None) -> StepOutcome:
        """Clip, update unless the norm is not finite, and clear the gradients."""

    @abstractmethod
    def gradient_shards(self) -> dict[str, torch.Tensor]:
        """This rank's part of each gradient, between the last backward and `step`; over
        `shard_group` the parts cover each gradient exactly once."""

    @abstractmethod
    def weight_shards(self) -> dict[str, torch.Tensor]:
        """This rank's part of each fp32 weight; over `shard_group` each is covered once."""

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """Ranks over which the shards are spread; None when this rank holds everything."""
        return None

    @abstractmethod
    def state_tensors(self) -> dict[str, torch.Tensor]:
        """`model.<name>` and `optim.<name>.<key>`: views into live state, canonical names, global
        shapes; saving reads them, loading fills them in place."""

    def state_filled(self) -> None:  # noqa: B027 (most engines have no copies)
        """Called after loading: bring every derived copy in line with the filled tensors."""

    @property
    def data_parallel_size(self) -> int:
        """Ranks whose gradients are averaged."""
        return self.environment.world_size

    def autocast(self) -> contextlib.AbstractContextManager:
        """Compute precision of a forward over fp32 weights."""
        return contextlib.nullcontext()


def reset_state(optimizer: torch.optim.Optimizer, parameters: list) -> None:
    """Drop the gradients and zero the state of `parameters`, step counters included."""
    for parameter in parameters:
        parameter.grad = None
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor):
                value.zero_()

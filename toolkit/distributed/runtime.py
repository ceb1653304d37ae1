"""What differs between engines inside one optimizer step, behind one interface.

`EngineRuntime` is made once per run by `prepare_runtime`. The train module calls, per step,
`microbatch` + `backward` for each microbatch and then `step`; checkpointing reads and fills
`state_tensors`. The optimizer always works on plain local tensors: FSDP2's DTensors are unwrapped
once, so the fused kernels take gradient clipping and the skip decision in the same pass, without
DTensor dispatch and without a host sync.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from toolkit.distributed.accelerator import build_accelerator
from toolkit.distributed.environment import TrainingEnvironment

BuildOptimizer = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]


class StepOutcome(NamedTuple):
    """Result of one optimizer step, on the device, the same on every rank."""

    grad_norm: torch.Tensor
    """Global L2 norm before clipping, 0-d."""
    skipped: torch.Tensor
    """1.0 when the step was not applied because the norm was not finite, 0-d."""


class EngineRuntime(ABC):
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


class PlainRuntime(EngineRuntime):
    """`single`, `ddp`, `fsdp` and `hsdp`: torch optimizers over local tensors."""

    def __init__(
        self,
        environment: TrainingEnvironment,
        module: nn.Module,
        build_optimizer: BuildOptimizer,
    ) -> None:
        super().__init__(environment, module)
        from torch.distributed.tensor import DTensor

        self._named = dict(module.named_parameters())
        self._is_sharded = any(isinstance(p, DTensor) for p in self._named.values())
        self._local = {name: _as_local(p) for name, p in self._named.items()}
        self.optimizer = build_optimizer(self._local)
        self._accelerator = build_accelerator(environment)
        self.model = self._prepare()
        self._trainable = [
            (p, self._local[name]) for name, p in self._named.items() if p.requires_grad
        ]
        self._bf16 = environment.engine.precision == "bf16"
        self._rebound = not self._is_sharded
        first: Any = next(iter(self._named.values()))
        self._mesh = first.device_mesh if self._is_sharded else None

    def _prepare(self) -> nn.Module:
        from accelerate.utils import DistributedDataParallelKwargs

        own_lists = [list(group["params"]) for group in self.optimizer.param_groups]
        if self.environment.engine.name == "ddp":
            self._accelerator.ddp_handler = DistributedDataParallelKwargs(
                gradient_as_bucket_view=True
            )
        model, _ = self._accelerator.prepare(self.module, self.optimizer)
        # Accelerate points the optimizer at the model's DTensors; ours are their local tensors.
        for group, own in zip(self.optimizer.param_groups, own_lists, strict=True):
            group["params"] = own
        return model

    def autocast(self) -> contextlib.AbstractContextManager:
        if self._bf16 and not self._is_sharded:
            return torch.autocast(self.environment.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def microbatch(self, *, is_last: bool) -> contextlib.AbstractContextManager:
        name = self.environment.engine.name
        if name == "ddp" and not is_last:
            return self.model.no_sync()  # type: ignore[operator]
        if self._is_sharded:
            # Reduce-scatter every microbatch (gradients stay sharded); HSDP's second reduction,
            # over the replicas, waits for the last.
            self.module.set_is_last_backward(is_last)  # type: ignore[operator]
            if name == "hsdp":
                self.module.set_requires_all_reduce(is_last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor, factor: float | torch.Tensor) -> None:
        # The factor itself for a finite loss; 0 * inf and 0 * NaN are NaN.
        loss.backward(loss.detach() * 0.0 + factor)

    def step(self, max_grad_norm: float | None) -> StepOutcome:
        self._bind_local_gradients()
        norm = self._global_norm()
        skipped = (norm - norm).isnan().float()  # a third of isfinite's kernels
        optimizer: Any = self.optimizer
        # The fused kernels divide by grad_scale and leave everything alone where found_inf is 1.
        optimizer.found_inf = skipped
        if max_grad_norm is not None:
            optimizer.grad_scale = ((norm + 1e-6) / max_grad_norm).clamp(min=1.0)
        optimizer.step()
        optimizer.found_inf = optimizer.grad_scale = None
        for parameter, local in self._trainable:
            parameter.grad = local.grad = None
        return StepOutcome(norm, skipped)

    def gradient_shards(self) -> dict[str, torch.Tensor]:
        self._bind_local_gradients()
        return {n: p.grad for n, p in self._local.items() if p.grad is not None}

    def weight_shards(self) -> dict[str, torch.Tensor]:
        return {name: _as_local(p).detach() for name, p in self._named.items()}

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        return self._mesh.get_group("dp_shard") if self._mesh is not None else None

    def state_tensors(self) -> dict[str, torch.Tensor]:
        if not self.optimizer.state:
            self._create_optimizer_state()
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._named.items():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(self._local[name], {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optim.{name}.{key}"] = _like(value, parameter)
        return tensors

    def _bind_local_gradients(self) -> None:
        if not self._is_sharded:
            return
        for parameter, local in self._trainable:
            if not self._rebound:
                # FSDP2 may move a shard into padded storage in the first forward.
                local.data = _as_local(parameter).data
            grad: Any = parameter.grad
            local.grad = None if grad is None else grad.to_local()
        self._rebound = True

    def _global_norm(self) -> torch.Tensor:
        grads = [local.grad for _, local in self._trainable if local.grad is not None]
        grads = [grad for grad in grads if grad.numel()]
        if not self._is_sharded:
            return torch.nn.utils.get_total_norm(grads)
        device = self.environment.device
        total = torch.zeros((), device=device)
        if grads:
            norms = torch._foreach_norm(grads)
            total = torch.stack(norms).square().sum().to(device)
        dist.all_reduce(total, group=self.shard_group)
        return total.sqrt()

    def _create_optimizer_state(self) -> None:
        """Make the state tensors exist before loading, by a step of rate zero on zero gradients."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for _, local in self._trainable:
            local.grad = torch.zeros_like(local)
        self.optimizer.step()
        reset_state(self.optimizer, [local for _, local in self._trainable])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def prepare_runtime(
    environment: TrainingEnvironment,
    module: nn.Module,
    build_optimizer: BuildOptimizer,
    *,
    max_grad_norm: float | None,
) -> EngineRuntime:
    """Hand a materialised `module` and its optimizer to Accelerate.

    `build_optimizer` gets trainable and frozen parameters by canonical name.
    """
    if environment.engine.zero_stage:
        from toolkit.distributed.zero import ZeroRuntime

        return ZeroRuntime(environment, module, build_optimizer, max_grad_norm=max_grad_norm)
    return PlainRuntime(environment, module, build_optimizer)


def reset_state(optimizer: torch.optim.Optimizer, parameters: list) -> None:
    """Drop the gradients and zero the state of `parameters`, step counters included."""
    for parameter in parameters:
        parameter.grad = None
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor):
                value.zero_()


def _as_local(parameter: Any) -> nn.Parameter:
    if hasattr(parameter, "to_local"):
        return nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
    return parameter


def _like(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """`value`, a local tensor, with the global shape and placement of `parameter`."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

"""`single`, `ddp`, `fsdp` and `hsdp`: torch optimizers over local tensors.

FSDP2's DTensors are unwrapped once, so the fused kernels take gradient clipping and the skip
decision in the same pass, without DTensor dispatch and without a host sync.
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.distributed.accelerator import build_accelerator, ddp_options
from toolkit.distributed.engine import BuildOptimizer, Engine, StepOutcome, reset_state
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.materialize import flattened_shapes, local_runs
from toolkit.distributed.shards import FlatShard
from toolkit.models.init import canonical_parameters


class TorchEngine(Engine):
    """`single`, `ddp`, `fsdp` and `hsdp`: torch optimizers over local tensors."""

    def __init__(
        self,
        environment: TrainingEnvironment,
        module: nn.Module,
        build_optimizer: BuildOptimizer,
    ) -> None:
        super().__init__(environment, module)
        from torch.distributed.tensor import DTensor

        self._named = canonical_parameters(module)
        self._flattened = flattened_shapes(module)
        self._is_sharded = any(isinstance(p, DTensor) for p in self._named.values())
        self._local = {name: _as_local(p) for name, p in self._named.items()}
        self.optimizer = build_optimizer(self._local)
        self._accelerator = build_accelerator(environment)
        self.model = self._prepare()
        self._trainable = [
            (p, self._local[name]) for name, p in self._named.items() if p.requires_grad
        ]
        self._optimizer_device = next(iter(self._local.values())).device
        self._bf16 = environment.layout.precision == "bf16"
        self._rebound = not self._is_sharded
        first: Any = next(iter(self._named.values()))
        self._mesh = first.device_mesh if self._is_sharded else None
        # Before the first step: SGD's kernel would write its momentum there, and a skipped first
        # step would leave it unwritten.
        self._create_optimizer_state()

    def _prepare(self) -> nn.Module:
        own_lists = [list(group["params"]) for group in self.optimizer.param_groups]
        self._accelerator.ddp_handler = ddp_options()
        model, _ = self._accelerator.prepare(self.module, self.optimizer)
        # Accelerate points the optimizer at the model's DTensors; ours are their local tensors.
        for group, own in zip(self.optimizer.param_groups, own_lists, strict=True):
            group["params"] = own
        if isinstance(model, DistributedDataParallel):
            self._settle_buckets(model)
        return model

    def _settle_buckets(self, model: nn.Module) -> None:
        """Let DDP see a backward before the first real one, from the last parameter to the first.

        After the first it lays its buckets out anew, in the order in which gradients came. Where
        more than two ranks add up, another layout rounds otherwise, and the first step of a resumed
        run would not be bit-equal to that of a run that goes on.
        """
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        zero_from_all = lambda _: torch.stack([p.sum() for p in trainable]).sum() * 0.0  # noqa: E731
        before = vars(self.module).get("forward")
        self.module.forward = zero_from_all
        try:
            # On GPUs, where DDP has device_ids, it moves its inputs and fails without any.
            model(torch.zeros((), device=self.environment.device)).backward()
        finally:
            del self.module.forward
            if before is not None:
                self.module.forward = before
            for parameter in trainable:
                parameter.grad = None

    def autocast(self) -> contextlib.AbstractContextManager:
        if self._bf16 and not self._is_sharded:
            return torch.autocast(self.environment.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def microbatch(self, *, is_last: bool) -> contextlib.AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            return self.model.no_sync()
        if self._is_sharded:
            # Reduce-scatter every microbatch (gradients stay sharded); HSDP's second reduction,
            # over the replicas, waits for the last.
            self.module.set_is_last_backward(is_last)  # type: ignore[operator]
            if self.environment.layout.dp_replicate > 1:
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
        # Offloaded weights are stepped on the CPU, which must wait for the two.
        optimizer.found_inf = skipped.to(self._optimizer_device)
        if max_grad_norm is not None:
            scale = ((norm + 1e-6) / max_grad_norm).clamp(min=1.0)
            optimizer.grad_scale = scale.to(self._optimizer_device)
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
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._named.items():
            tensors[f"model.{name}"] = self._stored(name, parameter.detach())
            for key, value in self.optimizer.state.get(self._local[name], {}).items():
                if isinstance(value, torch.Tensor):
                    value = _like(value, parameter)
                    tensors[f"optim.{name}.{key}"] = self._stored(name, value)
        return tensors

    def _stored(self, name: str, tensor: Any) -> torch.Tensor:
        """The tensor in the shape that checkpoints know."""
        shape = self._flattened.get(name)
        if shape is None or tensor.dim() == 0:
            return tensor
        ((local, start),) = list(local_runs(tensor)) or [(tensor.to_local().view(-1), 0)]
        return FlatShard(local, shape=shape, start=start)

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
            norm = torch.nn.utils.get_total_norm(grads)
            if isinstance(self.model, DistributedDataParallel):
                # Each rank has added up by itself, on another machine perhaps with more threads:
                # one bit less and it would clip, and drift, otherwise than its twins.
                dist.broadcast(norm, src=0)
            return norm
        device = self.environment.device
        total = torch.zeros((), device=device)
        if grads:
            norms = torch._foreach_norm(grads)
            total = torch.stack(norms).square().sum().to(device)
        dist.all_reduce(total, group=self.shard_group)
        if self.environment.layout.dp_replicate > 1:
            # The same between replicas, each of which has added up its shards.
            assert self._mesh is not None, "sharded"
            dist.broadcast(total, group=self._mesh.get_group("dp_replicate"), group_src=0)
        return total.sqrt()

    def _create_optimizer_state(self) -> None:
        """Make the state tensors exist, all zero, by a step of rate zero on zero gradients."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        for _, local in self._trainable:
            local.grad = torch.zeros_like(local)
        self.optimizer.step()
        reset_state(self.optimizer, [local for _, local in self._trainable])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _as_local(parameter: Any) -> nn.Parameter:
    if hasattr(parameter, "to_local"):
        return nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
    return parameter


def _like(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """`value`, a local tensor, with the global shape and placement of `parameter`; a view.

    Not `DTensor.from_local`, which copies a tensor to the mesh's device: under CPU offload loading
    would fill the copy.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return value
    assert value.dtype == parameter.dtype, "the specification names the type"
    return DTensor(value, parameter._spec, requires_grad=False)

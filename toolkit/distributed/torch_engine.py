"""`single`, `ddp`, `fsdp` and `hsdp`: torch optimizers over local tensors.

FSDP2's DTensors are unwrapped once, so the fused kernels take gradient clipping and the skip
decision in the same pass, without DTensor dispatch and without a host sync.
"""

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.nn.parallel import DistributedDataParallel

from toolkit.distributed.accelerator import build_accelerator, ddp_options
from toolkit.distributed.devices import compute_dtype
from toolkit.distributed.engine import (
    BuildOptimizer,
    Engine,
    Refuses,
    StepOutcome,
    check_whole_parameters,
    create_state,
    state_of,
)
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.fully_sharded import free_after_backward
from toolkit.distributed.shards import ShardSpec, local_boxes, local_tensor, stored_tensor
from toolkit.distributed.unit_weights import UnitWeights
from toolkit.distributed.whole_matrices import Held
from toolkit.models.kernels import fused_steps_are_told
from toolkit.optim.base import traits_of


class TorchEngine(Engine):
    def __init__(
        self,
        environment: TrainingEnvironment,
        module: nn.Module,
        shards: Mapping[str, ShardSpec],
        build_optimizer: BuildOptimizer,
    ) -> None:
        super().__init__(environment, module, shards)
        layout = environment.layout
        config: Any = getattr(module, "config", None)
        self._unit_weights: UnitWeights | None = None
        if getattr(config, "is_normalized", False):
            self._unit_weights = UnitWeights(self._named, shards, environment)
            self._unit_weights.restore()
        self._is_sharded = any(isinstance(p, DTensor) for p in self._named.values())
        self._local = {
            name: nn.Parameter(local_tensor(p).detach(), requires_grad=p.requires_grad)
            if isinstance(p, DTensor)
            else p
            for name, p in self._named.items()
        }
        self._trainable = {name: p for name, p in self._named.items() if p.requires_grad}
        self.optimizer = build_optimizer(self._local)
        is_cut = self._is_sharded and environment.weight_group is not None
        check_whole_parameters(self.optimizer, are_cut=is_cut, engine=layout.description)
        self._partial: dict[tuple[str, ...], list[str]] = {}
        for name in self._trainable:
            if axes := shards[name].partial_over:
                self._partial.setdefault(axes, []).append(name)
        self._optimizer_device = next(iter(self._local.values())).device
        is_told = fused_steps_are_told(self._optimizer_device)
        self._takes_found_inf = is_told and traits_of(self.optimizer).takes_found_inf
        self.model = self._prepare()
        self._give_whole_matrices()
        self._rebound = not self._is_sharded
        # Before the first step: SGD's kernel would write its momentum there, and a skipped first
        # step would leave it unwritten.
        members = [group["params"] for group in self.optimizer.param_groups]
        self._stand_ins = create_state(self.optimizer, members)
        check_whole_parameters(self.optimizer, are_cut=is_cut, engine=layout.description)

    def _prepare(self) -> nn.Module:
        own_lists = [list(group["params"]) for group in self.optimizer.param_groups]
        state = self.optimizer.state
        if self._is_sharded:  # Accelerate would look for these among the model's DTensors
            self.optimizer.state = defaultdict(dict)  # which some make at once (Adagrad)
            for group in self.optimizer.param_groups:
                group["params"] = []
        accelerator = build_accelerator(self.environment)
        accelerator.ddp_handler = ddp_options()
        model, _ = accelerator.prepare(self.module, self.optimizer)
        for group, own in zip(self.optimizer.param_groups, own_lists, strict=True):
            group["params"] = own
        if self._is_sharded:
            self.optimizer.state = state
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

    def _autocast(self) -> contextlib.AbstractContextManager:
        dtype = compute_dtype(self.environment.layout.precision)
        if dtype is not None and not self._is_sharded:
            return torch.autocast(self.environment.device.type, dtype=dtype)
        return contextlib.nullcontext()

    def _exchanging(self, *, is_last: bool) -> contextlib.AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel) and not is_last:
            return self.model.no_sync()
        if self._is_sharded:
            # Reduce-scatter every microbatch (gradients stay sharded); HSDP's second reduction,
            # over the replicas, waits for the last.
            fsdp: Any = self.module
            fsdp.set_is_last_backward(is_last)
            free_after_backward(fsdp, frees=is_last)
            if self.environment.layout.dp_replicate > 1:
                fsdp.set_requires_all_reduce(is_last)
        return contextlib.nullcontext()

    def _backward(self, loss: torch.Tensor, factor: float | torch.Tensor) -> None:
        # The factor itself for a finite loss; 0 * inf and 0 * NaN are NaN.
        loss.backward(loss.detach() * 0.0 + factor)

    def step(self, max_grad_norm: float | None, refuses: Refuses | None = None) -> StepOutcome:
        gradients = self.gradient_shards()
        norm = self._global_norm(gradients)
        skipped = (norm - norm).isnan()  # a third of isfinite's kernels
        if refuses is not None:
            skipped |= refuses(norm)
        skipped = skipped.float()
        scale = None
        if max_grad_norm is not None:
            scale = ((norm + 1e-6) / max_grad_norm).clamp(min=1.0).to(self._optimizer_device)
        optimizer: Any = self.optimizer
        if self._takes_found_inf:
            # The kernel divides by grad_scale and leaves everything alone where found_inf is 1.
            # Offloaded weights are stepped on the CPU, which must wait for the two.
            optimizer.found_inf = skipped.to(self._optimizer_device)
            optimizer.grad_scale = scale
            optimizer.step()
            optimizer.found_inf = optimizer.grad_scale = None
        elif not skipped.item():  # waits for the device: such an optimizer cannot be told later
            if scale is not None:
                torch._foreach_div_(list(gradients.values()), scale)
            self._give_up_stand_ins([t for t in self._stand_ins if t.grad is not None])
            optimizer.step()
        for name, parameter in self._trainable.items():
            parameter.grad = self._local[name].grad = None
        if self._unit_weights is not None:
            self._unit_weights.restore()
        self.weights_changed()
        return StepOutcome(norm, skipped)

    def scale_gradients(self, factor: torch.Tensor) -> None:
        gradients = list(self.gradient_shards().values())
        torch._foreach_mul_(gradients, factor.to(self._optimizer_device))

    def gradient_shards(self) -> dict[str, torch.Tensor]:
        self._bind_local_gradients()
        return {n: p.grad for n, p in self._local.items() if p.grad is not None}

    def weight_shards(self) -> dict[str, torch.Tensor]:
        return {name: local_tensor(p.detach()) for name, p in self._named.items()}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._named.items():
            spec = self.shards[name]
            local, weight = self._local[name], parameter.detach()
            state = state_of(self.optimizer, local)
            if self.keeps_average and state:
                weight = _like(state.pop("x"), parameter)
            tensors[f"model.{name}"] = stored_tensor(weight, spec)
            for key, value in state.items():
                is_alike = value.shape == local.shape
                stored = stored_tensor(_like(value, parameter), spec) if is_alike else value
                tensors[f"optim.{name}.{key}"] = stored
        return tensors | self._kept_of_rows()

    def state_filled(self) -> None:
        self._bind_local_weights()
        if self._unit_weights is not None:
            self._unit_weights.restore()
        super().state_filled()
        for module in self.module.modules():
            # The root keeps what it has gathered, from a forward to the next backward.
            if isinstance(module, FSDPModule):
                module.reshard()
        self.weights_changed()  # it looks at shards

    def _held(self) -> dict[torch.Tensor, list[Held]]:
        specs = {name: self.shards[name] for name in self._trainable}
        return {
            self._local[name]: [Held(name, spec.shape, local_boxes(self._named[name], spec))]
            for name, spec in specs.items()
        }

    def _bind_local_gradients(self) -> None:
        if not self._is_sharded:
            return
        if not self._rebound:
            self._bind_local_weights()
        for name, parameter in self._trainable.items():
            grad = parameter.grad
            self._local[name].grad = None if grad is None else grad.to_local()
        self._rebound = True

    def _bind_local_weights(self) -> None:
        """FSDP2 may move a shard into padded storage in the first forward."""
        for name, parameter in self._trainable.items() if self._is_sharded else ():
            self._local[name].data = local_tensor(parameter.detach())

    def _complete_gradients(self) -> None:
        gradients = self.gradient_shards() if self._partial else {}
        for axes, names in self._partial.items():
            found = [name for name in names if name in gradients]
            parts = [gradients[name] for name in found]
            places = [_place_among_ranges(self.shards[name]) for name in found]
            sizes = [part.numel() * number for part, (_, number) in zip(parts, places, strict=True)]
            flat = parts[0].new_zeros(sum(sizes))
            sums = [
                room.view(number, *part.shape)[place]
                for room, part, (place, number) in zip(
                    flat.split(sizes), parts, places, strict=True
                )
            ]
            torch._foreach_copy_(sums, parts)
            dist.all_reduce(flat, group=self.environment.group(*axes))
            if self.environment.layout.tp > 2:  # sums of more than two depend on their order
                self._as_first_replica(flat)
            torch._foreach_copy_(parts, sums)

    def _global_norm(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        own = {name: gradient for name, gradient in gradients.items() if gradient.numel()}
        if not self._is_sharded:
            norm = torch.nn.utils.get_total_norm(list(own.values()))
            return self._as_first_replica(norm)
        device = self.environment.device
        total = torch.zeros((), device=device)
        if own:
            squares = torch.stack(torch._foreach_norm(list(own.values()))).square()
            copies = [self.shards[name].copies for name in own]
            if max(copies) > 1:
                squares /= squares.new_tensor(copies)
            total = squares.sum().to(device)
        if (group := self.environment.weight_group) is not None:
            dist.all_reduce(total, group=group)
        return self._as_first_replica(total).sqrt()

    def _as_first_replica(self, value: torch.Tensor) -> torch.Tensor:
        """Each replica has added up by itself, on another machine perhaps with more threads: one
        bit less and it would clip, and drift, otherwise than its twins."""
        axes = ("dp_replicate",) if self._is_sharded else ("dp_replicate", "cp")
        if (group := self.environment.group(*axes)) is not None:
            dist.broadcast(value, group=group, group_src=0)
        return value


def _place_among_ranges(spec: ShardSpec) -> tuple[int, int]:
    """Which of how many ranges a rank has, of those that ranks have several copies of: a sum over
    all ranks adds only like to like where each range has a room of its own."""
    if spec.dim is None:
        return 0, 1
    return spec.start // spec.length, spec.shape[spec.dim] // spec.length


def _like(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """`value`, a local tensor, with the global shape and placement of `parameter`; a view.

    Not `DTensor.from_local`, which copies a tensor to the mesh's device: under CPU offload loading
    would fill the copy.
    """
    if not isinstance(parameter, DTensor) or value.dim() == 0:
        return value
    spec = parameter._spec
    if value.dtype != parameter.dtype:  # the specification names the type
        assert spec.tensor_meta is not None
        meta = spec.tensor_meta._replace(dtype=value.dtype)
        spec = DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta)
    return DTensor(value, spec, requires_grad=False)

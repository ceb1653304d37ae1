"""ZeRO-1/2/3 through DeepSpeed, and its flat state seen as slices of named tensors.

DeepSpeed keeps fp32 weights and moments as flat slices: under ZeRO-1/2 a slice of each group of
parameters, under ZeRO-3 a slice of each parameter. `state_tensors` describes each as a
`LocalShard`: "elements [start, start + n) of the row-major tensor NAME of SHAPE".
"""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from toolkit.distributed.accelerator import build_accelerator, without_launcher_variables
from toolkit.distributed.engine import (
    BuildOptimizer,
    Engine,
    Refuses,
    StepOutcome,
    check_whole_parameters,
    create_state,
)
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.shards import LocalShard, ShardSpec, flat_range_boxes
from toolkit.distributed.whole_matrices import Held
from toolkit.errors import ConfigError
from toolkit.optim.base import traits_of


class _Slice(NamedTuple):
    """What this rank owns of a parameter."""

    flat: torch.Tensor
    """The fp32 tensor that it lies in, which is the key of its optimizer state."""
    offset: int
    """In `flat`."""
    start: int
    """In the flattened parameter."""
    length: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.detach().narrow(0, self.offset, self.length)


class DeepSpeedEngine(Engine):
    """`zero1`, `zero2` and `zero3`: DeepSpeed's engine, driven one microbatch at a time."""

    def __init__(
        self,
        environment: TrainingEnvironment,
        module: nn.Module,
        shards: Mapping[str, ShardSpec],
        build_optimizer: BuildOptimizer,
        *,
        max_grad_norm: float | None,
    ) -> None:
        super().__init__(environment, module, shards)
        self._stage = environment.layout.zero_stage
        optimizer = build_optimizer(self._named)
        check_whole_parameters(optimizer, are_cut=True, engine=environment.layout.name)
        if traits_of(optimizer).takes_whole_matrices and not any(
            "is_matrix" in group for group in optimizer.param_groups
        ):
            raise ConfigError(
                f"train_module.optim: {environment.layout.name} makes each group one flat tensor, "
                f"and {type(optimizer).__name__} does not say by 'is_matrix' in which ones its "
                "matrices are; use ddp or fsdp, or let it put them into groups of their own"
            )
        accelerator = build_accelerator(environment, max_grad_norm=max_grad_norm)
        with without_launcher_variables():
            self._engine: Any = accelerator.prepare(module, optimizer)[0]
        self.model = self._engine
        self._zero: Any = self._engine.optimizer
        self.optimizer = self._zero.optimizer
        self._give_whole_matrices()
        self._takes_found_inf = traits_of(optimizer).takes_found_inf
        self._refuses: Refuses | None = None
        self.optimizer.register_step_pre_hook(self._ask)
        self._nan = torch.tensor(float("nan"), device=environment.device)
        self._one = torch.tensor(1.0, device=environment.device)

    def _exchanging(self, *, is_last: bool) -> contextlib.AbstractContextManager:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def _backward(self, loss: torch.Tensor, factor: float | torch.Tensor) -> None:
        poison = torch.where(torch.isfinite(loss.detach()), self._one, self._nan)
        self._engine.backward(loss * (poison * factor), scale_wrt_gas=False)

    def step(self, max_grad_norm: float | None, refuses: Refuses | None = None) -> StepOutcome:
        self._refuses, self._refused = refuses, torch.zeros_like(self._one)
        if refuses is not None and not self._takes_found_inf:
            raise ConfigError(
                f"train_module.optim: {type(self.optimizer).__name__} cannot leave out a step "
                f"under {self.environment.layout.name}; use ddp, fsdp or hsdp"
            )
        self._engine.step()  # clips, and skips by itself
        norm = self._global_norm()
        return StepOutcome(norm, self._one if self._zero.overflow else self._refused)

    def _global_norm(self) -> torch.Tensor:
        norm = self._zero._global_grad_norm
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.environment.device)
        return norm.detach().clone()

    def _ask(self, optimizer: Any, *_: Any) -> None:
        """Before each flat group is stepped, when the norm is known: whether the step is refused,
        told to the optimizer's kernel."""
        if self._refuses is not None:
            self._refused = self._refuses(self._global_norm()).float()
            parameter = next(p for group in optimizer.param_groups for p in group["params"])
            optimizer.found_inf, optimizer.grad_scale = self._refused.to(parameter.device), None
        if not self._takes_found_inf:
            self._give_up_stand_ins(self._stand_ins)

    def scale_gradients(self, factor: torch.Tensor) -> None:
        raise NotImplementedError("fp16 is refused under ZeRO")

    def gradient_shards(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_local_grad

        shards = {}
        for name, parameter in self._named.items():
            if not parameter.requires_grad:
                continue
            if self._stage == 3:
                shards[name] = safe_get_local_grad(parameter)
            elif parameter._hp_mapping is not None:
                index = parameter._index_in_param_group
                shards[name] = parameter._hp_mapping.get_lp_grad_fragment(index)
        return {name: shard for name, shard in shards.items() if shard is not None}

    def weight_shards(self) -> dict[str, torch.Tensor]:
        shards = {}
        for name, parameter in self._named.items():
            if not parameter.requires_grad:
                frozen = self._frozen(name, parameter)
                if isinstance(frozen, LocalShard):
                    shards[name] = frozen.local
                elif self.environment.rank == 0:  # every rank holds the whole
                    shards[name] = frozen
            elif (own := self._slice(parameter)) is not None:
                shards[name] = own.of(own.flat)
        return shards

    def state_tensors(self) -> dict[str, torch.Tensor]:
        self._ensure_optimizer_state()
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._named.items():
            if not parameter.requires_grad:
                tensors[f"model.{name}"] = self._frozen(name, parameter)
                continue
            if (own := self._slice(parameter)) is None:
                continue
            kept = dict(self.optimizer.state[own.flat])
            weight = kept.pop("x") if self.keeps_average else own.flat
            state = {f"optim.{name}.{k}": v for k, v in kept.items()}
            for key, value in ({f"model.{name}": weight} | state).items():
                if isinstance(value, torch.Tensor):
                    tensors[key] = value if value.dim() == 0 else self._shard(name, own, value)
        return tensors | self._kept_of_rows()

    def state_filled(self) -> None:
        """Copy the fp32 slices into the parameters the forward uses, whole again on every rank."""
        super().state_filled()
        if self._stage == 3:
            self._refresh_partitions()
            return
        from deepspeed.runtime.utils import all_gather_dp_groups

        zero = self._zero
        for lp_slices, fp32 in zip(
            zero.parallel_partitioned_bit16_groups,
            zero.single_partition_of_fp32_groups,
            strict=True,
        ):
            lp_slices[dist.get_rank(group=zero.dp_process_group)].data.copy_(fp32.data)
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    def _refresh_partitions(self) -> None:
        import deepspeed

        for parameter in self._named.values():
            own = self._slice(parameter) if parameter.requires_grad else None
            if own is not None:
                parameter.ds_tensor.data[: own.length].copy_(own.of(own.flat.data))
        # Small parameters are kept whole on every rank ("persistent"); they still hold old values.
        persistent = [p for p in self._named.values() if getattr(p, "ds_persist", False)]
        for parameter in persistent:
            parameter.partition()
        if persistent:
            with deepspeed.zero.GatheredParameters(persistent):
                pass
            persistent[0].all_gather(persistent)

    def _slice(self, parameter: Any) -> _Slice | None:
        """What this rank owns of a trained parameter; None where that is nothing."""
        if self._stage == 3:
            group, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = self.environment.rank * parameter.ds_tensor.ds_numel
            length = max(0, min(length, parameter.ds_numel - start))
            return _Slice(self._flats[group], offset, start, length) if length else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._flats[mapping.param_group_index]
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        return _Slice(flat, hp.start, lp.start, lp.numel)

    def _held(self) -> dict[torch.Tensor, list[Held]]:
        # Every rank names all parameters of a group.
        zero, names = self._zero, {id(p): name for name, p in self._named.items()}
        groups = zero.fp16_groups if self._stage == 3 else zero.bit16_groups
        held: dict[torch.Tensor, list[Held]] = {}
        for flat, group in zip(self._flats, groups, strict=True):
            held[flat] = []
            for parameter in group:
                name, own, boxes = names[id(parameter)], self._slice(parameter), []
                shape = self.shards[name].shape
                if own is not None:
                    found = flat_range_boxes(shape, own.start, own.length)
                    boxes = [b._replace(position=b.position + own.offset) for b in found]
                held[flat].append(Held(name, shape, boxes))
        return held

    @property
    def _flats(self) -> list[torch.Tensor]:
        """The fp32 tensors that the optimizer steps."""
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _shard(self, name: str, own: _Slice, flat: torch.Tensor) -> LocalShard:
        return LocalShard.flat(own.of(flat), shape=self.shards[name].shape, start=own.start)

    def _frozen(self, name: str, parameter: Any) -> torch.Tensor:
        if self._stage != 3:
            return parameter.detach()
        partition = parameter.ds_tensor
        start = self.environment.rank * partition.ds_numel
        length = max(0, min(partition.ds_numel, parameter.ds_numel - start))
        flat = partition.data.view(-1)
        return self._shard(name, _Slice(flat, 0, start, length), flat)

    def _ensure_optimizer_state(self) -> None:
        """Make the moments exist before loading, where no step has made them."""
        groups = self.optimizer.param_groups
        owners = self._zero.sub_group_to_group_id if self._stage == 3 else range(len(groups))
        members: list[list[torch.Tensor]] = [[] for _ in groups]
        for number, flat in enumerate(self._flats):
            index = owners[number]
            # SGD without momentum keeps none; one group may have it and another not.
            keeps_state = groups[index].get("momentum") != 0
            if flat.numel() and keeps_state and not self.optimizer.state.get(flat):
                members[index].append(flat)
        if any(members):
            self._stand_ins += create_state(self.optimizer, members)

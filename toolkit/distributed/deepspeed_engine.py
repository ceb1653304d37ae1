"""ZeRO-1/2/3 through DeepSpeed, and its flat state seen as pieces of named tensors.

DeepSpeed keeps fp32 weights and moments as flat slices: under ZeRO-1/2 a slice of each group of
parameters, under ZeRO-3 a slice of each parameter. `state_tensors` describes each slice as a
`FlatShard`: "elements [start, start + n) of the row-major tensor NAME of SHAPE".
"""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from toolkit.distributed.accelerator import build_accelerator, without_launcher_variables
from toolkit.distributed.engine import BuildOptimizer, Engine, StepOutcome, reset_state
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.shards import FlatShard
from toolkit.models.init import canonical_parameters


class DeepSpeedEngine(Engine):
    """DeepSpeed's engine, driven one microbatch at a time."""

    def __init__(
        self,
        environment: TrainingEnvironment,
        module: nn.Module,
        build_optimizer: BuildOptimizer,
        *,
        max_grad_norm: float | None,
    ) -> None:
        super().__init__(environment, module)
        self._named = canonical_parameters(module)
        self._stage = environment.layout.zero_stage
        optimizer = build_optimizer(self._named)
        accelerator = build_accelerator(environment, max_grad_norm=max_grad_norm)
        with without_launcher_variables():
            self._engine: Any = accelerator.prepare(module, optimizer)[0]
        self.model = self._engine
        self._zero: Any = self._engine.optimizer
        self.optimizer = self._zero.optimizer
        self._nan = torch.tensor(float("nan"), device=environment.device)
        self._one = torch.tensor(1.0, device=environment.device)

    def microbatch(self, *, is_last: bool) -> contextlib.AbstractContextManager:
        self._engine.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor, factor: float | torch.Tensor) -> None:
        poison = torch.where(torch.isfinite(loss.detach()), self._one, self._nan)
        self._engine.backward(loss * (poison * factor), scale_wrt_gas=False)

    def step(self, max_grad_norm: float | None) -> StepOutcome:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.environment.device)
        skipped = self._one if self._zero.overflow else torch.zeros_like(self._one)
        return StepOutcome(norm.detach().clone(), skipped)

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.environment.world_size > 1 else None

    def gradient_shards(self) -> dict[str, torch.Tensor]:
        shards = {}
        for name, parameter in self._named.items():
            if not parameter.requires_grad:
                continue
            if self._stage == 3:
                from deepspeed.utils import safe_get_local_grad

                shards[name] = safe_get_local_grad(parameter)
            elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
                index = parameter._index_in_param_group  # type: ignore[attr-defined]
                shards[name] = parameter._hp_mapping.get_lp_grad_fragment(index)  # type: ignore[attr-defined]
        return {name: shard for name, shard in shards.items() if shard is not None}

    def weight_shards(self) -> dict[str, torch.Tensor]:
        shards = {}
        for name, parameter in self._named.items():
            if not parameter.requires_grad:
                frozen = self._frozen(parameter)
                if isinstance(frozen, FlatShard):
                    shards[name] = frozen.local
                elif self.environment.rank == 0:  # every rank holds the whole
                    shards[name] = frozen
            elif (piece := self._piece(parameter)) is not None:
                flat, offset, _, numel = piece
                shards[name] = flat.detach().narrow(0, offset, numel)
        return shards

    def state_tensors(self) -> dict[str, torch.Tensor]:
        self._ensure_optimizer_state()
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._named.items():
            if not parameter.requires_grad:
                tensors[f"model.{name}"] = self._frozen(parameter)
                continue
            piece = self._piece(parameter)
            if piece is None:
                continue
            flat, offset, start, numel = piece
            shape = self._shape(parameter)
            tensors[f"model.{name}"] = FlatShard(
                flat.detach().narrow(0, offset, numel), shape=shape, start=start
            )
            for key, value in self.optimizer.state[flat].items():
                if not isinstance(value, torch.Tensor):
                    continue
                if value.dim() == 0:
                    tensors[f"optim.{name}.{key}"] = value
                else:
                    shard = value.narrow(0, offset, numel)
                    tensors[f"optim.{name}.{key}"] = FlatShard(shard, shape=shape, start=start)
        return tensors

    def state_filled(self) -> None:
        """Copy the fp32 slices into the parameters the forward uses, whole again on every rank."""
        if self._stage == 3:
            self._refresh_partitions()
            return
        zero = self._zero
        for lp_slices, fp32 in zip(
            zero.parallel_partitioned_bit16_groups,
            zero.single_partition_of_fp32_groups,
            strict=True,
        ):
            index = lp_slices[dist.get_rank(group=zero.dp_process_group)]
            index.data.copy_(fp32.data)
        from deepspeed.runtime.utils import all_gather_dp_groups

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
            piece = self._piece(parameter) if parameter.requires_grad else None
            if piece is not None:
                flat, offset, _, numel = piece
                partition = parameter.ds_tensor  # type: ignore[attr-defined]
                partition.data[:numel].copy_(flat.data.narrow(0, offset, numel))
        # Small parameters are kept whole on every rank ("persistent"); they still hold old values.
        persistent = [p for p in self._named.values() if getattr(p, "ds_persist", False)]
        for parameter in persistent:
            parameter.partition()  # type: ignore[attr-defined]
        if persistent:
            with deepspeed.zero.GatheredParameters(persistent):
                pass
            persistent[0].all_gather(persistent)  # type: ignore[attr-defined]

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape if self._stage == 3 else parameter.shape  # type: ignore[attr-defined]

    def _piece(self, parameter: Any) -> tuple[torch.Tensor, int, int, int] | None:
        """(flat fp32 tensor, offset in it, start in the parameter, length) of this rank's slice;
        None where it owns nothing of the parameter."""
        if self._stage == 3:
            group, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = self.environment.rank * parameter.ds_tensor.ds_numel
            length = max(0, min(length, parameter.ds_numel - start))
            if not length:
                return None
            return self._zero.fp32_partitioned_groups_flat[group], offset, start, length
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        return flat, hp.start, lp.start, lp.numel

    def _frozen(self, parameter: Any) -> torch.Tensor:
        if self._stage != 3:
            return parameter.detach()
        start = self.environment.rank * parameter.ds_tensor.ds_numel
        length = max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))
        local = parameter.ds_tensor.data.view(-1)[:length]
        return FlatShard(local, shape=parameter.ds_shape, start=start)

    def _ensure_optimizer_state(self) -> None:
        """Make the moments exist before loading, by a step of rate zero on zero gradients."""
        missing = [
            (flat, group)
            for flat, group in self._flats_and_groups()
            if flat.numel() and _keeps_state(group) and not self.optimizer.state.get(flat)
        ]
        if not missing:
            return
        saved = [(group, group["lr"], group["params"]) for group in self.optimizer.param_groups]
        for group, _, _ in saved:
            group["lr"] = 0.0
            group["params"] = [flat for flat, owner in missing if owner is group]
        # Under offload DeepSpeed accumulates into buffers that it hung there.
        buffers = [flat.grad for flat, _ in missing]
        for flat, _ in missing:
            flat.grad = torch.zeros_like(flat)
        self.optimizer.step()
        reset_state(self.optimizer, [flat for flat, _ in missing])
        for (flat, _), buffer in zip(missing, buffers, strict=True):
            flat.grad = buffer
        for group, rate, parameters in saved:
            group["lr"], group["params"] = rate, parameters

    def _flats_and_groups(self) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        """Each flat fp32 partition of this rank with the optimizer group it belongs to."""
        groups = self.optimizer.param_groups
        if self._stage < 3:
            return list(zip(self._zero.single_partition_of_fp32_groups, groups, strict=True))
        owners = self._zero.sub_group_to_group_id
        flats = enumerate(self._zero.fp32_partitioned_groups_flat)
        return [(flat, groups[owners[index]]) for index, flat in flats]


def _keeps_state(group: dict[str, Any]) -> bool:
    """Not SGD without momentum; one group may have it and another not."""
    return group.get("momentum") != 0

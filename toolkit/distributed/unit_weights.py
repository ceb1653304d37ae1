"""Weights of an nGPT, whose vectors of width d_model have length one after each step."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.shards import Box, ShardSpec, local_boxes, local_tensor
from toolkit.models.kernels import widest_float
from toolkit.models.normalized import lengthen_, squared_lengths, unit_dimension


class _Part(NamedTuple):
    parameter: Any
    box: Box
    dim: int
    copies: int
    room: slice | None
    """Of the squared lengths of all parts that ranks add up; None: whole vectors are here."""


class UnitWeights:
    """What this rank holds of the matrices of a model, and how their vectors lie in it."""

    def __init__(
        self,
        parameters: Mapping[str, Any],
        shards: Mapping[str, ShardSpec],
        environment: TrainingEnvironment,
    ) -> None:
        self._environment = environment
        self._parts: list[_Part] = []
        self._shared = 0
        """Vectors that lie on several ranks, the same number on each of these."""
        # Those of other stages too: all ranks add up the same numbers.
        for name, spec in shards.items():
            if (dim := unit_dimension(name)) is None:
                continue
            is_cut = spec.dim == dim or (dim == 0 and environment.layout.is_fsdp)
            start, other = self._shared, 1 - dim
            if is_cut:
                self._shared += spec.shape[other]
            parameter = parameters.get(name)
            for box in [] if parameter is None else local_boxes(parameter, spec):
                first = start + box.offsets[other]
                room = slice(first, first + box.sizes[other]) if is_cut else None
                self._parts.append(_Part(parameter, box, dim, spec.copies, room))

    @torch.no_grad()
    def restore(self) -> None:
        """Make all vectors unit vectors again; every rank calls it."""
        device = self._environment.device
        sums = torch.zeros(self._shared, dtype=widest_float(device), device=device)
        for part in self._parts:
            if part.room is not None:
                sums[part.room] += squared_lengths(_matrix(part), part.dim).to(device) / part.copies
        if self._shared:
            if (group := self._environment.weight_group) is not None:
                dist.all_reduce(sums, group=group)
            if (replicas := self._environment.group("dp_replicate")) is not None:
                dist.broadcast(sums, group=replicas, group_src=0)
        for part in self._parts:
            matrix = _matrix(part)
            if part.room is None:
                squares = squared_lengths(matrix, part.dim)
            else:
                squares = sums[part.room].to(matrix.device)
            lengthen_(matrix, squares, part.dim)


def _matrix(part: _Part) -> torch.Tensor:
    memory = local_tensor(part.parameter.detach()).view(-1)
    numel = math.prod(part.box.sizes)
    return memory.narrow(0, part.box.position, numel).view(part.box.sizes)

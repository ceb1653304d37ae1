"""Whole matrices for optimizers whose update mixes rows and columns, under every engine.

Each matrix has one owner, a rank that computes its update for all. In a step

1. ranks send the owners their parts of what the update is made of (one all-to-all),
2. each owner computes its matrices, those of equal shape together,
3. owners send everyone the parts that they hold (one all-to-all).

Work is spread by its cost. A matrix that one rank has whole is computed there, or by one of the
ranks that have: then nothing travels in 1, and under DDP only the result in 3. Replicas get the
same bits, because nobody computes twice. State stays where the weights are. Sizes are known
beforehand, so nothing waits for the device.

An optimizer of one's own that needs whole matrices declares it and calls `apply`:

    class Orthogonal(torch.optim.Optimizer):
        takes_found_inf = needs_whole_matrices = takes_whole_matrices = True
        whole_matrices = None  # set by the engine

        def step(self, closure=None):
            ...  # params, and values: tensors like them, which become the updates
            self.whole_matrices.apply(
                lambda matrices, kept: svd_update(matrices), params, values, dtype=torch.float32
            )
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.distributed.shards import Box
from toolkit.errors import ConfigError
from toolkit.optim.base import OPTIM_KEY

Compute = Callable[[Tensor, Tensor | None], Tensor]

_CHUNK = 1 << 25
"""Elements of matrices that are computed at once."""

_Area = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a rectangle of a matrix."""


class Held(NamedTuple):
    """What of a parameter lies in one of the optimizer's tensors on this rank."""

    name: str
    shape: torch.Size
    """Of the whole parameter."""
    boxes: Sequence[Box]
    """With positions in the flattened tensor; none where this rank has nothing."""


class Unit(NamedTuple):
    """One matrix."""

    name: str
    number: int
    """Among stacked ones."""
    shape: tuple[int, int]

    @property
    def cost(self) -> int:
        """Of a Newton-Schulz iteration, up to a factor."""
        short, long = sorted(self.shape)
        return short * short * (2 * long + short)


class _Part(NamedTuple):
    """A rectangle of a matrix, as the owner has it, and as this rank holds it."""

    unit: Unit
    area: _Area
    tensor: int
    """Which of the optimizer's tensors it lies in on this rank; -1: in none."""
    position: int

    @property
    def numel(self) -> int:
        return math.prod(self.area[1])


class _Plan(NamedTuple):
    """Who computes what, and what travels: lists of parts by the other rank."""

    units: list[Unit]
    """All, in an order that all ranks have."""
    slots: dict[tuple[int, int], list[Unit]]
    """Those that this rank owns, by shape."""
    local: list[_Part]
    """What it holds of them."""
    gathers: bool
    """Whether any rank sends anything to an owner."""
    returns: bool
    """Whether any owner sends results."""
    sent: list[list[_Part]]
    """To owners."""
    received: list[list[_Part]]
    """Of the matrices of this rank."""
    results_sent: list[list[_Part]]
    results_received: list[list[_Part]]


def assign_owners(
    units: Sequence[Unit], holders: Mapping[Unit, Sequence[int] | None], ranks: int
) -> dict[Unit, int]:
    """A rank for each unit, so that all have about equal costs: one of `holders`, the ranks that
    have all of it; where nobody has (None), any."""
    loads, owners = [0] * ranks, {}
    order = sorted(units, key=lambda u: (holders[u] is None, -u.cost))
    for unit in order:
        able = holders[unit]
        owner = min(range(ranks) if able is None else able, key=lambda rank: (loads[rank], rank))
        owners[unit] = owner
        loads[owner] += unit.cost
    return owners


class WholeMatrices:
    """The exchange between the ranks of `group` (None: one process), which hold all replicas of
    the same parameters. `held`: what each of the optimizer's tensors is made of; each rank names
    the same parameters in the same order."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        held: Mapping[Tensor, Sequence[Held]],
    ) -> None:
        self.device = device
        """Where matrices are computed."""
        self.kept: dict[str, dict[str, Tensor]] = {}
        """Name of a parameter -> what is kept for the rows of its matrices, whole on every rank."""
        self._group = group
        self._rank, self._size = (0, 1) if group is None else (group.rank(), group.size())
        self._held = held
        self._plans: dict[tuple[int, ...], _Plan] = {}

    @torch.no_grad()
    def apply(
        self,
        compute: Compute,
        tensors: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        dtype: torch.dtype,
        scale: Callable[[int, int], float] = lambda rows, columns: 1.0,
        keeps: str | None = None,
    ) -> None:
        """Replace `values`, this rank's parts of matrices, by those of `compute`'s results. All
        ranks call it with the same parameters.

        Args:
            compute: of whole matrices `(number, rows, columns)`, and of what is kept for their
                rows, `(number, rows)` or None, which it may change in place, to such a tensor.
            tensors: of the optimizer, which the values are of.
            values: contiguous, like `tensors`.
            dtype: in which values and results travel, and `compute` gets them.
            scale: what results are multiplied by on arrival, by the shape of a matrix.
            keeps: name of a number that is kept for each row, at first 0; see `kept`.

        Raises:
            ConfigError: a parameter has not two or three dimensions.
        """
        key = tuple(id(tensor) for tensor in tensors)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make_plan(tensors)
        flats = [value.view(-1) for value in values]
        stacks = {
            shape: torch.empty(len(units), *shape, dtype=dtype, device=self.device)
            for shape, units in plan.slots.items()
        }
        places = {unit: n for units in plan.slots.values() for n, unit in enumerate(units)}

        def mine(parts: Sequence[_Part]) -> list[Tensor]:
            return [
                flats[part.tensor].narrow(0, part.position, part.numel).view(part.area[1])
                for part in parts
            ]

        def whole(parts: Sequence[_Part]) -> list[Tensor]:
            found = []
            for unit, (offsets, sizes), *_ in parts:
                matrix = stacks[unit.shape][places[unit]]
                found.append(matrix.narrow(0, offsets[0], sizes[0]).narrow(1, offsets[1], sizes[1]))
            return found

        if plan.local:
            torch._foreach_copy_(whole(plan.local), mine(plan.local))
        if plan.gathers:
            self._exchange(plan.sent, mine, plan.received, whole, dtype)
        kept = None if keeps is None else self._kept_of(plan, keeps, values[0].dtype)
        for shape, stack in stacks.items():
            rows = None
            if kept is not None:
                rows = torch.stack([kept[unit] for unit in plan.slots[shape]])
            step = max(1, _CHUNK // math.prod(shape))
            for first in range(0, len(stack), step):
                part = slice(first, first + step)
                stack[part] = compute(stack[part], None if rows is None else rows[part])
            if kept is not None and rows is not None:
                torch._foreach_copy_([kept[u] for u in plan.slots[shape]], rows.unbind())
        if kept is not None:
            self._share(plan, kept)
        if plan.local:
            torch._foreach_copy_(mine(plan.local), whole(plan.local))
        arrived = [*plan.local]
        if plan.returns:
            self._exchange(plan.results_sent, whole, plan.results_received, mine, dtype)
            arrived += itertools.chain.from_iterable(plan.results_received)
        factors = [scale(*part.unit.shape) for part in arrived]
        if arrived and set(factors) != {1.0}:
            torch._foreach_mul_(mine(arrived), factors)

    def _exchange(
        self,
        sent: Sequence[Sequence[_Part]],
        sources: Callable[[Sequence[_Part]], list[Tensor]],
        received: Sequence[Sequence[_Part]],
        targets: Callable[[Sequence[_Part]], list[Tensor]],
        dtype: torch.dtype,
    ) -> None:
        out, rooms_out, sizes_out = self._rooms(sent, dtype)
        into, rooms_in, sizes_in = self._rooms(received, dtype)
        if rooms_out:
            torch._foreach_copy_(rooms_out, sources([p for parts in sent for p in parts]))
        dist.all_to_all_single(into, out, sizes_in, sizes_out, group=self._group)
        if rooms_in:
            torch._foreach_copy_(targets([p for parts in received for p in parts]), rooms_in)

    def _rooms(
        self, parts: Sequence[Sequence[_Part]], dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor], list[int]]:
        """A flat tensor with room for `parts`, the rooms, and how much of it is of which rank."""
        sizes = [sum(part.numel for part in own) for own in parts]
        flat = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        every = [part for own in parts for part in own]
        rooms = flat.split([part.numel for part in every]) if every else ()
        return (
            flat,
            [room.view(p.area[1]) for room, p in zip(rooms, every, strict=True)],
            sizes,
        )

    def _kept_of(self, plan: _Plan, keeps: str, dtype: torch.dtype) -> dict[Unit, Tensor]:
        numbers: dict[str, int] = {}
        for unit in plan.units:
            numbers[unit.name] = numbers.get(unit.name, 0) + 1
        shapes = {name: shape for held in self._held.values() for name, shape, _ in held}
        for name in numbers:
            own = self.kept.setdefault(name, {})
            if keeps not in own:
                own[keeps] = torch.zeros(shapes[name][:-1], dtype=dtype, device=self.device)
        return {
            unit: self.kept[unit.name][keeps].view(-1, unit.shape[0])[unit.number]
            for unit in plan.units
        }

    def _share(self, plan: _Plan, kept: Mapping[Unit, Tensor]) -> None:
        """What owners have changed, on every rank: each number is one rank's, and others add 0."""
        if self._group is None:
            return
        every = [kept[unit] for unit in plan.units]
        own = {unit for units in plan.slots.values() for unit in units}
        flat = every[0].new_zeros(sum(t.numel() for t in every))
        rooms = flat.split([t.numel() for t in every])
        ours = [n for n, unit in enumerate(plan.units) if unit in own]
        if ours:
            torch._foreach_copy_([rooms[n] for n in ours], [every[n] for n in ours])
        dist.all_reduce(flat, group=self._group)
        torch._foreach_copy_(every, list(rooms))

    def _make_plan(self, tensors: Sequence[Tensor]) -> _Plan:
        own: dict[tuple[Unit, _Area], tuple[int, int]] = {}
        units: list[Unit] = []
        told = []
        for number, tensor in enumerate(tensors):
            for name, shape, boxes in self._held[tensor]:
                if len(shape) not in (2, 3):
                    problem = f"{name} has the shape {tuple(shape)}, and is no matrix"
                    raise ConfigError(f"{problem}; leave it to AdamW", key=f"{OPTIM_KEY}.matrices")
                matrices = [
                    Unit(name, n, (shape[-2], shape[-1]))
                    for n in range(shape[0] if len(shape) == 3 else 1)
                ]
                units += matrices
                for box in boxes:
                    for index, area, position in _areas(box):
                        own[matrices[index], area] = number, position
                        told.append((name, index, area))
        everyone: list[Any] = [told] * self._size
        if self._group is not None:
            dist.all_gather_object(everyone, told, group=self._group)
        found: dict[tuple[str, int], dict[_Area, list[int]]] = {}
        for rank, areas in enumerate(everyone):
            for name, index, area in areas:
                found.setdefault((name, index), {}).setdefault(area, []).append(rank)
        places = {unit: found.get((unit.name, unit.number), {}) for unit in units}
        return self._routed(units, places, own)

    def _routed(
        self,
        units: list[Unit],
        places: Mapping[Unit, Mapping[_Area, list[int]]],
        own: Mapping[tuple[Unit, _Area], tuple[int, int]],
    ) -> _Plan:
        whole = {
            unit: next(iter(areas.values())) if len(areas) == 1 else None
            for unit, areas in places.items()
        }
        owners = assign_owners(units, whole, self._size)
        me = self._rank
        ways: list[list[list[_Part]]] = [[[] for _ in range(self._size)] for _ in range(4)]
        plan = _Plan(units, {}, [], False, False, *ways)
        gathers = returns = False
        for unit in units:
            owner = owners[unit]
            if owner == me:
                plan.slots.setdefault(unit.shape, []).append(unit)
            areas = places[unit]
            covered = sum(math.prod(sizes) for _, sizes in areas)
            assert covered == math.prod(unit.shape), f"{unit}: ranks hold {covered} elements"
            for area in sorted(areas):
                part = _Part(unit, area, *own.get((unit, area), (-1, 0)))
                # Of several that hold the same, the nearest: a replica's ranks lie together.
                source = min(areas[area], key=lambda rank: (abs(rank - owner), rank))
                gathers |= source != owner
                if source == me and owner == me:
                    plan.local.append(part)
                elif source == me:
                    plan.sent[owner].append(part)
                elif owner == me:
                    plan.received[source].append(part)
                for rank in areas[area]:
                    returns |= rank != owner
                    if owner == me and rank != me:
                        plan.results_sent[rank].append(part)
                    elif rank == me and owner != me:
                        plan.results_received[owner].append(part)
        return plan._replace(gathers=gathers, returns=returns)


def _areas(box: Box) -> list[tuple[int, _Area, int]]:
    """The parts of `box` by matrix: its index, its rectangle, and where that lies."""
    *first, row, column = box.offsets
    *number, rows, columns = box.sizes
    start, count = (first[0], number[0]) if first else (0, 1)
    area = (row, column), (rows, columns)
    return [(start + n, area, box.position + n * rows * columns) for n in range(count)]

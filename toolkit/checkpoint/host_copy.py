"""A copy of a rank's shards in host memory, made while training goes on.

What only the optimizer changes need not be copied before the next step begins: forward and backward
just read it. A GPU copies it on a stream of its own; what is on the CPU, the thread that writes
copies. Before anything changes it, training sees to it that the copies come first.
"""

import threading
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from toolkit.checkpoint.folder import MODEL_PREFIX
from toolkit.distributed.devices import Copies, host_memory

_ALIGNMENT = 64
"""Bytes: a line of the processor's cache."""
_OPTIM_PREFIX = "optim."


class Shard(NamedTuple):
    """What is copied, and where to."""

    key: MetadataIndex
    source: torch.Tensor
    buffer: torch.Tensor


class HostMemory:
    """One piece of host memory for shards, which every copy of the same ones uses again."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def room_for(self, sources: dict[MetadataIndex, torch.Tensor]) -> list[Shard]:
        """A buffer for each of `sources`, which have the same types and shapes each time."""
        sizes = [-(-source.nbytes // _ALIGNMENT) * _ALIGNMENT for source in sources.values()]
        if self._memory is None:
            devices = {source.device for source in sources.values()}
            self._memory = host_memory(sum(sizes), devices)
        shards = []
        parts = self._memory.split(sizes)
        for (key, source), part in zip(sources.items(), parts, strict=True):
            buffer = part[: source.nbytes].view(source.dtype).view(source.shape)
            shards.append(Shard(key, source, buffer))
        return shards


class HostCopy:
    """The copies of `shards`, some of them still under way; called with an item of the plan it
    gives the copy, or raises what a copy has raised.

    Args:
        late: names of the tensors that nobody changes before `hold_back` is called.
    """

    def __init__(self, shards: Iterable[Shard], *, late: Collection[str] = ()) -> None:
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}
        self._late_on_cpu: list[Shard] = []
        self._copies: list[Copies] = []
        self._is_done = threading.Event()
        self._error: Exception | None = None
        groups: dict[tuple[bool, torch.device], list[Shard]] = {}
        for shard in shards:
            self._buffers[shard.key] = shard.buffer
            is_late = shard.key.fqn in late
            groups.setdefault((is_late, shard.source.device), []).append(shard)
        for (is_late, device), some in sorted(groups.items(), key=lambda group: group[0][0]):
            if is_late and device.type == "cpu":
                self._late_on_cpu = some
                continue
            copies = Copies(device, [(shard.buffer, shard.source) for shard in some])
            self._copies.append(copies)
            if not is_late:
                copies.hold_back()
        if not self._late_on_cpu:
            self._is_done.set()

    def __call__(self, item: WriteItem) -> torch.Tensor:
        self.finish()
        if self._error is not None:
            raise self._error
        return self._buffers[item.index]

    def finish(self) -> None:
        """Copy what is left and wait until all is there; the thread that writes begins with it.
        What fails is raised where a copy is asked for: there other ranks hear of it."""
        try:
            try:
                for shard in self._late_on_cpu:
                    shard.buffer.copy_(shard.source)
            finally:
                self._late_on_cpu = []
                self._is_done.set()
            while self._copies and self._error is None:
                self._copies[0].wait()
                self._copies.pop(0)
        except Exception as error:
            self._error = error

    def hold_back(self) -> None:
        """Have what the caller does next to the tensors come after the copies: a GPU sees to that
        by itself, for the CPU's the caller waits here until another thread has called `finish`."""
        self._is_done.wait()
        for copies in list(self._copies):
            copies.hold_back()


def changed_by_optimizer(names: Iterable[str]) -> set[str]:
    """Of the names in a checkpoint those of moments ("optim.NAME.exp_avg") and of the weights that
    have some. (Buffers may change in any forward.)"""
    names = set(names)
    moments = {name for name in names if name.startswith(_OPTIM_PREFIX)}
    owners = {name.removeprefix(_OPTIM_PREFIX).rpartition(".")[0] for name in moments}
    return moments | names.intersection(MODEL_PREFIX + owner for owner in owners)

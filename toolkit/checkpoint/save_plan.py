"""Which rank writes which shard of which tensor, and how it is written.

All ranks decide that together once, by torch DCP's rules; the answer holds as long as names and
shapes stay. Ranks may hold different tensors, or parts of the same ones; what several ranks have,
one of them writes. A save then needs no collective to know what to write, and an asynchronous one
copies just the shards of this rank, into host memory that the next save uses again.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from toolkit.checkpoint.folder import FileEntry
from toolkit.checkpoint.host_copy import HostCopy, HostMemory
from toolkit.checkpoint.shard_file import ShardFile, bytes_in, framed_bytes
from toolkit.checkpoint.together import place_in
from toolkit.errors import CheckpointError

Resolve = Callable[[WriteItem], torch.Tensor]


class WrittenShards(NamedTuple):
    """What one rank wrote."""

    results: list[WriteResult]
    """Where each shard lies, for DCP's metadata."""
    files: dict[str, FileEntry]
    """File name -> size and hash."""


class ShardWriter:
    """The shards of a state that this rank writes, over the whole of a run.

    Args:
        group: gloo group of all ranks; None: one process. Only planning uses it.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._rank = place_in(group)[0]
        self._shapes: list[tuple[str, torch.Size]] | None = None
        self._plan = SavePlan([])
        self._metadata: Metadata | None = None
        self._memory = HostMemory()

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that this rank writes."""
        return sum(bytes_in(*_kind_of(item)) for item in self._plan.items)

    def live(self, tensors: dict[str, torch.Tensor]) -> Resolve:
        """The shards themselves: nothing may change until they are written. All ranks call it."""
        return self._planned(tensors).resolve_data  # type: ignore[return-value]

    def copy(self, tensors: dict[str, torch.Tensor], *, late: Collection[str] = ()) -> HostCopy:
        """The shards as they are now, in host memory; training may go on. All ranks call it.

        The memory belongs to this object: a second `copy` overwrites the first.

        Args:
            late: names of tensors that nobody changes before `HostCopy.hold_back` is called. They
                may be copied until then.
        """
        planner = self._planned(tensors)
        sources: dict[MetadataIndex, Any] = {
            item.index: planner.resolve_data(item).detach() for item in self._plan.items
        }
        return HostCopy(self._memory.room_for(sources), late=late)

    def stream(
        self, shapes: Mapping[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]]
    ) -> Resolve:
        """CPU tensors of one process that come one at a time and are never in memory together:
        each is written when it comes, while the next is on its way.

        Args:
            shapes: key -> tensor of its shape and type, best on the meta device.
            tensors: `(key, tensor)` in the order of `shapes`.
        """
        self._planned(dict(shapes))
        coming = _one_ahead(tensors)

        def next_tensor(item: WriteItem) -> torch.Tensor:
            key, tensor = next(coming, ("nothing", torch.empty(0)))
            size = shapes[item.index.fqn].shape
            if key != item.index.fqn or tensor.shape != size:
                raise CheckpointError(
                    f"{item.index.fqn} {tuple(size)} was to come, not {key} {tuple(tensor.shape)}"
                )
            return tensor

        return next_tensor

    def write(self, folder: Path, resolve: Resolve) -> WrittenShards:
        """Write this rank's shards into one file, hashed on the way, and fsync it.

        As DCP's writer does, which keeps every tensor until the last is written, and syncs after
        it.
        """
        name = f"__{self._rank}_0.distcp"
        results = []
        folder.mkdir(exist_ok=True)
        size = sum(framed_bytes(*_kind_of(item)) for item in self._plan.items)
        with ShardFile.open(folder / name, size) as file:
            for item in self._plan.items:
                begin, length = file.add(resolve(item).detach().cpu())
                info = _StorageInfo(name, begin, length)
                results.append(WriteResult(item.index, length, info))
            file.sync()
        return WrittenShards(results, {name: file.entry()})

    def write_metadata(self, folder: Path, results: list[list[WriteResult]]) -> None:
        """DCP's `.metadata`, from what all ranks wrote; rank 0 calls it last."""
        assert self._metadata is not None, "rank 0 has planned"
        FileSystemWriter(folder, sync_files=True).finish(self._metadata, results)

    def _planned(self, tensors: dict[str, torch.Tensor]) -> DefaultSavePlanner:
        planner = DefaultSavePlanner()
        planner.set_up_planner(tensors, is_coordinator=self._rank == 0)
        shapes = [(name, tensor.shape) for name, tensor in tensors.items()]
        if shapes != self._shapes:
            self._make_plan(planner)
            self._shapes, self._memory = shapes, HostMemory()
        return planner

    def _make_plan(self, planner: DefaultSavePlanner) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            local = planner.create_local_plan()
        plans, central = [local], [SavePlan([])]
        if self._group is not None:
            plans = [local] * self._group.size() if self._rank == 0 else []
            dist.gather_object(local, plans or None, dst=0, group=self._group)
        if self._rank == 0:
            central, self._metadata = planner.create_global_plan(plans)
        box = central[:1]
        if self._group is not None:
            scattered = central if self._rank == 0 else None
            dist.scatter_object_list(box, scattered, src=0, group=self._group)
        self._plan = planner.finish_plan(box[0])


def _kind_of(item: WriteItem) -> tuple[torch.dtype, torch.Size]:
    """Type and shape of a shard."""
    assert item.tensor_data is not None, "nothing but tensors is planned"
    return item.tensor_data.properties.dtype, item.tensor_data.chunk.sizes


def _one_ahead(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensors`, each made before the last is used: the system may be reading its file already."""
    last = None
    for item in tensors:
        if last is not None:
            yield last
        last = item
    if last is not None:
        yield last

"""Which rank writes which piece of which tensor, and the pieces themselves, live or copied.

All ranks decide that together once, by torch DCP's rules; the answer holds as long as names and
shapes stay. A save then needs no collective to know what to write, and an asynchronous one copies
just the pieces of this rank, into host memory that the next save uses again.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from toolkit.checkpoint.folder import FileEntry

Resolve = Callable[[WriteItem], torch.Tensor]


class WrittenShards(NamedTuple):
    """What one rank wrote."""

    results: list[WriteResult]
    """Where each piece lies, for DCP's metadata."""
    files: dict[str, FileEntry]
    """File name -> size and hash."""


class ShardWriter:
    """The pieces of a state that this rank writes, over the whole of a run.

    Args:
        group: gloo group of all ranks; None: one process. Only `plan` uses it.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._rank = 0 if group is None else dist.get_rank(group)
        self._layout: list[tuple[str, torch.Size]] | None = None
        self._plan = SavePlan([])
        self._metadata: Metadata | None = None
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that this rank writes."""
        sizes = (item.tensor_data for item in self._plan.items)
        return sum(
            data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in sizes if data
        )

    def live(self, tensors: dict[str, torch.Tensor]) -> Resolve:
        """The pieces themselves: nothing may change until they are written. All ranks call it."""
        return self._planned(tensors).resolve_data  # type: ignore[return-value]

    def copy(self, tensors: dict[str, torch.Tensor]) -> Resolve:
        """The pieces as they are now, in host memory; training may go on. All ranks call it.

        The memory belongs to this object: a second `copy` overwrites the first.
        """
        planner = self._planned(tensors)
        devices = set()
        for item in self._plan.items:
            source: Any = planner.resolve_data(item)
            buffer = self._buffers.get(item.index)
            if buffer is None:
                buffer = self._buffers[item.index] = _host_buffer(source)
            buffer.copy_(source.detach(), non_blocking=True)
            devices.add(source.device)
        _wait_for_copies(devices)
        return lambda item: self._buffers[item.index]

    def write(self, folder: Path, resolve: Resolve) -> WrittenShards:
        """Write this rank's pieces into one file, hashed on the way, and fsync it."""
        # Copying ahead would let this thread wait for the device's current stream, that is for
        # training, every 10 MB; what a background save writes is in host memory already.
        writer = FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)
        hashed = HashingFiles(writer.fs)
        writer.fs = hashed  # type: ignore[assignment]
        planner = DefaultSavePlanner()
        planner.resolve_data = resolve  # type: ignore[method-assign, assignment]
        folder.mkdir(exist_ok=True)
        try:
            with no_crc32():
                results = writer.write_data(self._plan, planner).wait()
        except RuntimeError:
            # torch's archive writer, which complains of what it finds after a write that failed.
            if hashed.error is not None:
                raise hashed.error from None
            raise
        return WrittenShards(results, hashed.entries)

    def write_metadata(self, folder: Path, results: list[list[WriteResult]]) -> None:
        """DCP's `.metadata`, from what all ranks wrote; rank 0 calls it last."""
        assert self._metadata is not None, "rank 0 has planned"
        FileSystemWriter(folder, sync_files=True).finish(self._metadata, results)

    def _planned(self, tensors: dict[str, torch.Tensor]) -> DefaultSavePlanner:
        planner = DefaultSavePlanner()
        planner.set_up_planner(tensors, is_coordinator=self._rank == 0)
        layout = [(name, tensor.shape) for name, tensor in tensors.items()]
        if layout != self._layout:
            self._make_plan(planner)
            self._layout, self._buffers = layout, {}
        return planner

    def _make_plan(self, planner: DefaultSavePlanner) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            local = planner.create_local_plan()
        plans = [local] if self._group is None else _gather(local, self._group)
        central: list[SavePlan] = []
        if self._rank == 0:
            central, self._metadata = planner.create_global_plan(plans)
            central = FileSystemWriter("").prepare_global_plan(central)
        own = central[0] if self._group is None else _scatter(central, self._group)
        self._plan = planner.finish_plan(own)


def _gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's value on rank 0."""
    rank = dist.get_rank(group)
    values: list[Any] | None = [None] * dist.get_world_size(group) if rank == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


def _scatter(values: list[Any], group: dist.ProcessGroup) -> Any:
    box: list[Any] = [None]
    dist.scatter_object_list(box, values or None, src=0, group=group)
    return box[0]


def _host_buffer(source: torch.Tensor) -> torch.Tensor:
    pinned = source.device.type == "cuda"
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)


def _wait_for_copies(devices: set[torch.device]) -> None:
    for device in devices:
        if device.type != "cpu":
            torch.get_device_module(device).current_stream(device).synchronize()


@contextmanager
def no_crc32() -> Iterator[None]:
    """The manifest's hashes cover all files; a checksum of each record costs a third of a save."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class HashingFiles:
    """DCP's file system, whose written files are hashed as they pass."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.entries: dict[str, FileEntry] = {}
        self.error: OSError | None = None
        """The first write that failed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator["HashingStream"]:
        with open(path, mode, buffering=0) as file:
            stream = HashingStream(file)  # type: ignore[arg-type]
            try:
                yield stream
            finally:
                self.error = self.error or stream.error
            self.entries[Path(path).name] = stream.entry()


_SMALL_BYTES = 64 << 10
"""Pieces below this wait for one another."""
_HELD_BYTES = 1 << 20
"""Bytes passed on at once."""


class HashingStream:
    """As much of a binary file as `torch.save` and DCP use.

    `torch.save` writes forty pieces for each tensor, all but one of them tiny: those wait for one
    another, so that the system is not called for each.
    """

    def __init__(self, file: BinaryIO) -> None:
        import xxhash

        self._file = file
        self._size = 0
        self._held = bytearray()
        self._digest = xxhash.xxh3_64()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if len(view) < _SMALL_BYTES:
            self._held += view
            if len(self._held) > _HELD_BYTES:
                self.flush()
        else:
            self.flush()
            self._pass_on(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def fileno(self) -> int:
        self.flush()
        return self._file.fileno()

    def sync(self) -> None:
        """Make all that was written durable."""
        self.flush()
        self.sync_passed_on()

    def sync_passed_on(self) -> None:
        """The same for what no longer waits here; any thread may call it."""
        os.fsync(self._file.fileno())

    def flush(self) -> None:
        if self._held:
            self._pass_on(memoryview(self._held))
            self._held = bytearray()

    def close(self) -> None:
        """DCP closes before the block that opened the file ends."""
        self.flush()

    def entry(self) -> FileEntry:
        self.flush()
        return FileEntry(self._size, self._digest.hexdigest())

    def _pass_on(self, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                # So little that the processor's cache still holds it when it is written.
                piece = view[done : done + _HELD_BYTES]
                self._digest.update(piece)
                done += len(piece)
                while len(piece):  # an unbuffered file may take less than it is given
                    piece = piece[self._file.write(piece) :]
        except OSError as error:
            self.error = self.error or error
            raise

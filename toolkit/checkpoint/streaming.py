"""A checkpoint of tensors that come one at a time and are never in memory together.

While one is hashed and written, the next is on its way into the system's memory, and what was
written before on its way from there to the disk.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from toolkit.checkpoint.commit import Save, write_checkpoint
from toolkit.checkpoint.save_plan import (
    HashingFiles,
    Resolve,
    ShardWriter,
    WrittenShards,
    no_crc32,
)
from toolkit.errors import CheckpointError
from toolkit.threads import ThreadPool

_FILE = "__0_0.distcp"
_SYNC_BYTES = 32 << 20
"""Written between two requests to the disk."""


def write_streamed_checkpoint(
    save: Save, layout: Mapping[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Path:
    """Commit a checkpoint from one process and return its folder; see `write_checkpoint`.

    Args:
        layout: key -> tensor of its shape and type, best on the meta device.
        tensors: `(key, CPU tensor)` in the order of `layout`. Each is written and hashed when it
            comes, and then forgotten.

    Raises:
        TrainingError: it cannot be written, or `tensors` raised; nothing is committed.
    """
    pieces = _StreamedShards(None)
    pieces.live(dict(layout))
    return write_checkpoint(save, pieces, _in_order(tensors), rank=0, group=None)


class _StreamedShards(ShardWriter):
    def write(self, folder: Path, resolve: Resolve) -> WrittenShards:
        """As DCP's writer does, which keeps every tensor until the last is written."""
        files = HashingFiles(FileSystem())
        results = []
        folder.mkdir(parents=True, exist_ok=True)
        with (
            no_crc32(),
            files.create_stream(folder / _FILE, "wb") as stream,
            ThreadPool(1) as syncing,
        ):
            request: Future[None] | None = None
            requested = 0
            for item in self._plan.items:
                begin = stream.tell()
                try:
                    torch.save(resolve(item), stream)  # type: ignore[arg-type]
                except RuntimeError:
                    # torch's archive writer, which complains of what it finds after a failed write.
                    if stream.error is not None:
                        raise stream.error from None
                    raise
                info = _StorageInfo(_FILE, begin, stream.tell() - begin)
                results.append(WriteResult(item.index, info.length, info))
                if stream.tell() - requested > _SYNC_BYTES and (request is None or request.done()):
                    request, requested = syncing.submit(stream.sync_passed_on), stream.tell()
            if request is not None:
                request.result()
            stream.sync()
        return WrittenShards(results, files.entries)


def _in_order(tensors: Iterable[tuple[str, torch.Tensor]]) -> Resolve:
    coming = _one_ahead(tensors)

    def next_tensor(item: WriteItem) -> torch.Tensor:
        key, tensor = next(coming, ("nothing", torch.empty(0)))
        data = item.tensor_data
        assert data is not None, "all items are tensors"
        if key != item.index.fqn or tensor.shape != data.size:
            raise CheckpointError(
                f"{item.index.fqn} {tuple(data.size)} was to come, not {key} {tuple(tensor.shape)}"
            )
        is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor if is_whole and tensor.is_contiguous() else tensor.clone()

    return next_tensor


def _one_ahead(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensors`, each made before the last is used: the system may be reading its file already."""
    last = None
    for item in tensors:
        if last is not None:
            yield last
        last = item
    if last is not None:
        yield last

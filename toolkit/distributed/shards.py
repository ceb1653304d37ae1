"""`FlatShard`: a flat slice of a named tensor, saved and loaded by torch DCP as ordinary chunks."""

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


def flat_range_boxes(
    shape: torch.Size, start: int, length: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Split elements [start, start + length) of a row-major tensor into boxes.

    Returns (offsets, sizes, position in the slice) of each; at most 2 * (N - 1) + 1 for N
    dimensions: the range runs up to the next row, through whole rows, and into a last one, and the
    two partial rows split again inside their own dimensions.
    """
    if length <= 0:
        return []
    if len(shape) == 0:
        return [((), (), 0)]
    if len(shape) == 1:
        return [((start,), (length,), 0)]
    row = shape[1:].numel()
    boxes: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
    position = 0
    while position < length:
        first, inside = divmod(start + position, row)
        left = length - position
        if inside == 0 and left >= row:
            count = left // row
            zeros = (0,) * (len(shape) - 1)
            boxes.append(((first, *zeros), (count, *shape[1:]), position))
            position += count * row
            continue
        take = min(left, row - inside)
        for offsets, sizes, at in flat_range_boxes(shape[1:], inside, take):
            boxes.append(((first, *offsets), (1, *sizes), position + at))
        position += take
    return boxes


class FlatShard(torch.Tensor):
    """Elements [start, start + local.numel()) of a row-major tensor of `shape`.

    A wrapper subclass, because DCP's reader insists on tensors; it takes part in no arithmetic.
    """

    local: torch.Tensor
    start: int

    @staticmethod
    def __new__(cls, local: torch.Tensor, *, shape: torch.Size, start: int) -> "FlatShard":
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=False
        )
        self.local = local.detach()
        self.start = start
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"FlatShard only travels to and from checkpoints, not {func}")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        end = self.start + self.local.numel()
        return f"FlatShard({self.start}:{end} of {tuple(self.shape)})"

    def _boxes(self) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        return flat_range_boxes(self.shape, self.start, self.local.numel())

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        offsets=torch.Size(offsets), sizes=torch.Size(sizes)
                    ),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.shape,
                ),
            )
            for offsets, sizes, _ in self._boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes, _ in self._boxes()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for offsets, sizes, position in self._boxes():
            if index.offset is None or torch.Size(offsets) == index.offset:
                count = torch.Size(sizes).numel()
                return _alone(self.local.narrow(0, position, count).view(sizes))
        raise KeyError(f"{index}: no such box in {self!r}")


def _alone(view: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own: `torch.save` writes whole storages, so DCP would
    copy each piece of a larger one (measured: memory grew by all that a rank writes)."""
    start = view.storage_offset() * view.element_size()
    memory = view.untyped_storage()[start : start + view.nbytes]
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(memory, 0, view.shape)  # type: ignore[call-overload]

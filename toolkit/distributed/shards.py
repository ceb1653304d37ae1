"""What each rank's tensor of a parameter is: the one table that initial values, norms, partial
gradients and checkpoints are read off.

    ShardSpec    name -> the part of the whole parameter that this rank's module holds (its range of
                 a dimension), and what its gradient is. FSDP2 shards that part further over its
                 own ranks; its DTensors say how.
    Box          a rectangle of the whole parameter, and where in the rank's memory it lies
    LocalShard   a rank's memory as boxes of a named tensor, which torch DCP saves and loads
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from toolkit.models.init import InitSpec, canonical_parameters, fill_flat_


class ShardSpec(NamedTuple):
    """What a rank's module holds of one parameter."""

    shape: torch.Size
    """Of the whole parameter, as the model defines it and checkpoints know it."""
    dim: int | None = None
    """The dimension of which the module holds a range; None: all of the parameter."""
    start: int = 0
    """Where the range begins."""
    length: int = 0
    """How long it is."""
    partial_over: tuple[str, ...] = ()
    """Axes of the layout: each of their ranks has a summand of the gradient."""
    copies: int = 1
    """Ranks of one replica of the model that hold the same range."""


class Box(NamedTuple):
    """A rectangle of a whole tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    position: int
    """Of its first element in the flattened memory of the rank."""


def whole_specs(model: nn.Module) -> dict[str, ShardSpec]:
    """The table of a model that holds all of its parameters, by canonical name."""
    return {name: ShardSpec(p.shape) for name, p in canonical_parameters(model).items()}


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of a tensor that FSDP2 may have sharded."""
    local: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    # Of a weight that is gathered in 8 bits, torchao has put the memory in a tensor of its own.
    return local._tensor if hasattr(local, "fsdp_pre_all_gather") else local


def local_boxes(tensor: torch.Tensor, spec: ShardSpec) -> list[Box]:
    """What the memory of `tensor`, a parameter or its like, is of the whole one; none where this
    rank has nothing of it."""
    if not local_tensor(tensor).numel():
        return []
    sizes, offsets = tuple(tensor.shape), (0,) * tensor.dim()
    if isinstance(tensor, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    if tensor.dim() != len(spec.shape):  # stacked matrices that are stored as one long one
        inner = tensor.shape[1:].numel()
        boxes = flat_range_boxes(_held_shape(spec), offsets[0] * inner, sizes[0] * inner)
    else:
        boxes = [Box(tuple(offsets), tuple(sizes), 0)]
    if (at := spec.dim) is None:
        return boxes
    moved = ((*o[:at], o[at] + spec.start, *o[at + 1 :]) for o, _, _ in boxes)
    return [box._replace(offsets=new) for box, new in zip(boxes, moved, strict=True)]


def _held_shape(spec: ShardSpec) -> torch.Size:
    """Of what the module holds."""
    if spec.dim is None:
        return spec.shape
    return torch.Size((*spec.shape[: spec.dim], spec.length, *spec.shape[spec.dim + 1 :]))


def flat_range_boxes(shape: torch.Size, start: int, length: int) -> list[Box]:
    """Split elements [start, start + length) of a row-major tensor into boxes.

    At most 2 * (N - 1) + 1 for N dimensions: the range runs up to the next row, through whole rows,
    and into a last one, and the two partial rows split again inside their own dimensions.
    """
    if length <= 0:
        return []
    if len(shape) == 0:
        return [Box((), (), 0)]
    if len(shape) == 1:
        return [Box((start,), (length,), 0)]
    row = shape[1:].numel()
    boxes: list[Box] = []
    position = 0
    while position < length:
        first, inside = divmod(start + position, row)
        left = length - position
        if inside == 0 and left >= row:
            number = left // row
            zeros = (0,) * (len(shape) - 1)
            boxes.append(Box((first, *zeros), (number, *shape[1:]), position))
            position += number * row
            continue
        take = min(left, row - inside)
        for offsets, sizes, at in flat_range_boxes(shape[1:], inside, take):
            boxes.append(Box((first, *offsets), (1, *sizes), position + at))
        position += take
    return boxes


def flat_runs(shape: torch.Size, box: Box) -> Iterator[tuple[int, int, int]]:
    """The contiguous runs of the flattened whole of which `box` consists, each as (position in the
    rank's memory, start in the whole, length)."""
    cut = max((d for d in range(len(shape)) if box.sizes[d] != shape[d]), default=0)
    inner = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    length = math.prod(box.sizes[cut:])
    outer = (range(o, o + s) for o, s in zip(box.offsets[:cut], box.sizes[:cut], strict=True))
    for number, index in enumerate(itertools.product(*outer)):
        places = (*index, *box.offsets[cut:])
        start = sum(place * step for place, step in zip(places, inner, strict=True))
        yield box.position + number * length, start, length


def draw_initial_values(
    parameters: Mapping[str, torch.Tensor],
    inits: Mapping[str, InitSpec],
    shards: Mapping[str, ShardSpec],
    seed: int,
) -> None:
    """Fill what this rank holds of each parameter with the values of the whole one, which depend on
    (seed, name, shape) alone."""
    for name, parameter in parameters.items():
        spec, shape = inits[name], shards[name].shape
        if spec.kind == "of_weight":
            whole = torch.empty(shards[spec.weight].shape)
            drawn = ShardSpec(whole.shape)
            draw_initial_values({spec.weight: whole}, inits, {spec.weight: drawn}, seed)
            fill_part(parameter, shards[name], spec.part_of(whole))
            continue
        for memory, start in local_runs(parameter, shards[name]):
            fill_flat_(memory, name=name, numel=shape.numel(), start=start, spec=spec, seed=seed)


def local_runs(tensor: torch.Tensor, spec: ShardSpec) -> Iterator[tuple[torch.Tensor, int]]:
    """What this rank holds of `tensor`, a parameter or its like, as contiguous runs of the
    flattened whole: each the rank's own memory, and where in the whole it starts."""
    boxes = tensor.boxes if isinstance(tensor, LocalShard) else local_boxes(tensor, spec)
    memory = memory_of(tensor.detach()).view(-1)
    for box in boxes:
        for position, start, length in flat_runs(spec.shape, box):
            yield memory.narrow(0, position, length), start


@torch.no_grad()
def fill_part(tensor: torch.Tensor, spec: ShardSpec, whole: torch.Tensor) -> None:
    """Write what this rank holds of `tensor` from the `whole` one."""
    flat = whole.reshape(-1)
    for memory, start in local_runs(tensor, spec):
        memory.copy_(flat[start : start + memory.numel()])


def stored_tensor(tensor: torch.Tensor, spec: ShardSpec) -> torch.Tensor:
    """`tensor`, a parameter or its like, as checkpoints know it: a view of the same memory."""
    if tensor.dim() == 0 or tensor.shape == spec.shape:
        return tensor
    memory = local_tensor(tensor).view(-1)
    return LocalShard(memory, shape=spec.shape, boxes=local_boxes(tensor, spec))


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of a tensor as checkpoints know it."""
    return tensor.local if isinstance(tensor, LocalShard) else local_tensor(tensor)


def twin_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same parts on the same ranks, in memory of its own, not yet filled."""
    memory = torch.empty_like(memory_of(tensor), memory_format=torch.contiguous_format)
    if isinstance(tensor, LocalShard):
        return LocalShard(memory, shape=tensor.shape, boxes=tensor.boxes)
    if isinstance(tensor, DTensor):
        return DTensor(memory, tensor._spec, requires_grad=False)
    return memory


class LocalShard(torch.Tensor):
    """Boxes of a tensor of `shape` that lie one after another in `local`.

    A wrapper subclass, because DCP's reader insists on tensors; it takes part in no arithmetic.
    """

    local: torch.Tensor
    boxes: list[Box]

    @staticmethod
    def __new__(cls, local: torch.Tensor, *, shape: torch.Size, boxes: list[Box]) -> "LocalShard":
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=False
        )
        self.local = local.detach()
        self.boxes = boxes
        return self

    @classmethod
    def flat(cls, local: torch.Tensor, *, shape: torch.Size, start: int) -> "LocalShard":
        """Elements [start, start + local.numel()) of the row-major tensor."""
        return cls(local, shape=shape, boxes=flat_range_boxes(shape, start, local.numel()))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"LocalShard only travels to and from checkpoints, not {func}")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LocalShard({self.boxes} of {tuple(self.shape)})"

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=self.shape
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes, _ in self.boxes
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for offsets, sizes, position in self.boxes:
            if index.offset is None or torch.Size(offsets) == index.offset:
                return _alone(self.local.narrow(0, position, math.prod(sizes)).view(sizes))
        raise KeyError(f"{index}: no such box in {self!r}")


def _alone(view: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage of its own: `torch.save` writes whole storages, so DCP would
    copy each part of a larger one (measured: memory grew by all that a rank writes)."""
    start = view.storage_offset() * view.element_size()
    memory = view.untyped_storage()[start : start + view.nbytes]
    return torch.empty(0, dtype=view.dtype, device=view.device).set_(memory, 0, view.shape)  # type: ignore[call-overload]

"""Whole tensors, put together from what ranks have of them."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from toolkit.distributed.shards import local_tensor

Box = tuple[Sequence[int], Sequence[int], int]


def put_together(
    shape: Sequence[int], own: torch.Tensor | None, boxes: Iterable[Box]
) -> torch.Tensor:
    """Of a tensor of `shape` the mean of each value over the ranks that have it, float64. `own` is
    this rank's part, with `boxes` as `local_boxes` gives them; None: it has none."""
    total, times = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape)
    if own is not None:
        flat = local_tensor(own).reshape(-1)
        for offsets, sizes, position in boxes:
            place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            length = torch.Size(sizes).numel()
            total[place] = flat[position : position + length].view(torch.Size(sizes)).double()
            times[place] = 1.0
    if dist.is_initialized():
        dist.all_reduce(total)
        dist.all_reduce(times)
    return total / times

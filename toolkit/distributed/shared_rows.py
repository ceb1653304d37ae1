"""Rows whose positions the ranks of a group share: taking one's own, and putting all together."""

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.models.masks import Ranges, take


class SharedRows:
    """Which places of a row each rank of a group has."""

    def __init__(self, group: dist.ProcessGroup, *, stretches: int) -> None:
        self.group = group
        self.ranks = group.size()
        self.rank = group.rank()
        self.stretches = stretches
        """Of a row that each rank has: 1, or 2."""

    def places(self, length: int) -> tuple[Ranges, ...]:
        """Of each rank, for rows of `length`, which the number of stretches divides."""
        if self.stretches == 1:
            size = length // self.ranks
            return tuple((range(r * size, (r + 1) * size),) for r in range(self.ranks))
        size = length // (2 * self.ranks)
        starts = ((r * size, (2 * self.ranks - 1 - r) * size) for r in range(self.ranks))
        return tuple(tuple(range(at, at + size) for at in both) for both in starts)

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's places of whole rows."""
        return take(x, self.places(x.shape[dim])[self.rank], dim)

    def whole(self, parts: Tensor, dim: int) -> Tensor:
        """Whole rows of what all ranks have at their places: `parts`, stacked by rank; `dim` is
        that of a part."""
        pieces = {}
        for part, ranges in zip(parts, self.places(parts.shape[dim + 1] * self.ranks), strict=True):
            sizes = [len(places) for places in ranges]
            for places, piece in zip(ranges, part.split(sizes, dim), strict=True):
                pieces[places.start] = piece
        return torch.cat([pieces[start] for start in sorted(pieces)], dim)

"""How a group of our tensors lies in the tensors of a `transformers` family, both ways."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Sequence[Tensor]


class Transform(NamedTuple):
    """A rearrangement of rows (dimension 0), then perhaps a transposition."""

    join: Callable[[Tensors], list[Tensor]]
    """Our tensors to theirs. Works on rows alone, so it serves weights, biases and the output side
    of low-rank adapters alike."""
    split: Callable[[Tensors], list[Tensor]]
    """Theirs to ours, undoing `join`."""
    transposed: bool = False
    """Theirs are kept as `(in, out)` (GPT-2's Conv1D)."""

    def to_theirs(self, ours: Tensors) -> list[Tensor]:
        """Our tensors, in the order of the rule, as theirs."""
        joined = self.join(ours)
        return [tensor.t().contiguous() for tensor in joined] if self.transposed else joined

    def to_ours(self, theirs: Tensors) -> list[Tensor]:
        """Their tensors, in the order of the rule, as ours."""
        if self.transposed:
            theirs = [tensor.t() for tensor in theirs]
        return [tensor.contiguous() for tensor in self.split(theirs)]


def _as_they_are(tensors: Tensors) -> list[Tensor]:
    return list(tensors)


SAME = Transform(_as_they_are, _as_they_are)
"""Stored alike."""

TRANSPOSED = Transform(_as_they_are, _as_they_are, transposed=True)
"""For Conv1D, which keeps `(in, out)`."""


def joined(sizes: Sequence[int], *, transposed: bool = False) -> Transform:
    """Several projections of one input one below the other; `sizes`: rows of each of ours."""
    return Transform(
        lambda ours: [torch.cat(list(ours), dim=0)],
        lambda theirs: list(theirs[0].split(list(sizes), dim=0)),
        transposed,
    )


def interleaved(num_heads: int) -> Transform:
    """Query, key and value with as many heads each, head by head: the first head of each, then
    the second of each (GPT-NeoX)."""

    def join(ours: Tensors) -> list[Tensor]:
        heads = [tensor.unflatten(0, (num_heads, -1)) for tensor in ours]
        return [torch.stack(heads, dim=1).flatten(0, 2)]

    def split(theirs: Tensors) -> list[Tensor]:
        heads = theirs[0].unflatten(0, (num_heads, 3, -1))
        return [tensor.flatten(0, 1) for tensor in heads.unbind(1)]

    return Transform(join, split)


STACKED = Transform(
    lambda ours: list(ours[0].unbind(0)), lambda theirs: [torch.stack(list(theirs), dim=0)]
)
"""Ours holds in dimension 0 what they keep apart: one tensor per expert."""

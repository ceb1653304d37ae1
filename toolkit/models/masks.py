"""Which keys a query sees: those from the first one of its document or window to itself.

1. `document_starts` finds, once per forward, where the document of each token begins.
2. A token's position is counted from there.
3. The query at place q of its row sees the keys from first[q] to q, and no others, where first[q]
   is the beginning of its document or, in a sliding window of w, q - w + 1 if that is later.
4. `AttentionMask` writes that down once for all layers of a kind, in the form that the device's
   kernel wants: blocks of keys for flex attention, values added to the scores for SDPA.

Rows without documents and windows take none of these steps: plain causal attention is faster.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from toolkit.models.kernels import attention_backend

BLOCK_SIZE = 128
"""Queries and keys per block of flex attention, as its kernels are tuned for."""


def document_starts(document_ids: Tensor) -> Tensor:
    """Place in its row where each token's document begins, `(batch, seq)` int64. A document is a
    stretch of equal numbers in `document_ids`, `(batch, seq)` of integers."""
    place = torch.arange(document_ids.shape[1], device=document_ids.device)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(is_first, place, 0).cummax(dim=1).values


def document_positions(starts: Tensor) -> Tensor:
    return torch.arange(starts.shape[1], device=starts.device) - starts


def first_keys(starts: Tensor, window: int | None) -> Tensor:
    """Place of the first key that each query sees, `(batch, seq)` int64, from where the document of
    each token begins. `window`: keys that a query sees at most, itself included; None: all."""
    if window is None:
        return starts
    place = torch.arange(starts.shape[1], device=starts.device)
    return torch.maximum(starts, place - (window - 1))


class AttentionMask:
    """Which keys each query sees, for all layers of a kind in one forward. A plain object, as
    `RotaryTable` is: engines would cast or move the tensors of another.

    Attributes:
        bias: `(batch, 1, seq, seq)`, 0 or -inf, in the type of the queries: SDPA makes the same of
            a boolean mask, but in every layer and keeps each for backward. Or None.
        blocks: for flex attention, or None.
        window: keys that a query sees at most; None: all before it in its document.
    """

    __slots__ = ("bias", "blocks", "window")

    def __init__(
        self, starts: Tensor, *, window: int | None = None, dtype: torch.dtype, head_dim: int
    ) -> None:
        """From `document_starts`, or zeros, for queries of type `dtype`; `starts` may have one row
        where all are alike."""
        self.bias: Tensor | None = None
        self.blocks: BlockMask | None = None
        self.window = window
        first = first_keys(starts, window)
        if attention_backend(starts.device, dtype, head_dim) == "flex":
            self.blocks = _block_mask(first)
        else:
            self.bias = _score_bias(first, dtype)


def _score_bias(first: Tensor, dtype: torch.dtype) -> Tensor:
    place = torch.arange(first.shape[1], device=first.device)
    seen = (place <= place[:, None]) & (place >= first[:, :, None])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        seen.logical_not_(), float("-inf")
    )[:, None]


def _block_mask(first: Tensor) -> BlockMask:
    """The mask in blocks, from the places of first keys alone.

    `create_block_mask` finds the same blocks by looking at all `seq * seq` pairs of every row, or
    after a compilation for every length. First keys never fall along a row, so a block's first and
    last query say what all of its queries see: together the keys from the first one's first key to
    the last, each of them the keys from the last one's first key to the first.
    """
    seq = first.shape[1]
    begin = torch.arange(0, seq, BLOCK_SIZE, device=first.device)
    end = (begin + BLOCK_SIZE - 1).clamp(max=seq - 1)
    lowest, highest = first[:, begin, None], first[:, end, None]
    seen = (begin <= end[:, None]) & (end >= lowest)
    # A row's incomplete last block is never full: it also has queries past the row's end.
    is_complete = (begin + BLOCK_SIZE <= seq)[:, None]
    full = (begin >= highest) & (end <= begin[:, None]) & is_complete
    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=_mask_function(first.int()),
        seq_lengths=(seq, seq),
    )


def _mask_function(first: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    # A mask of one row serves any batch, whose row numbers the kernel passes all the same.
    if first.shape[0] == 1:
        row = first[0]
        return lambda batch, head, query, key: (key <= query) & (key >= row[query])
    return lambda batch, head, query, key: (key <= query) & (key >= first[batch, query])


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`(batch, rows, columns)` to counts `(batch, 1, rows)` and the columns, chosen ones first."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None].contiguous()

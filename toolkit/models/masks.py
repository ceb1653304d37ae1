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

from toolkit.models.kernels import MaskedBackend, attention_backend

BLOCK_SIZE = 128
"""Queries and keys per block of flex attention, as its kernels are tuned for."""

Ranges = tuple[range, ...]
"""Places of a row, in ascending order."""


def take(x: Tensor, ranges: Ranges, dim: int) -> Tensor:
    """What `x` has at these places along `dim`, one range after another."""
    return torch.cat([x.narrow(dim, part.start, len(part)) for part in ranges], dim)


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
        bias: `(batch, 1, queries, seq)`, 0 or -inf, in the type of the queries: SDPA makes the same
            of a boolean mask, but in every layer and keeps each for backward. Or None.
        blocks: for flex attention, or None.
        window: keys that a query sees at most; None: all before it in its document.
        queries: ranges of places, ascending, where there are queries; None: all of the row.
    """

    __slots__ = ("bias", "blocks", "queries", "window")

    def __init__(
        self,
        starts: Tensor,
        *,
        window: int | None = None,
        dtype: torch.dtype,
        head_dim: int,
        queries: Ranges | None = None,
        backend: MaskedBackend | None = None,
    ) -> None:
        """From `document_starts` of the whole row, or zeros, for queries of type `dtype`; `starts`
        may have one row where all are alike. `backend`: what it is for; None: the best one here."""
        self.bias: Tensor | None = None
        self.blocks: BlockMask | None = None
        self.window = window
        self.queries = queries
        first = first_keys(starts, window)
        every = torch.arange(starts.shape[1], device=starts.device)
        places = every
        if queries is not None:
            places, first = take(every, queries, dim=0), take(first, queries, dim=1)
        if (backend or attention_backend(starts.device, dtype, head_dim)) == "flex":
            self.blocks = block_mask(first) if queries is None else block_mask(first, places, every)
        else:
            self.bias = score_bias(first, dtype, places, every)


def score_bias(first: Tensor, dtype: torch.dtype, queries: Tensor, keys: Tensor) -> Tensor:
    """`(batch, 1, queries, keys)`: 0 where a query sees a key, -inf elsewhere. `queries` and `keys`
    are their places, `first`, `(batch, queries)`, the first key of each query."""
    seen = (keys <= queries[:, None]) & (keys >= first[:, :, None])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        seen.logical_not_(), float("-inf")
    )[:, None]


def block_mask(
    first: Tensor, queries: Tensor | None = None, keys: Tensor | None = None
) -> BlockMask:
    """The same in blocks, from the places of first keys alone; default: all places of a row.

    `create_block_mask` finds the same blocks by looking at all pairs of every row, or after a
    compilation for every length. Places ascend and first keys never fall along them, so a block's
    first and last query say what all of its queries see: together the keys from the first one's
    first key to the last, each of them the keys from the last one's first key to the first.
    """
    function = _mask_function(first.int(), queries, keys)
    if queries is None or keys is None:
        queries = keys = torch.arange(first.shape[1], device=first.device)
    begin, end, is_whole = _blocks(len(queries), first.device)
    lowest, highest = first[:, begin, None], first[:, end, None]
    earliest, latest = queries[begin][:, None], queries[end][:, None]
    begin, end, has_all_keys = _blocks(len(keys), first.device)
    begin, end = keys[begin], keys[end]
    seen = (begin <= latest) & (end >= lowest)
    # A row's incomplete last block is never full: it also has queries or keys past the row's end.
    full = (begin >= highest) & (end <= earliest) & is_whole[:, None] & has_all_keys
    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=function,
        seq_lengths=(len(queries), len(keys)),
    )


def _blocks(number: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block its first and last index, and whether it is complete."""
    begin = torch.arange(0, number, BLOCK_SIZE, device=device)
    end = (begin + BLOCK_SIZE - 1).clamp(max=number - 1)
    return begin, end, begin + BLOCK_SIZE <= number


def _mask_function(
    first: Tensor, queries: Tensor | None, keys: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    # A mask of one row serves any batch, whose row numbers the kernel passes all the same.
    row, is_shared = first[0], first.shape[0] == 1
    if queries is None or keys is None:
        if is_shared:
            return lambda batch, head, query, key: (key <= query) & (key >= row[query])
        return lambda batch, head, query, key: (key <= query) & (key >= first[batch, query])
    own, places = queries.int(), keys.int()
    if is_shared:
        return lambda batch, head, query, key: (
            (places[key] <= own[query]) & (places[key] >= row[query])
        )
    return lambda batch, head, query, key: (
        (places[key] <= own[query]) & (places[key] >= first[batch, query])
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`(batch, rows, columns)` to counts `(batch, 1, rows)` and the columns, chosen ones first."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None].contiguous()

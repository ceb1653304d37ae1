"""Several documents in one row: positions start over, attention stays inside.

1. `document_starts` finds, once per forward, where the document of each token begins.
2. A token's position is counted from there.
3. The query at place q of its row may see the keys from start[q] to q, and no others.
   `AttentionMask` writes that down once for all layers, in the form that the device's kernel wants:
   blocks of keys for flex attention, values added to the scores for masked SDPA.

Rows without documents take none of these steps: plain causal attention is faster.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from toolkit.models.compile import allow_recompilations

BLOCK_SIZE = 128
"""Queries and keys per block of flex attention, as its kernels are tuned for."""

SMALLEST_FLEX_HEAD = 16
"""Flex attention's CUDA kernels take no narrower heads."""


def attention_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int
) -> Literal["flex", "sdpa"]:
    """How rows of documents are attended.

    "flex": skips the blocks between documents, trains on CUDA only and needs Triton; chosen over
    kernels for sequences of varying length (`varlen_attn`), which know no fp32 and whose number of
    documents the host would have to wait for. "sdpa": any device and type, all scores computed.
    """
    fits = device.type == "cuda" and dtype.itemsize <= 4 and head_dim >= SMALLEST_FLEX_HEAD
    return "flex" if fits and find_spec("triton") is not None else "sdpa"


def document_starts(document_ids: Tensor) -> Tensor:
    """Place in its row where each token's document begins, `(batch, seq)` int64.

    A document is a stretch of equal numbers in `document_ids`, `(batch, seq)` of integers.
    """
    place = torch.arange(document_ids.shape[1], device=document_ids.device)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(is_first, place, 0).cummax(dim=1).values


def document_positions(starts: Tensor) -> Tensor:
    """Position of each token in its document, `(batch, seq)` int64."""
    return torch.arange(starts.shape[1], device=starts.device) - starts


class AttentionMask:
    """Which keys each query sees, for all layers of one forward.

    A plain object, as `RotaryTable` is: engines would cast or move the tensors of another.

    Attributes:
        bias: `(batch, 1, seq, seq)`, 0 or -inf, in the type of the queries: SDPA makes the same of
            a boolean mask, but in every layer and keeps each for backward. Or None.
        blocks: for flex attention, or None.
    """

    __slots__ = ("bias", "blocks")

    def __init__(self, starts: Tensor, *, dtype: torch.dtype, head_dim: int) -> None:
        """From `document_starts` for queries of type `dtype`."""
        self.bias: Tensor | None = None
        self.blocks: BlockMask | None = None
        if attention_backend(starts.device, dtype, head_dim) == "flex":
            self.blocks = _block_mask(starts)
        else:
            self.bias = _score_bias(starts, dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None) -> Tensor:
    """Causal attention, inside documents where there is a mask.

    Args:
        query: `(batch, heads, seq, head_dim)`.
        key, value: the same with as many heads or, for grouped queries, fewer.

    Returns:
        `(batch, heads, seq, head_dim)`.
    """
    grouped = query.shape[1] != key.shape[1]
    if mask is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    if mask.blocks is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask.bias, enable_gqa=grouped
        )
    # Inside a compiled block it becomes part of the block's graph.
    flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    return flex(query, key, value, block_mask=mask.blocks, enable_gqa=grouped)


def _score_bias(starts: Tensor, dtype: torch.dtype) -> Tensor:
    place = torch.arange(starts.shape[1], device=starts.device)
    seen = (place <= place[:, None]) & (place >= starts[:, :, None])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        seen.logical_not_(), float("-inf")
    )[:, None]


def _block_mask(starts: Tensor) -> BlockMask:
    """The mask in blocks, from the places of first tokens alone.

    `create_block_mask` finds the same blocks by looking at all `seq * seq` pairs of every row, or
    after a compilation for every length. Starts never fall along a row, so a block's first and last
    query say what all of its queries see: together the keys from the first one's start to the
    last, each of them the keys from the last one's start to the first.
    """
    seq = starts.shape[1]
    first = torch.arange(0, seq, BLOCK_SIZE, device=starts.device)
    last = (first + BLOCK_SIZE - 1).clamp(max=seq - 1)
    lowest, highest = starts[:, first, None], starts[:, last, None]
    seen = (first <= last[:, None]) & (last >= lowest)
    # A row's incomplete last block is never full: it also has queries past the row's end.
    is_complete = (first + BLOCK_SIZE <= seq)[:, None]
    full = (first >= highest) & (last <= first[:, None]) & is_complete
    starts = starts.int()

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[batch, query])

    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK_SIZE,
        mask_mod=sees,
        seq_lengths=(seq, seq),
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """`(batch, rows, columns)` to counts `(batch, 1, rows)` and the columns, chosen ones first."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], columns.int()[:, None].contiguous()


@cache
def _compiled_flex_attention() -> Any:
    """Fused; without compilation it would write out all scores."""
    allow_recompilations()
    return torch.compile(flex_attention, dynamic=False)

"""Context parallelism: the ranks of a group share the positions of each row.

1. Every rank is given whole rows: token ids and labels are small. It takes its own places of them,
   and knows the position and the document of each from the whole row.
2. It computes all that is done token by token for its own tokens alone: embeddings, norms,
   projections, feed-forwards, the head and the loss.
3. Attention is where ranks meet, by one of three styles:

       allgather   keys and values of the whole row come to every rank; any mask, any soft cap
       ulysses     each rank attends with a share of the heads over whole rows, whose queries, keys
                   and values it gets from all the others (Jacobs et al. 2023)
       ring        keys and values travel from rank to rank, and each rank adds up what its queries
                   see of them; see `ring_attention.py` (Liu et al. 2023)

4. The sums of the loss that come out are of a rank's own positions. To an engine the ranks are data
   parallel: their gradients are summands of the whole one.

Causal attention gives late queries more to do than early ones, so with `head_tail` a rank has two
stretches of the row: the r-th from its beginning and the r-th from its end.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from toolkit.distributed.collectives import (
    all_gather,
    all_reduce,
    all_to_all_rows,
    gathered,
    reduce_scattered,
    share_of_gradient,
)
from toolkit.distributed.config import ContextParallelConfig, ContextStyle
from toolkit.distributed.layout import padded_length
from toolkit.distributed.ring_attention import ring
from toolkit.distributed.shared_rows import SharedRows
from toolkit.models.attention import Attention, attend
from toolkit.models.config import TransformerConfig
from toolkit.models.feed_forward import MoE
from toolkit.models.layer_inputs import MaskMaker, row_masks
from toolkit.models.log_probs import TokenValues
from toolkit.models.loss import IGNORE_INDEX
from toolkit.models.masks import AttentionMask, document_starts, take
from toolkit.models.router import RouterSums
from toolkit.models.transformer import Transformer, check_rows


def apply_context_parallel(
    model: nn.Module,
    group: dist.ProcessGroup,
    *,
    style: ContextStyle = "allgather",
    load_balance: Literal["head_tail", "none"] = "head_tail",
    multiple_of: int = 1,
) -> None:
    """Let the ranks of `group` share the positions of rows, in place.

    `model.forward` goes on to take whole rows. With labels it gives the sums over this rank's own
    positions, without them the logits of whole rows on every rank. Rows are padded on the right
    where their length does not divide. A stage of a pipeline without the embeddings takes and gives
    the residual stream of this rank's own positions.

    Args:
        model: a `Transformer` or a stage of one, whose attention may have some of the heads.
        load_balance: which places a rank has. Ulysses computes whole rows, which are balanced, and
            wants them in order: it always has "none".
        multiple_of: ranks that share the positions of a rank further (tensor parallelism).

    `check_sizes` refuses what a style cannot compute: soft caps in a ring, heads that Ulysses'
    ranks cannot share.
    """
    assert isinstance(model, Transformer)
    config = ContextParallelConfig(degree=group.size(), style=style, load_balance=load_balance)
    rows = SharedRows(group, stretches=config.stretches)
    attend_shared, masks = _STYLES[style](rows)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend_shared
        if isinstance(module, MoE):
            _share_router_losses(module, group)
    model.masks = masks
    forward: Any = _Forward(model, rows, multiple_of).forward
    model.forward = forward  # type: ignore[method-assign]


class _Forward:
    """A forward over whole rows, of which the model computes this rank's places."""

    def __init__(self, model: Transformer, rows: SharedRows, multiple_of: int) -> None:
        self._model, self._rows = model, rows
        self._inner = model.forward
        self._multiple_of = multiple_of

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        z_loss_multiplier: float = 0.0,
    ) -> Any:
        """As `Transformer.forward`; see `apply_context_parallel`. Without labels and document ids
        a stage after the first cannot know of padding: its logits are of padded rows."""
        rows, is_first = self._rows, 0 in self._model.blocks
        known = next(
            (x for x in (labels, document_ids, input_ids if is_first else None) if x is not None),
            None,
        )
        if known is None:
            length = input_ids.shape[1] * rows.ranks * self._multiple_of
            device = input_ids.device
        else:
            check_rows(self._model.config, known, document_ids)
            length, device = known.shape[1], known.device
        padded = padded_length(
            length, cp=rows.ranks, tp=self._multiple_of, stretches=rows.stretches
        )
        padding = padded - length
        place = torch.arange(padded, device=device)[None]
        longest = min(length, self._model.config.max_sequence_length)
        positions, starts = place.clamp(max=longest - 1), None
        if document_ids is not None:
            starts = document_starts(document_ids)
            if padding:  # each token of it is a document
                starts = torch.cat((starts, place[:, length:].expand(len(starts), -1)), dim=1)
            positions = place - starts
        if is_first:
            input_ids = rows.own(pad(input_ids, (0, padding)))
        if labels is not None:
            labels = rows.own(pad(labels, (0, padding), value=IGNORE_INDEX))
        result = self._inner(
            input_ids,
            labels,
            positions=rows.own(positions),
            starts=starts,
            z_loss_multiplier=z_loss_multiplier,
        )
        if isinstance(result, TokenValues):
            # Every rank goes on with whole rows, alike: each has a share of their gradient.
            values = share_of_gradient(result.values, 1.0 / rows.ranks)
            values = rows.whole(all_gather(values[None], rows.group, dim=0), dim=1)
            return result._replace(values=values[:, :length].clone())
        if labels is not None or self._model.head is None:
            return result
        return rows.whole(all_gather(result[None], rows.group, dim=0), dim=1)[:, :length]


def _share_router_losses(moe: MoE, group: dist.ProcessGroup) -> None:
    """The load-balancing loss of a row is not the sum of its parts' losses: its statistics are
    added over the ranks first, in one small collective. Each rank then has its share of the loss
    and the z-loss of its own tokens, which both add up, and the load of whole rows."""
    sums_of = moe.router_sums

    def router_sums(*tokens: Tensor) -> RouterSums:
        sums = sums_of(*tokens, add=lambda statistics: all_reduce(statistics, group))
        return sums._replace(balance=sums.balance / group.size())

    moe.router_sums = router_sums


def _allgather(rows: SharedRows) -> tuple[Callable[..., Tensor], MaskMaker]:
    def attend_whole(
        query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Tensor:
        assert mask is not None, "causal attention of a part of the row has a mask"
        key, value = _WholeKeys.apply(key, value, rows)
        return attend(query, key, value, mask, **options)

    def masks(
        config: TransformerConfig, x: Tensor, starts: Tensor | None, length: int, **options: Any
    ) -> Callable[[int | None], AttentionMask]:
        length *= rows.ranks
        if starts is None:
            starts = torch.zeros(1, length, dtype=torch.int64, device=x.device)
        make = partial(
            AttentionMask,
            starts,
            dtype=x.dtype,
            head_dim=config.attention_head_dim,
            queries=rows.places(length)[rows.rank],
            **options,
        )

        @cache
        def mask(window: int | None) -> AttentionMask:
            return make(window=window)

        return lambda window: mask(None if window is None or window >= length else window)

    return attend_whole, masks


class _WholeKeys(torch.autograd.Function):
    """Keys and values `(batch, heads, own, head_dim)` of the whole row, in one collective."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, rows: SharedRows) -> tuple[Tensor, Tensor]:
        ctx.rows = rows
        parts = gathered(torch.stack((key, value))[None], rows.group, 0)
        whole_key, whole_value = rows.whole(parts, dim=3)
        return whole_key, whole_value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor, None]:
        rows: SharedRows = ctx.rows
        parts = [
            torch.stack([take(grad, ranges, dim=2) for grad in (grad_key, grad_value)])
            for ranges in rows.places(grad_key.shape[2])
        ]
        key, value = reduce_scattered(torch.stack(parts), rows.group, 0)[0]
        return key, value, None


def _ulysses(rows: SharedRows) -> tuple[Callable[..., Tensor], MaskMaker]:
    group, ranks = rows.group, rows.ranks

    def attend_with_own_heads(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *,
        sinks: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if sinks is not None:
            sinks = sinks.chunk(ranks)[rows.rank]
        # Fewer keys than ranks are repeated until each rank has whole ones.
        copies = ranks // math.gcd(key.shape[1], ranks)
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        # `(ranks, batch, heads of a rank, own, head_dim)`, all three side by side.
        split = [x.unflatten(1, (ranks, -1)) for x in (query, key, value)]
        sizes = [x.shape[2] for x in split]
        sent = torch.cat(split, dim=2).transpose(0, 1)
        query, key, value = rows.whole(_exchanged(sent, group), dim=2).split(sizes, dim=1)
        out = attend(query, key, value, mask, sinks=sinks, **options)
        back = out.unflatten(2, (ranks, -1)).movedim(2, 0)
        return _exchanged(back, group).transpose(0, 1).flatten(1, 2)

    def masks(
        config: TransformerConfig, x: Tensor, starts: Tensor | None, length: int, **options: Any
    ) -> Callable[[int | None], AttentionMask | None]:
        # As without context parallelism.
        return row_masks(config, x, starts, length * ranks, **options)

    return attend_with_own_heads, masks


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`x[r]` to rank r, from which comes the r-th of the result."""
    one = [1] * group.size()
    return all_to_all_rows(x, group, sent=one, received=one)


_STYLES: dict[str, Callable[[SharedRows], tuple[Callable[..., Tensor], MaskMaker]]] = {
    "allgather": _allgather,
    "ulysses": _ulysses,
    "ring": ring,
}

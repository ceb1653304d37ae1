"""Causal self-attention with grouped key/value heads, by the fastest kernel that computes it.

- No mask, no soft cap, no sinks: SDPA's causal kernels.
- A mask on CUDA: flex attention over blocks of keys, which knows soft caps and sinks too.
- A mask elsewhere: SDPA with values added to the scores; or, as SDPA knows neither soft caps nor
  sinks, the scores written out. With a window or queries of a part of the row (not on CUDA), or
  written out, some queries at a time with the keys that these may see: a window of 256 in a row of
  2048 costs a third of the whole on a CPU.
- On a CPU with AVX-512, where it is compiled and has no soft cap: `blockwise_attention`.

`toolkit.models.kernels` says why.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from toolkit.models.blockwise import QueryBlock, blockwise_attention, computes_in_blocks
from toolkit.models.compile import allow_recompilations
from toolkit.models.config import TransformerConfig
from toolkit.models.kernels import sdpa_form
from toolkit.models.masks import AttentionMask
from toolkit.models.normalized import scaled_units
from toolkit.models.norms import build_norm, widened
from toolkit.models.projections import projected
from toolkit.models.rope import RotaryTable, rotate

PIECE_SIZE = 256
"""Fewest queries of a piece."""

SMALLER_PIECE_SIZE = 128
"""The same for `blockwise_attention`, whose pieces cost less: nothing is kept of each."""

MOST_PIECES = 8
"""Pieces of a long row; each is a part of its own in a compiled block's graph."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    may_block: bool = True,
) -> Tensor:
    """Causal attention, inside documents and windows where there is a mask.

    Args:
        query: `(batch, heads, seq, head_dim)`; the result has this shape. `mask.queries` says which
            places of the row these are.
        key, value: of the whole row, with as many heads or, for grouped queries, fewer.
        mask: None where each query sees all before it in its row. Needed with a soft cap or sinks.
        scale, soft_cap: see `Architecture`.
        sinks: `(heads,)`, the score of nothing; see `Architecture.attention_sinks`.
        may_block: whether `blockwise_attention` may take SDPA's place.
    """
    window: int | None = None
    bias: Tensor | None = None
    ranges: Sequence[range] = (range(query.shape[2]),)
    if mask is not None:
        window, bias, ranges = mask.window, mask.bias, mask.queries or ranges
    is_plain = soft_cap is None and sinks is None
    if may_block and is_plain and (mask is None or mask.blocks is None):
        blocks = _blocks(ranges, window, SMALLER_PIECE_SIZE)
        if computes_in_blocks(query, blocks):
            return blockwise_attention(query, key, value, bias, blocks, scale)
    if mask is None:
        return _sdpa(query, key, value, None, scale)
    if mask.blocks is not None:
        # Inside a compiled block it becomes part of the block's graph.
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
        options = {
            "score_mod": None if soft_cap is None else _capped(soft_cap),
            "block_mask": mask.blocks,
            "scale": scale,
            "enable_gqa": query.shape[1] != key.shape[1],
        }
        if sinks is None:
            return flex(query, key, value, **options)
        out, aux = flex(query, key, value, **options, return_aux=AuxRequest(lse=True))
        # The share of the softmax that is not the sink's.
        share = (aux.lse - widened(sinks)[:, None]).sigmoid()[..., None]
        return (widened(out) * share).to(out.dtype)
    assert mask.bias is not None
    is_square = mask.window is None and mask.queries is None
    if is_plain and (is_square or query.device.type == "cuda"):
        # The fused kernel of CUDA wants a bias whose rows are aligned: not cut at any key.
        return _sdpa(query, key, value, mask.bias, scale)
    parts = []
    for start, end, first, last in _blocks(ranges, window, PIECE_SIZE):
        seen = (
            query[:, :, start:end],
            key[:, :, first:last],
            value[:, :, first:last],
            mask.bias[:, :, start:end, first:last],
            scale,
        )
        parts.append(_sdpa(*seen) if is_plain else _written_out(*seen, soft_cap, sinks))
    return torch.cat(parts, dim=2)


def _blocks(ranges: Sequence[range], window: int | None, least: int) -> list[QueryBlock]:
    """Blocks of at least so many queries, whose places in the row are `ranges`."""
    blocks, row = [], 0
    for places in ranges:
        rows = max(least, -(-len(places) // MOST_PIECES))
        for start in range(places.start, places.stop, rows):
            end = min(start + rows, places.stop)
            first = 0 if window is None else max(0, start - window + 1)
            blocks.append(QueryBlock(row, row + end - start, first, end))
            row += end - start
    return blocks


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> Tensor:
    """SDPA, causal where there is no bias, in the form that a fused kernel takes."""
    groups, head_dim, has_bias = query.shape[1] // key.shape[1], query.shape[3], bias is not None
    form = sdpa_form(
        query.device.type,
        dtype=query.dtype,
        head_dim=head_dim,
        is_grouped=groups > 1,
        has_bias=has_bias,
    )
    if form.repeats_heads:
        key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    if form.padding:
        scale = head_dim**-0.5 if scale is None else scale
        query, key, value = (pad(heads, (0, form.padding)) for heads in (query, key, value))
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        is_causal=not has_bias,
        scale=scale,
        enable_gqa=groups > 1 and not form.repeats_heads,
    )
    return out[..., :head_dim] if form.padding else out


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a soft cap or sinks, which SDPA does not know."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    rows = query.shape[2]
    # Types are chosen here: products in the compute type, the rest in fp32.
    with torch.autocast(query.device.type, enabled=False):
        # Queries of one group are rows of one matrix: keys and values are not repeated.
        grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        products = widened(grouped @ key.transpose(2, 3))
        if soft_cap is None:
            scores = products * scale
        else:
            scores = (products * (scale / soft_cap)).tanh() * soft_cap
        seen = scores.unflatten(2, (-1, rows)) + bias[:, :, None]
        if sinks is None:
            weights = seen.softmax(-1)
        else:
            sink = widened(sinks).view(1, key.shape[1], -1, 1, 1).expand(*seen.shape[:-1], 1)
            weights = torch.cat((seen, sink), dim=-1).softmax(-1)[..., :-1]
        weights = weights.to(value.dtype).flatten(2, 3)
        return (weights @ value).unflatten(2, (-1, rows)).flatten(1, 2)


def _capped(soft_cap: float) -> Any:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return soft_cap * torch.tanh(score / soft_cap)

    return capped


@cache
def compiled_flex_attention() -> Any:
    """Fused; without compilation it would write out all scores."""
    allow_recompilations()
    return torch.compile(flex_attention, dynamic=False)


class Attention(nn.Module):
    """Multi-head or grouped-query attention.

    Layers differ in nothing that is kept here: window and angles come with each call, so that one
    compilation serves all layers of a kind.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.attention_head_dim
        self.scale = config.attention_scale
        self.soft_cap = config.attention_soft_cap
        self.clip = config.clip_qkv
        self.may_block = True
        """See `attend`."""
        self.norm_per_head = config.qk_norm == "per_head"
        self.attend: Callable[..., Tensor] = attend
        """Attention of whole heads; who splits rows over ranks puts another in its place."""
        query_width = config.num_heads * self.head_dim
        key_width = config.kv_heads * self.head_dim
        bias = config.has_qkv_bias
        self.query = nn.Linear(config.d_model, query_width, bias=bias)
        self.key = nn.Linear(config.d_model, key_width, bias=bias)
        self.value = nn.Linear(config.d_model, key_width, bias=bias)
        self.output = nn.Linear(query_width, config.d_model, bias=config.has_attention_output_bias)
        self.gate: nn.Module | None = None
        if config.gate_width:
            self.gate = nn.Linear(config.d_model, config.gate_width, bias=bias)
        self.sinks: nn.Parameter | None = None
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.empty(config.num_heads))
        self.query_scale: nn.Parameter | None = None
        self.key_scale: nn.Parameter | None = None
        if config.is_normalized:
            self.scale = self.head_dim**0.5
            self.scale_factor = config.d_model**0.5
            self.query_scale = nn.Parameter(torch.empty(query_width))
            self.key_scale = nn.Parameter(torch.empty(key_width))
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if config.qk_norm != "none":
            if self.norm_per_head:
                query_width = key_width = self.head_dim
            self.query_norm = build_norm(config, query_width)
            self.key_norm = build_norm(config, key_width)

    def forward(
        self, x: Tensor, rotary: RotaryTable | None, mask: AttentionMask | None = None
    ) -> Tensor:
        """`(batch, seq, d_model)` to the same shape; see `LayerInputs` and `attend`."""
        batch, seq, _ = x.shape
        layers: list[nn.Module] = [self.query, self.key, self.value]
        if self.gate is not None:
            layers.append(self.gate)
        query, key, value, *gates = projected(x, *layers)
        query = self._heads(query, self.query_norm)
        key = self._heads(key, self.key_norm)
        value = self._heads(value, None)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if self.query_scale is not None and self.key_scale is not None:
            query = scaled_units(query, self.query_scale, self.scale_factor)
            key = scaled_units(key, self.key_scale, self.scale_factor)
        heads = (x.transpose(1, 2) for x in (query, key, value))
        attended = self.attend(
            *heads,
            mask,
            scale=self.scale,
            soft_cap=self.soft_cap,
            # Rounded first, as the weights of norms are.
            sinks=None if self.sinks is None else self.sinks.to(x.dtype),
            may_block=self.may_block,
        ).transpose(1, 2)
        for gate in gates:
            attended = attended * gate.unflatten(-1, (attended.shape[2], -1)).sigmoid()
        return self.output(attended.reshape(batch, seq, -1))

    def _heads(self, projected: Tensor, norm: nn.Module | None) -> Tensor:
        """`(batch, seq, heads * head_dim)`, normalised and clipped, as `(batch, seq, heads,
        head_dim)`."""
        if norm is not None and not self.norm_per_head:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.norm_per_head:
            heads = norm(heads)
        return heads if self.clip is None else heads.clamp(-self.clip, self.clip)

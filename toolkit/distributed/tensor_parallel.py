"""Tensor parallelism: ranks share each matrix product, and between two of them the positions of a
row.

What happens to a row on `tp` ranks, each of which is given the whole row:
1. Each rank looks up the tokens whose embeddings it has; a reduce-scatter leaves each with 1/tp of
   the row's positions. Norms and additions of the residual stream happen there (sequence
   parallelism, Korthikanti et al. 2022).
2. Before attention an all-gather brings the whole row to every rank. Each computes its own heads,
   and a reduce-scatter adds up what they contribute to the residual stream and hands out positions
   again. The feed-forward does the same with the channels of its hidden layer (Shoeybi et al.
   2019), a mixture of experts with those of every expert.
3. The head gathers the row a last time. Each rank makes the logits of its rows of the vocabulary;
   ranks tell one another the largest one, the sum of exponentials and the target's logit.

What a rank holds of each parameter, with the gradient that backward leaves there:

    query, key, value, gate, up       its output channels; whole (sinks and scales as well)
    attention.output, down            its input channels; whole
    key and value of a shared head    the head; a summand (fewer key/value heads than ranks)
    embeddings.tokens, head           its rows of the vocabulary; whole
    query_norm, key_norm of all heads its channels; as query and key
    all others                        all of it; a summand (of its positions, or heads)

Modules hold plain tensors, and the table of shards says what they are. The collectives are in the
type of what is computed.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

from toolkit.distributed.collectives import (
    all_gather,
    gathered,
    reduce_scatter,
    share_of_gradient,
)
from toolkit.distributed.layout import padded_length
from toolkit.distributed.shards import ShardSpec
from toolkit.distributed.shared_norm import shared_norm
from toolkit.models.attention import Attention
from toolkit.models.delta_net import GatedDeltaNet
from toolkit.models.embeddings import Embeddings, Head
from toolkit.models.init import canonical_parameters
from toolkit.models.loss import IGNORE_INDEX, VocabularyShard
from toolkit.models.masks import document_positions, document_starts
from toolkit.models.normalized import NormalizedFeedForward
from toolkit.models.norms import LayerNorm
from toolkit.models.router import RouterSums
from toolkit.models.transformer import Transformer, check_rows

AXIS = "tp"


def apply_tensor_parallel(
    model: Transformer,
    group: dist.ProcessGroup,
    shards: dict[str, ShardSpec],
    *,
    experts_are_sharded: bool = False,
) -> None:
    """Cut the parameters of `model` over the ranks of `group`, in place, and let its modules
    compute with what is left; `shards` says afterwards what that is.

    `model.forward` keeps its arguments and results: every rank gives whole rows and has the same
    sums, or logits of whole rows over the whole vocabulary. A row's length need not divide: rows
    are padded on the right inside. Between the stages of a pipeline, the residual stream has this
    rank's 1/tp of the positions, rounded up; without labels and documents, a stage after the first
    cannot know of padding, and gives the logits of padded rows.

    The model may have adapters, frozen parameters, no embeddings, no head, or no storage yet. Its
    sizes must divide: heads, hidden widths, padded vocabulary; key/value heads divide the number of
    ranks or are divided by it.

    Args:
        experts_are_sharded: routed experts already lie on several ranks. They stay as they are, and
            each rank routes the tokens of its own positions.
    """
    cut = _Cut(model, group, shards)
    blocks: Any = model.blocks
    for block in blocks:
        if isinstance(block.attention, GatedDeltaNet):
            _share_delta_net(block.attention, cut)
        else:
            _share_attention(block.attention, cut)
        if not block.has_experts:
            _share_feed_forward(block.feed_forward, cut)
            _exchange_rows(block.feed_forward, block.feed_forward.down, group)
        elif experts_are_sharded:
            _share_moe_of_sharded_experts(block.feed_forward, cut)
        else:
            _share_moe(block.feed_forward, cut)
    if model.embeddings is not None:
        _share_embeddings(model.embeddings, cut)
    if model.head is not None:
        _share_head(model.head, cut)
    cut.mark_whole_parameters()
    _take_whole_rows(model, group)


class _Cut:
    """Cuts the parameters of one model and writes down what is left of each."""

    def __init__(
        self, model: Transformer, group: dist.ProcessGroup, shards: dict[str, ShardSpec]
    ) -> None:
        self.config = model.config
        self.group = group
        self.size, self.rank = group.size(), group.rank()
        self._shards = shards
        # By identity: modules of adapters hide the names.
        self._names = {id(p): name for name, p in canonical_parameters(model).items()}
        self._left = dict.fromkeys(self._names.values())

    def cut(self, module: nn.Module, key: str, dim: int, *, heads: int | None = None) -> None:
        """Leave `module` this rank's range of the parameter `key` along `dim`. `heads`: the
        dimension is of so many heads, which ranks share if they are fewer."""
        parameter = getattr(module, key)
        if parameter is None:
            return
        ranges = self.size if heads is None else min(self.size, heads)
        copies = self.size // ranges
        length, rest = divmod(parameter.shape[dim], ranges)
        name = self._names[id(parameter)]
        assert not rest, f"{name}: {parameter.shape[dim]} is not divisible by {ranges}"
        start = self.rank // copies * length
        part = parameter.detach().narrow(dim, start, length).clone()
        setattr(module, key, nn.Parameter(part.contiguous(), parameter.requires_grad))
        self._note(name, copies, dim=dim, start=start, length=length)

    def output_channels(self, module: Any, *, heads: int | None = None) -> None:
        """Of a linear layer, with an adapter or without."""
        base = _base(module)
        self.cut(base, "weight", 0, heads=heads)
        self.cut(base, "bias", 0, heads=heads)
        if base is not module:
            self.cut(module.lora_B, "weight", 0, heads=heads)
            self.cut(module, "lora_magnitude", 0, heads=heads)

    def input_channels(self, module: Any) -> None:
        """Of a linear layer, with an adapter or without, whose bias stays whole."""
        base = _base(module)
        self.cut(base, "weight", 1)
        if base is not module:
            self.cut(module.lora_A, "weight", 1)
            module.add_columns = lambda squares: gathered(squares[None], self.group, 0).sum(0)
            if module.dropout is not None:
                module.dropout.first_channel = self.rank * base.weight.shape[1]

    def leave(self, module: nn.Module) -> None:
        """What somebody else has cut stays as the table has it."""
        for parameter in module.parameters():
            self._left.pop(self._names[id(parameter)])

    def mark_whole_parameters(self) -> None:
        """All that has not been cut or left: every rank has all of it and uses it for a part."""
        for name in list(self._left):
            self._note(name, self.size)

    def _note(self, name: str, copies: int, **cut: Any) -> None:
        spec = self._shards[name]
        partial = (*spec.partial_over, AXIS) if copies > 1 else spec.partial_over
        copies *= spec.copies
        self._shards[name] = spec._replace(copies=copies, partial_over=partial, **cut)
        self._left.pop(name)


def _share_attention(attention: Attention, cut: _Cut) -> None:
    config = cut.config
    cut.output_channels(attention.query)
    cut.output_channels(attention.key, heads=config.kv_heads)
    cut.output_channels(attention.value, heads=config.kv_heads)
    cut.input_channels(attention.output)
    if attention.gate is not None:
        cut.output_channels(attention.gate)
    cut.cut(attention, "sinks", 0)
    cut.cut(attention, "query_scale", 0)
    cut.cut(attention, "key_scale", 0, heads=config.kv_heads)
    if not attention.norm_per_head:
        for norm, heads in (
            (attention.query_norm, config.num_heads),
            (attention.key_norm, config.kv_heads),
        ):
            if norm is not None:
                _share_norm(norm, heads, cut)
    _exchange_rows(attention, attention.output, cut.group)


def _share_delta_net(attention: GatedDeltaNet, cut: _Cut) -> None:
    """Each rank has some key heads with their value heads, and the states of these."""
    for layer in ("query", "key", "value", "gate", "decay", "write"):
        cut.output_channels(getattr(attention, layer))
    for key in ("query_conv", "key_conv", "value_conv", "A_log", "dt_bias"):
        cut.cut(attention, key, 0)
    cut.input_channels(attention.output)
    _exchange_rows(attention, attention.output, cut.group)


def _share_norm(norm: Any, heads: int, cut: _Cut) -> None:
    """An RMSNorm or LayerNorm over the channels of all heads, whose statistics are of all ranks."""
    width, copies = norm.weight.shape[0], max(1, cut.size // heads)
    cut.cut(norm, "weight", 0, heads=heads)
    if isinstance(norm, LayerNorm):
        cut.cut(norm, "bias", 0, heads=heads)
    norm.forward = shared_norm(norm, cut.group, width * copies)


def _share_feed_forward(feed_forward: Any, cut: _Cut) -> None:
    if feed_forward.gate is not None:
        cut.output_channels(feed_forward.gate)
    if isinstance(feed_forward, NormalizedFeedForward):
        cut.cut(feed_forward, "gate_scale", 0)
        cut.cut(feed_forward, "up_scale", 0)
    cut.output_channels(feed_forward.up)
    cut.input_channels(feed_forward.down)


def _exchange_rows(module: nn.Module, last: Any, group: dist.ProcessGroup) -> None:
    """Give `module` whole rows, and add up over ranks what it makes of them, with the bias of its
    `last` linear layer once."""
    base = _base(last)
    if base.bias is not None:
        base.forward = lambda x: linear(x, base.weight)
        if base is not last:
            last.has_bias = False
    inner = module.forward

    def forward(x: Tensor, *inputs: Any) -> Tensor:
        out = reduce_scatter(inner(all_gather(x, group), *inputs), group)
        return out if base.bias is None else out + base.bias.to(out.dtype)

    module.forward = forward


def _share_moe(moe: Any, cut: _Cut) -> None:
    """Every rank routes all tokens, alike, and computes some channels of every expert."""
    group, inner = cut.group, moe.forward
    cut.cut(moe.experts, "gate", 1)
    cut.cut(moe.experts, "up", 1)
    cut.cut(moe.experts, "down", 2)
    for name, adapter in moe.experts.adapters.items():
        if name == "down":
            cut.cut(adapter.lora_A, "weight", 2)
        else:
            cut.cut(adapter.lora_B, "weight", 1)
    if moe.shared is not None:
        _share_feed_forward(moe.shared, cut)

    def forward(x: Tensor, is_target: Tensor | None = None) -> tuple[Tensor, RouterSums | None]:
        out, sums = inner(all_gather(x, group), is_target)
        return reduce_scatter(out, group), _counted_once(sums, cut.size)

    moe.forward = forward


def _share_moe_of_sharded_experts(moe: Any, cut: _Cut) -> None:
    """Every rank routes its own tokens; only the router's losses are of whole rows."""
    group, sums_of = cut.group, moe.router_sums
    cut.leave(moe.experts)
    if moe.shared is not None:
        _share_feed_forward(moe.shared, cut)
        _exchange_rows(moe.shared, moe.shared.down, group)

    def router_sums(
        logits: Tensor, experts: Tensor, is_target: Tensor, **options: Any
    ) -> RouterSums | None:
        by_row = (is_target.shape[0], -1)
        logits = all_gather(logits.unflatten(0, by_row), group).flatten(0, 1)
        experts = gathered(experts.unflatten(0, by_row), group, 1).flatten(0, 1)
        return _counted_once(sums_of(logits, experts, is_target, **options), cut.size)

    moe.router_sums = router_sums


def _counted_once(sums: RouterSums | None, ranks: int) -> RouterSums | None:
    """Sums that every rank has whole: the value stays, each rank has its share of the gradient."""
    if sums is None:
        return None
    # FSDP2 wants no views from what it wraps.
    balance, z = (share_of_gradient(v, 1.0 / ranks).clone() for v in (sums.balance, sums.z))
    return RouterSums(balance, z, sums.load)


def _share_embeddings(embeddings: Embeddings, cut: _Cut) -> None:
    group, size, rank = cut.group, cut.size, cut.rank
    tokens: Any = embeddings.tokens
    inner = embeddings.forward
    cut.cut(tokens, "weight", 0)
    rows = tokens.weight.shape[0]

    def look_up(ids: Tensor) -> Tensor:
        # Of others' ids some row, not always the same one: its gradient, zero, is added up often.
        found = embedding(ids % rows, tokens.weight)
        return reduce_scatter(found.masked_fill((ids // rows != rank)[..., None], 0.0), group)

    def forward(input_ids: Tensor, positions: Tensor) -> Tensor:
        return inner(input_ids, positions.chunk(size, dim=1)[rank])

    tokens.forward = look_up
    embeddings.forward = forward  # type: ignore[method-assign,assignment]


def _share_head(head: Head, cut: _Cut) -> None:
    group, size, normed = cut.group, cut.size, head.norm.forward
    if head.weight is not None:
        cut.cut(head, "weight", 0)
    cut.cut(head, "scale", 0)

    def gather(x: Tensor) -> Tensor:
        return gathered(x[None], group, 0)

    def project(hidden: Tensor, weight: Tensor) -> Tensor:
        # All ranks do the same with the logits: the sum of their gradients is `size` times it.
        logits = all_gather(linear(hidden, weight), group, dim=-1)
        return share_of_gradient(logits, 1.0 / size)

    head.norm.forward = lambda x: all_gather(normed(x), group)
    first = cut.rank * cut.config.padded_vocab_size // size
    head.loss.shard = VocabularyShard(first, size, gather)
    head.project = project


def _take_whole_rows(model: Transformer, group: dist.ProcessGroup) -> None:
    """Let `model.forward` take rows of any length, and give the modules inside their positions."""
    config, size, inner = model.config, group.size(), model.forward
    has_first_layer = 0 in model.blocks

    def forward(
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        starts: Tensor | None = None,
        z_loss_multiplier: float = 0.0,
        dropout_keys: Tensor | None = None,
    ) -> Any:
        if has_first_layer and positions is None:
            check_rows(config, input_ids, document_ids)
        if document_ids is not None and starts is None:
            starts = document_starts(document_ids)
        if positions is None and starts is not None:
            positions = document_positions(starts)
        if has_first_layer:
            length = input_ids.shape[1]
        else:
            told = [t.shape[1] for t in (positions, labels) if t is not None]
            length = told[0] if told else input_ids.shape[1] * size
        if positions is None:
            positions = torch.arange(length, device=input_ids.device)[None]
        if missing := padded_length(length, tp=size) - length:
            # Tokens that nothing sees and that have no target, in a document of their own.
            positions = pad(positions, (0, missing))
            if has_first_layer:
                input_ids = pad(input_ids, (0, missing))
            if labels is not None:
                labels = pad(labels, (0, missing), value=IGNORE_INDEX)
            if starts is not None and starts.shape[1] == length:
                starts = pad(starts, (0, missing), value=length)
        result = inner(
            input_ids,
            labels,
            positions=positions,
            starts=starts,
            z_loss_multiplier=z_loss_multiplier,
            dropout_keys=dropout_keys,
        )
        is_logits = labels is None and model.head is not None
        return result[:, :length] if is_logits else result

    model.forward = forward  # type: ignore[method-assign]


def _base(module: Any) -> Any:
    """The linear layer itself, which may have an adapter around it."""
    return getattr(module, "base_layer", module)

"""Adapters and frozen parameters: what `parameters.py` says of a config, done to its model.

A layer with an adapter lies inside a module that adds to what it computes: `AdaptedLinear`,
`AdaptedEmbedding`; stacked experts and the head are given what they add. Names stay canonical
(`init.canonical_name`): the weight of `blocks.0.attention.query` keeps its name, the adapter's are
`blocks.0.attention.query.lora_A.weight`, `....lora_B.weight` and, of DoRA, `....lora_magnitude`;
rows of tokens are `embeddings.tokens.token_rows.weight` and `head.token_rows.weight`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from toolkit.models.adapter_state import AdapterState, TokenDropout
from toolkit.models.grouped import ends_for, grouped_backend, grouped_linear
from toolkit.models.init import canonical_parameters
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import (
    TOKENS,
    TrainedParameters,
    adapted_layers,
    stacked_experts,
    trained_parameters,
)
from toolkit.models.trained_rows import TrainedRows
from toolkit.models.transformer import Transformer


def choose_trained(
    model: Transformer | nn.Module, *, freeze: Sequence[str] = (), lora: LoRAConfig | None = None
) -> TrainedParameters:
    """Add adapters to a model on the meta device, and freeze what is not trained, in place; see
    `trained_parameters`."""
    assert isinstance(model, Transformer), "names are told from a Transformer's config"
    chosen = trained_parameters(model.config, freeze=freeze, lora=lora)
    frozen = {n for n, p in canonical_parameters(model).items() if not p.requires_grad}
    if lora is not None:
        with torch.device("meta"):
            _add_adapters(model, lora)
    parameters = canonical_parameters(model)
    told = {name: info.shape for name, info in chosen.infos.items()}
    assert {name: tuple(p.shape) for name, p in parameters.items()} == told, "parameters mismatch"
    for name in frozen:  # by the caller, who may know a model of his own better
        chosen.infos[name] = chosen.infos[name]._replace(is_trained=False)
    for name, parameter in parameters.items():
        parameter.requires_grad_(chosen.infos[name].is_trained)
    return chosen


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the forward of `model` is that of the base: linear layers, embeddings, experts and
    head as if there were no adapters. (What `train_also` names has changed all the same.)
    Afterwards dropout is as before: blocks of an earlier forward may be computed again."""
    state: AdapterState | None = getattr(model, "adapters", None)
    if state is None:
        yield
        return
    keys, state.is_off = state.keys, True
    try:
        yield
    finally:
        state.keys, state.is_off = keys, False


def _add_adapters(model: Transformer, config: LoRAConfig) -> None:
    state = model.adapters = AdapterState(config.trainable_tokens)
    experts = stacked_experts(model.config)
    for name in adapted_layers(model.config, config):
        parent, _, last = name.rpartition(".")
        owner: Any = model.get_submodule(parent)
        if name in experts:
            owner.adapters[last] = AdaptedExperts(getattr(owner, last), config, state)
        elif name == TOKENS:
            setattr(owner, last, AdaptedEmbedding(owner.get_submodule(last), state, config))
        else:
            setattr(owner, last, AdaptedLinear(owner.get_submodule(last), config, state, name))
    if tokens := config.trainable_tokens:
        embeddings: Any = model.embeddings
        head, width = model.head, model.config.d_model
        if embeddings is not None:
            embeddings.tokens = AdaptedEmbedding(embeddings.tokens, state, tokens=tokens)
        if head is not None and head.weight is not None:
            head.token_rows = TrainedRows(tokens, width, state)


class AdaptedLinear(nn.Module):
    """W x + scaling * B A x; of DoRA, with each row of W + scaling * B A brought to the length that
    is its magnitude (Liu et al. 2024, equation 5, whose norm gets no gradient, section 4.3)."""

    def __init__(
        self, base_layer: nn.Module, config: LoRAConfig, state: AdapterState, name: str
    ) -> None:
        super().__init__()
        assert isinstance(base_layer, nn.Linear), f"{name} is a {type(base_layer).__name__}"
        rows, columns = base_layer.weight.shape
        self.base_layer: nn.Module = base_layer
        self.lora_A = nn.Linear(columns, config.rank, bias=False)
        self.lora_B = nn.Linear(config.rank, rows, bias=False)
        self.lora_magnitude = nn.Parameter(torch.empty(rows)) if config.dora else None
        self.scaling = config.scaling
        self.dropout = TokenDropout(config.dropout, name, state) if config.dropout else None
        self.state = state
        self.has_bias = base_layer.bias is not None
        """Whether what `base_layer` computes has its bias in it."""
        self.add_columns: Callable[[Tensor], Tensor] | None = None
        """Where ranks share the input channels: adds up what each has of the squares of norms."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        out = self.base_layer(x)
        if self.state.is_off:
            return out
        dropped = x if self.dropout is None else self.dropout(x)
        low_rank = self.lora_B(self.lora_A(dropped)) * self.scaling
        if self.lora_magnitude is None:
            return out + low_rank
        base: Any = self.base_layer
        # As in the authors' code, the base is seen through the same dropout.
        of_base = out if dropped is x else base(dropped)
        if self.has_bias:
            of_base = of_base - base.bias.to(out.dtype)
        ratio = self.lora_magnitude / self._norms().to(self.lora_magnitude.dtype)
        # As a difference from 1, which a low precision resolves better.
        return out + low_rank + (ratio - 1).to(out.dtype) * (of_base + low_rank)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """Of each row of W + scaling * B A, `(out,)`, without making that matrix."""
        base: Any = self.base_layer
        weight, down, up = base.weight, self.lora_A.weight, self.lora_B.weight
        with torch.autocast(weight.device.type, enabled=False):
            wide = torch.promote_types(weight.dtype, torch.float32)
            squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
            cross = (linear(weight, down).to(wide) * up).sum(1)
            change = (linear(up.to(wide), linear(down, down).to(wide)) * up).sum(1)
            squares = squares + 2 * self.scaling * cross + self.scaling**2 * change
            if self.add_columns is not None:
                squares = self.add_columns(squares)
            return squares.clamp(min=torch.finfo(wide).tiny).sqrt()


class AdaptedEmbedding(nn.Module):
    """The rows W + scaling * B A of token ids, or W with the rows of some tokens replaced."""

    def __init__(
        self,
        base_layer: nn.Module,
        state: AdapterState,
        config: LoRAConfig | None = None,
        *,
        tokens: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        assert isinstance(base_layer, nn.Embedding)
        self.base_layer, self.state = base_layer, state
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Embedding | None = None
        self.token_rows: TrainedRows | None = None
        if config is not None:
            rows, width = base_layer.weight.shape
            self.lora_A = nn.Linear(width, config.rank, bias=False)
            self.lora_B = nn.Embedding(rows, config.rank)
            self.scaling = config.scaling
        if tokens:
            self.token_rows = TrainedRows(tokens, base_layer.weight.shape[1], state)

    @property
    def weight(self) -> Tensor:
        """The whole table `(rows, d_model)` as it is now, which a tied head projects with."""
        weight = self.base_layer.weight
        if self.state.is_off:
            return weight
        if self.lora_A is not None and self.lora_B is not None:
            return weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight)
        return weight if self.token_rows is None else self.token_rows(weight)

    def forward(self, ids: Tensor) -> Tensor:
        """`(batch, seq)` to `(batch, seq, d_model)`."""
        out = self.base_layer(ids)
        if self.state.is_off:
            return out
        if self.lora_A is not None and self.lora_B is not None:
            return out + self.scaling * (self.lora_B(ids) @ self.lora_A.weight)
        return out if self.token_rows is None else self.token_rows.looked_up(out, ids)


class AdaptedExperts(nn.Module):
    """scaling * B A of every expert, for one of its matrices."""

    def __init__(self, weight: Tensor, config: LoRAConfig, state: AdapterState) -> None:
        super().__init__()
        experts, rows, columns = weight.shape
        self.lora_A = Stacked(experts, config.rank, columns)
        self.lora_B = Stacked(experts, rows, config.rank)
        self.scaling, self.state = config.scaling, state

    def forward(self, out: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        """What the experts' own matrices have made of `x`, and what is added; see
        `grouped_linear`."""
        if self.state.is_off:
            return out
        return out + self.scaling * self.lora_B(self.lora_A(x, ends), ends)


class Stacked(nn.Module):
    """A matrix for every expert."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.num_experts = shape[0]

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        weight = self.weight
        if weight.dim() < 3:  # who stores it may keep it as one long matrix
            weight = weight.unflatten(0, (self.num_experts, -1))
        # The experts' own matrices may be computed otherwise than these narrow ones.
        is_loop = grouped_backend(x, weight) == "loop"
        ends = ends_for(x, weight, ends) if is_loop else ends.to(x.device)
        return grouped_linear(x, weight, ends)

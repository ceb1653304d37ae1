"""Weights in 4 and 8 bits: codes against a reference, bounds of the error, gradients, what is kept
for backward, and which layers are meant."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.test_lora import adapted, adapter_of
from tests.tiny import global_batch, tiny_model
from toolkit.errors import ConfigError
from toolkit.models.compile import compile_model
from toolkit.models.init import canonical_parameters
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import is_adapter, quantised_bytes, quantised_layers
from toolkit.models.quantised import (
    LEVELS,
    QuantisedLinear,
    dequantise,
    quantise,
    quantise_layers,
    quantised_linears,
)
from toolkit.models.transformer import Transformer

PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""Appendix E of the paper."""
KINDS = ("nf4", "int8")


def some_weight(rows: int, columns: int) -> torch.Tensor:
    """Normal, with scales that differ between rows, an outlier and a row of zeros."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.logspace(-2, 0, rows)[:, None]
    weight[0, 0], weight[rows // 2] = 8.0, 0.0
    return weight


def reference(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What is computed with, and a bound of its error, number by number in Python's floats."""
    if kind == "int8":
        rows = weight.double().tolist()
        scales = [max(map(abs, row)) / 127 for row in rows]
        whole = [
            [round(v / s) * s if s else 0.0 for v in row]
            for row, s in zip(rows, scales, strict=True)
        ]
        bound = torch.tensor(scales, dtype=torch.float64)[:, None].expand(weight.shape) / 2
        return torch.tensor(whole, dtype=torch.float64), bound
    flat = weight.flatten().tolist()
    blocks = [flat[start : start + 64] for start in range(0, len(flat), 64)]
    scales = [max(map(abs, block)) for block in blocks]
    found: list[float] = []
    bounds: list[float] = []
    widest = max(b - a for a, b in itertools.pairwise(LEVELS)) / 2
    for number, (block, scale) in enumerate(zip(blocks, scales, strict=True)):
        first = number // 256 * 256
        least, most = min(scales[first : first + 256]), max(scales[first : first + 256])
        step = (most - least) / 255
        kept = least + (round((scale - least) / step) if step else 0) * step
        for value in block:
            share = value / scale if scale else 0.0
            found.append(min((abs(level - share), level) for level in LEVELS)[1] * kept)
            bounds.append(widest * scale + step / 2)
    values, bound = (
        torch.tensor(x, dtype=torch.float64).view(weight.shape) for x in (found, bounds)
    )
    return values, bound


def test_levels_are_those_of_the_paper() -> None:
    assert pytest.approx(PUBLISHED, abs=1e-6) == LEVELS


@pytest.mark.parametrize("shape", [(37, 23), (70, 300)])  # a part of a block; of a second group
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_comes_back_as_the_reference_says(kind: str, shape: tuple[int, int]) -> None:
    weight = some_weight(*shape)
    parts = quantise(weight, kind)
    values = dequantise(parts, kind, shape, torch.float64)
    expected, bound = reference(weight, kind)
    assert (values - expected).abs().max() < 1e-6 * weight.abs().max()
    assert ((values - weight).abs() <= bound * (1 + 1e-5)).all()
    assert not values[shape[0] // 2].any()
    assert sum(part.nbytes for part in parts) == quantised_bytes(shape, kind)
    once = dequantise(parts, kind, shape, torch.bfloat16)
    assert torch.equal(once, dequantise(parts, kind, shape, torch.float32).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_are_not_lost(kind: str) -> None:
    for bad in (math.nan, math.inf):
        weight = some_weight(8, 64)
        weight[3, 5] = bad
        values = dequantise(quantise(weight, kind), kind, (8, 64), torch.float32)
        assert values[3].isnan().any()


def quantised(kind: str, **settings: Any) -> Transformer:
    """A model with random adapters, on a base in few bits."""
    lora = LoRAConfig(rank=4, quantize_base=kind, **settings)  # type: ignore[arg-type]
    model = adapted(lora)
    adapter_of(model, random=True)
    chosen = quantised_layers(tiny_model(), lora)
    assert chosen is not None
    quantise_layers(model, chosen)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_model_with_the_weights_that_come_back(kind: str) -> None:
    model, twin = quantised(kind).double(), adapted(LoRAConfig(rank=4)).double()
    ours, theirs = canonical_parameters(model), canonical_parameters(twin)
    layers = quantised_linears(model)
    assert ours.keys() | layers.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            given = ours.get(name)
            parameter.copy_(layers[name].weight_in(torch.float64) if given is None else given)
    ids = global_batch(0)
    losses = []
    for one in (model, twin):
        losses.append(one(ids, ids).loss)
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    for name, parameter in theirs.items():
        if is_adapter(name):
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_in_bf16_keeps_no_weight_for_backward(kind: str) -> None:
    linear = nn.Linear(96, 40)
    linear.weight.requires_grad = False
    layer = QuantisedLinear(linear, kind)
    x = torch.randn(4, 96, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert sum(t.nbytes for t in kept) == quantised_bytes((40, 96), kind)
    out.float().sum().backward()
    weight = layer.weight_in(torch.bfloat16)
    assert torch.equal(out, x.bfloat16() @ weight.t() + linear.bias.bfloat16())
    assert x.grad is not None
    assert torch.equal(x.grad, (torch.ones(4, 40).bfloat16() @ weight).float())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compile_as_one_graph(kind: str) -> None:
    model, ids = quantised(kind), global_batch(0)
    expected = model(ids, ids).loss
    compile_model(model, fullgraph=True, backend="eager")
    loss = model(ids, ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_which_layers_are_meant() -> None:
    def layers(model: Any = None, **settings: Any) -> list[str]:
        lora = LoRAConfig(quantize_base="nf4", **settings)
        found = quantised_layers(model or tiny_model(), lora)
        assert found is not None
        return list(found.layers)

    assert quantised_layers(tiny_model(), LoRAConfig()) is None
    query = {"target_modules": ("*.query",)}
    assert layers(**query) == ["blocks.0.attention.query", "blocks.1.attention.query"]
    assert len(layers(**query, quantize_all=True)) == 2 * 7
    assert layers(**query, train_also=("blocks.0.*",)) == ["blocks.1.attention.query"]
    experts = tiny_model(moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=8))
    assert len(layers(experts, **query, quantize_all=True)) == 2 * 4
    with pytest.raises(ConfigError, match=r"quantize_base: every layer with an adapter is trained"):
        layers(**query, train_also=("*.query.*",))
    with pytest.raises(ValueError, match="quantize_all: needs quantize_base"):
        LoRAConfig(quantize_all=True)

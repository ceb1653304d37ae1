"""Norms per layer against numpy's."""

import math

import numpy as np
import pytest
import torch

from toolkit.metrics.norms import layer_norms, layer_of, to_norms


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.3.attention.q.weight", "blocks.3"),
        ("blocks.12", "blocks.12"),
        ("model.blocks.0.norm.weight", "model.blocks.0"),
        ("embedding.weight", "embedding"),
        ("head", "head"),
    ],
)
def test_layer_of(name, layer):
    assert layer_of(name) == layer


def test_squares_add_up_over_layers_and_give_the_global_norm():
    generator = torch.Generator().manual_seed(0)
    named = {
        "embedding.weight": torch.randn(7, 3, generator=generator),
        "blocks.0.a.weight": torch.randn(5, 5, generator=generator),
        "blocks.1.a.weight": torch.randn(4, generator=generator),
        "blocks.0.b.weight": torch.randn(2, 2, 2, generator=generator),
    }
    squares = layer_norms(named)
    assert list(squares) == ["embedding", "blocks.0", "blocks.1"]
    array = {name: tensor.double().numpy() for name, tensor in named.items()}
    expected = (array["blocks.0.a.weight"] ** 2).sum() + (array["blocks.0.b.weight"] ** 2).sum()
    assert squares["blocks.0"].item() == pytest.approx(expected, rel=1e-6)
    norms = to_norms(squares)
    everything = np.concatenate([a.ravel() for a in array.values()])
    assert list(norms) == ["total", "embedding", "blocks.0", "blocks.1"]
    assert norms["total"].item() == pytest.approx(np.linalg.norm(everything), rel=1e-6)
    assert norms["blocks.1"].item() == pytest.approx(
        np.linalg.norm(array["blocks.1.a.weight"]), rel=1e-6
    )


def test_shards_of_two_ranks_sum_to_the_whole():
    whole = torch.arange(10.0)
    shards = [layer_norms({"w.x": part})["w"].item() for part in (whole[:4], whole[4:])]
    assert to_norms({"w": sum(shards)}) == {
        "total": pytest.approx(math.sqrt(285)), "w": pytest.approx(math.sqrt(285)),
    }  # fmt: skip


def test_bfloat16_is_summed_in_fp32_and_empty_shards_count_nothing():
    ones = torch.ones(1_000_001, dtype=torch.bfloat16)
    squares = layer_norms({"a.w": ones, "b.w": torch.empty(0), "a.v": torch.empty(0)})
    assert squares["a"].dtype == torch.float32
    assert squares["a"].item() == pytest.approx(1_000_001, rel=1e-6)
    assert squares["b"].item() == 0.0


def test_parameters_that_require_grad_leave_no_graph():
    squares = layer_norms({"a.w": torch.ones(3, requires_grad=True)})
    assert not squares["a"].requires_grad


def test_nothing_gives_nothing():
    assert layer_norms({}) == {}
    assert to_norms({}) == {}

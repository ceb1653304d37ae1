"""Scaled and partial rotary positions are those of `transformers`."""

from typing import Any

import msgspec
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from toolkit.models import rope
from toolkit.models.rope import rotary_table, rotate
from toolkit.models.rope_scaling import RopeScalingConfig

SCALINGS: list[dict[str, Any]] = [
    {"type": "linear", "factor": 8.0},
    {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 512},
    {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.2,
        "truncate": False,
    },
    {
        "type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.25,
        "mscale": 3.0,
        "mscale_all_dim": 2.0,
    },
    {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 1.0},
]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_angles_are_those_of_transformers(scaling, theta):
    parameters = {"rope_theta": theta, **scaling, "partial_rotary_factor": 0.75}
    parameters["rope_type"] = parameters.pop("type")
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=40, rope_parameters=parameters
    )
    frequency, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    assert frequency.shape == (15,)
    angle = torch.arange(600.0)[:, None] * frequency
    ours = msgspec.convert(scaling, RopeScalingConfig)
    table = rotary_table(600, 30, theta, torch.device("cpu"), ours)
    torch.testing.assert_close(table.cos, angle.cos() * factor, rtol=0, atol=5e-5)
    torch.testing.assert_close(table.sin, angle.sin() * factor, rtol=0, atol=5e-5)


def test_other_channels_pass_unrotated():
    x = torch.randn(1, 9, 3, 10, generator=torch.Generator().manual_seed(0))
    table = rotary_table(9, 6, 10_000.0, torch.device("cpu"))
    rotated = rotate(x, table)
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    assert torch.equal(rotated[..., :6], rotate(x[..., :6], table))
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_a_gpus_kernels_turn_as_the_formula_does(monkeypatch, rotary_dim):
    table = rope.rotary_table(6, rotary_dim, 10_000.0, torch.device("cpu"))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        torch.manual_seed(0)
        x, grad = torch.randn(2, 2, 6, 3, 16).to(dtype).unbind()
        found = []
        for rounds in (False, True):
            monkeypatch.setattr(rope, "rounds_in_kernels", lambda _, rounds=rounds: rounds)
            own = x.clone().requires_grad_()
            out = rope.rotate(own, table)
            found.append([out, *torch.autograd.grad(out, own, grad)])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
            assert got.dtype == dtype

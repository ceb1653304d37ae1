"""Muon and NorMuon against references in float64, and against torch's Muon."""

import math
import re
from typing import Any

import pytest
import torch

from toolkit.config import convert
from toolkit.config.check import check
from toolkit.errors import ConfigError
from toolkit.models.config import TransformerConfig
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.shapes import whole_model
from toolkit.optim.base import GroupOverride
from toolkit.optim.config import AdamWConfig, MuonConfig, NorMuonConfig, OptimConfig
from toolkit.optim.muon import orthogonalized

SHAPES = {
    "blocks.0.feed_forward.up.weight": (6, 4),
    "blocks.0.feed_forward.down.weight": (4, 6),
    "blocks.0.feed_forward.experts.gate": (3, 5, 4),
    "blocks.0.attention_norm.weight": (4,),
    "embeddings.tokens.weight": (7, 4),
}
RATES = (0.02, 0.01, 0.0, 0.03)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def weights(dtype: torch.dtype = torch.float64) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for name, shape in SHAPES.items()
    }


def set_gradients(named: dict[str, torch.nn.Parameter], step: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(10 + step)
    for p in named.values():
        p.grad = factor * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def run(config: Any, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    named = weights(dtype)
    optimizer = config.build(named)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step, rate in enumerate(RATES):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        set_gradients(named, step)
        optimizer.step()
    return {name: p.detach() for name, p in named.items()}


def reference(w: torch.Tensor, grads: list[torch.Tensor], config: MuonConfig) -> torch.Tensor:
    (rows, columns), m, v = w.shape, torch.zeros_like(w), torch.zeros(len(w), 1, dtype=w.dtype)
    a, b, c = COEFFICIENTS
    for rate, g in zip(RATES, grads, strict=True):
        m = 0.9 * m + 0.1 * g
        x = 0.9 * m + 0.1 * g if config.nesterov else m
        x = x / x.norm()
        for _ in range(5):
            y = x @ x.T
            x = a * x + b * y @ x + c * y @ y @ x
        scale = math.sqrt(max(1, rows / columns))
        if config.adjust_lr == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(rows, columns))
        if isinstance(config, NorMuonConfig):
            v = 0.8 * v + 0.2 * x.square().mean(1, keepdim=True)
            norm = x.norm()
            x = x / v.sqrt()
            if config.adjust_lr == "match_rms_adamw":
                x, scale = x / x.norm() * math.sqrt(x.numel()), 0.2
            else:
                x = x / x.norm() * norm
        w = w - rate * (scale * x + 0.3 * w)
    return w


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("kind", [MuonConfig, NorMuonConfig])
def test_steps_are_those_of_a_reference(kind: Any, adjust_lr: str, nesterov: bool) -> None:
    options: dict[str, Any] = {"beta2": 0.8} if kind is NorMuonConfig else {}
    settings = {"lr": 1.0, "weight_decay": 0.3, "adamw_lr": 0.5, "eps": 1e-6}
    config = kind(**settings, momentum=0.9, adjust_lr=adjust_lr, nesterov=nesterov, **options)
    found, grads = run(config), []
    for step in range(len(RATES)):
        named = weights()
        set_gradients(named, step)
        grads.append({name: p.grad for name, p in named.items()})
    others = run(AdamWConfig(lr=0.5, weight_decay=0.3, eps=1e-6))
    for name, w in weights().items():
        own: list[Any] = [g[name] for g in grads]
        if not name.startswith("blocks") or "norm" in name:
            assert torch.equal(found[name], others[name]), name
        elif w.dim() == 3:
            for expert in range(len(w)):
                wanted = reference(w.detach()[expert], [g[expert] for g in own], config)
                torch.testing.assert_close(found[name][expert], wanted, rtol=1e-9, atol=1e-9)
        else:
            wanted = reference(w.detach(), own, config)
            torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_steps_are_those_of_torch_s_muon(adjust_lr: Any) -> None:
    named = {n: p for n, p in weights(torch.float32).items() if p.dim() == 2 and "blocks" in n}
    theirs = torch.optim.Muon(
        named.values(), lr=1.0, weight_decay=0.3, momentum=0.9, adjust_lr_fn=adjust_lr
    )
    config = MuonConfig(
        lr=1.0, weight_decay=0.3, momentum=0.9, adjust_lr=adjust_lr, adamw_lr=1.0,
        ns_dtype="bfloat16",
    )  # fmt: skip
    twin = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
    ours = config.build(twin)
    for step, rate in enumerate(RATES):
        for optimizer, own in ((theirs, named), (ours, twin)):
            optimizer.param_groups[0]["lr"] = rate
            set_gradients(own, step)
            optimizer.step()
    for name, p in named.items():  # a bit of bf16 in an update of rate 0.06 and scale 0.5
        torch.testing.assert_close(twin[name], p, rtol=0.0, atol=3e-4)


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalized(matrices, 5, COEFFICIENTS))
    assert 0.6 < values.min() < values.max() < 1.3
    assert not orthogonalized(torch.zeros(1, 3, 2), 5, COEFFICIENTS).any()


@pytest.mark.parametrize("kind", [MuonConfig, NorMuonConfig])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_not_taken_changes_no_bit_and_a_scale_divides(kind: Any, first: bool) -> None:
    config = kind(lr=0.1)
    named, twin = weights(torch.float32), weights(torch.float32)
    optimizer, other = config.build(named), config.build(twin)
    for step, is_taken in enumerate([*([] if first else [True]), False, True]):
        set_gradients(named, step, 4.0 if is_taken else math.nan)
        set_gradients(twin, step)
        kept = {n: [p.detach().clone(), *_state(optimizer, p)] for n, p in named.items()}
        optimizer.found_inf = torch.tensor(float(not is_taken))
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.step()
        if is_taken:
            other.step()
            assert all(torch.equal(named[n], twin[n]) for n in named)
            continue
        for name, p in named.items():
            before, after = kept[name], [p.detach(), *_state(optimizer, p)]
            assert all(map(torch.equal, before, after)), name


def _state(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> list[torch.Tensor]:
    return [value.clone() for value in optimizer.state[p].values()]


def test_groups_have_the_settings_of_their_optimizer() -> None:
    decay = GroupOverride(params=["*up.weight", "*norm.weight"], opts={"weight_decay": 0.0})
    config = MuonConfig(lr=0.02, adjust_lr="original", adamw_lr=3e-4, group_overrides=(decay,))
    groups = config.build(weights()).param_groups
    found = [
        (g["is_matrix"], g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]])
        for g in groups
    ]
    assert found == [
        (True, 0.02, 0.0, [(6, 4)]),
        (False, 3e-4, 0.0, [(4,)]),
        (True, 0.02, 0.1, [(4, 6), (3, 5, 4)]),
        (False, 3e-4, 0.1, [(7, 4)]),
    ]


def test_the_matrices_of_a_model_are_all_weights_of_blocks_but_norms_and_routers() -> None:
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=8, dense_layers=(0,))
    model = TransformerConfig(
        vocab_size=16, d_model=8, num_layers=2, num_heads=2, intermediate_size=8,
        norm_placement="sandwich", qk_norm="full", bias=True, moe=moe,
    )  # fmt: skip
    shapes = dict(whole_model(model))
    matrices = {name for name in shapes if MuonConfig().part_of(name) == "matrices"}
    assert matrices == {
        name
        for name, shape in shapes.items()
        if name.startswith("blocks.") and len(shape) > 1 and "router" not in name
    }
    MuonConfig().check_groups(shapes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"matrices": ["blocks.*.nothing"]}, "'blocks.*.nothing' matches no"),
        ({"matrices": ["*"]}, "blocks.0.attention_norm.weight has the shape (4,), and is no"),
        (
            {"group_overrides": [{"params": ["embed*"], "opts": {"momentum": 0.5}}]},
            "momentum is a setting of Muon, which steps none of these",
        ),
        (
            {"group_overrides": [{"params": ["*up.weight"], "opts": {"eps": 0.5}}]},
            "eps is a setting of AdamW, which steps none of these",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        convert({"type": "muon", **settings}, OptimConfig).check_groups(SHAPES)
    assert "train_module.optim." in str(error.value)


def test_a_model_without_blocks_must_name_its_matrices() -> None:
    shapes = {"one.weight": (3, 4), "one.bias": (3,)}
    with pytest.raises(ConfigError, match=r"no weights in blocks\.\*; give patterns"):
        MuonConfig().check_groups(shapes)
    MuonConfig(matrices=("one.weight",)).check_groups(shapes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adjust_lr": "original"}, "give adamw_lr too"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"ns_steps": 0}, "ns_steps"),
        ({"adamw_weight_decay": -1.0}, "adamw_weight_decay must not be negative"),
        ({"type": "normuon", "beta2": 1.0}, "beta2 must be in"),
        ({"mup": {"base_width": 4}}, "not of muon"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert({"type": "muon", **settings}, OptimConfig)


def test_a_mistake_is_told_once_where_there_are_overrides() -> None:
    override = {"params": ["*"], "opts": {"weight_decay": 0.0}}
    data = {"type": "muon", "adjust_lr": "original", "group_overrides": [override]}
    (error,) = check(data, MuonConfig).errors
    assert str(error) == "adjust_lr original: its rates are not AdamW's; give adamw_lr too"

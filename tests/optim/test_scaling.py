"""Rates by layer and by width, and the initial values of muP."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from toolkit.config import convert
from toolkit.distributed.layout import Layout
from toolkit.distributed.sizes import check_optimizer
from toolkit.errors import ConfigError
from toolkit.experiment.checks import check_parameters
from toolkit.experiment.load import load_experiment
from toolkit.models.init import init_spec
from toolkit.models.layer_configs import MoEConfig
from toolkit.optim.base import GroupOverride
from toolkit.optim.config import AdamWConfig, LionConfig, OptimConfig, SGDConfig
from toolkit.optim.scaling import MuPConfig

OPTIM = "train_module.optim"


def rates(config: Any, **model: Any) -> dict[str, float]:
    parameters = dict(tiny_model(**model).build(init_device="meta").named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    groups = config.build(parameters).param_groups
    return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}


def test_rates_decay_from_the_top() -> None:
    last = GroupOverride(params=["blocks.2.*"], opts={"lr": 5.0})
    found = rates(
        SGDConfig(lr=1.0, layer_lr_decay=0.5, group_overrides=(last,)), num_layers=3, d_model=16
    )
    assert found["head.weight"] == found["head.norm.weight"] == 1.0
    assert found["blocks.2.attention.query.weight"] == 2.5
    assert found["blocks.1.attention_norm.weight"] == 0.25
    assert found["blocks.0.feed_forward.up.weight"] == 0.125
    assert found["embeddings.tokens.weight"] == 0.0625
    assert len(found) == 3 * 9 + 3


MOE = MoEConfig(num_experts=4, top_k=2, intermediate_size=6)


def test_mup_scales_rates_and_initial_values_by_table_3() -> None:
    model: dict[str, Any] = {
        "d_model": 64, "moe": MOE, "init_scale_residual": True, "attention_sinks": True
    }  # fmt: skip
    config = LionConfig(lr=1.0, mup=MuPConfig(base_width=16)).of_model(64)
    found = rates(config, **model)
    built = tiny_model(**model).build(init_device="meta")
    narrow, wide = init_spec(built), init_spec(built, 4.0)
    expected = {
        "embeddings.tokens.weight": (1.0, 1.0),
        "blocks.0.attention_norm.weight": (1.0, 1.0),
        "blocks.0.attention.sinks": (1.0, 1.0),
        "blocks.0.attention.query.weight": (0.25, 0.5),
        "blocks.1.feed_forward.experts.down": (0.25, 0.5),
        "blocks.1.feed_forward.router.weight": (0.25, 0.25),
        "head.weight": (0.25, 0.25),
    }
    for name, (rate, std) in expected.items():
        assert found[name] == rate, name
        assert wide[name].std == pytest.approx(narrow[name].std * std), name
    assert rates(config.of_model(16), **model) == rates(LionConfig(lr=1.0), **model)
    scores = init_spec(tiny_model(**model, num_scores=1).build(init_device="meta"), 4.0)
    assert scores["head.score.weight"] == wide["head.weight"]


@pytest.mark.slow
def test_the_change_of_activations_depends_on_the_width_only_without_mup() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "mup_coordinates.py"
    spec = importlib.util.spec_from_file_location("mup_coordinates", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options: dict[str, Any] = {"lr": 1e-2, "steps": 4}
    without = script.coordinate_check((16, 32, 64), base_width=None, **options)
    with_mup = script.coordinate_check((16, 32, 64), base_width=16, **options)
    assert with_mup["residual stream"].changes[0] == without["residual stream"].changes[0]
    assert without["residual stream"].slope > 1.0
    assert abs(with_mup["residual stream"].slope) < 0.25
    assert without["logits"].slope > 0.4
    assert with_mup["logits"].slope < 0.1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            f"{OPTIM}={{type: lion, betas: [-0.1, 0.9]}}",
            "betas must each be in [0, 1): [-0.1, 0.9]",
        ),
        (f"{OPTIM}={{type: lyon}}", "did you mean 'lion'?"),
        (f"{OPTIM}.lr=-1", "lr must not be negative: -1"),
        (f"{OPTIM}.layer_lr_decay=0", "layer_lr_decay must be greater than 0"),
        (f"{OPTIM}={{type: adafactor, d: 0.5}}", "d must be at least 1: 0.5"),
        (f"{OPTIM}={{type: adafactor, eps: [1, -1]}}", "eps must not be negative: [1.0, -1.0]"),
        (f"{OPTIM}={{type: adafactor, beta2_decay: 1}}", "beta2_decay must not be positive: 1"),
        (f"{OPTIM}={{type: sgd, mup: {{base_width: 8}}}}", "mup: its rates are those of Adam, not"),
        (f"{OPTIM}.mup={{base_width: 0}}", "base_width must be greater than 0"),
    ],
)
def test_what_no_optimizer_works_with_is_one_line(flags: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment("quickstart", [f"--{flags}"])
    assert expected in str(error.value)
    assert OPTIM in str(error.value)
    assert "\n" not in str(error.value)


def test_mup_needs_a_head_of_its_own() -> None:
    flags = [f"--{OPTIM}.type=adamw", f"--{OPTIM}.mup={{base_width: 64}}"]
    with pytest.raises(ConfigError, match=r"mup: needs a head of its own; set model.tie_embed"):
        check_parameters(load_experiment("quickstart", flags).config)


@pytest.mark.parametrize("kind", ["adafactor", "adamw_8bit", "torch.optim:Adafactor"])
def test_what_an_engine_cannot_run_is_refused_by_name(kind: str) -> None:
    optim = convert({"type": kind}, OptimConfig)
    for layout in (Layout(dp_shard=2, is_fsdp=True), Layout(zero_stage=2, dp_shard=2)):
        with pytest.raises(ConfigError) as error:
            check_optimizer(layout, optim)
        assert str(error.value) == (
            f"{OPTIM}.type: {kind} needs whole parameters, and {layout.name} cuts them over ranks; "
            "use ddp, or another optimizer"
        )
    check_optimizer(Layout(dp_replicate=2), optim)


def test_a_missing_extra_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_experiment("quickstart", [f"--{OPTIM}.type=adamw_8bit"]).config
    with pytest.raises(ConfigError, match=r'pip install "toolkit\[torchao\]"'):
        check_parameters(config)


def test_a_rate_of_zero_trains_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamWConfig(lr=0).build({"w": weight})
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]

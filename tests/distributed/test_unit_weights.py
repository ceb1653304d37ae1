"""An nGPT, and parts of attention, on every engine: equal numbers, unit weights, exact resumes."""

from typing import Any

import pytest
import torch

from tests.distributed.whole import put_together
from tests.tiny import build, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.distributed.config import (
    DataParallelConfig,
    PipelineParallelConfig,
    TensorParallelConfig,
)
from toolkit.distributed.shards import local_boxes, local_tensor
from toolkit.models.init import canonical_parameters
from toolkit.models.normalized import unit_dimension
from toolkit.optim.config import AdamWConfig, SGDConfig

STEPS = 4
MODELS: dict[str, dict[str, Any]] = {
    "ngpt": {"norm_placement": "normalized", "intermediate_size": 48},
    "gates and sinks": {
        "attention_gate": "elementwise",
        "attention_sinks": True,
        "rope_pattern": ("rope", "none"),
        "intermediate_size": 48,
    },
}


def whole_weights(module: Any) -> dict[str, torch.Tensor]:
    """Every weight put together from what the ranks have of it, once at least."""
    engine, weights = module.engine, {}
    parameters: dict[str, Any] = canonical_parameters(engine.module)
    for name, spec in engine.shards.items():
        own = parameters.get(name)
        boxes = [] if own is None else local_boxes(own, spec)
        weights[name] = put_together(spec.shape, None if own is None else own.detach(), boxes)
    return weights


LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {"dp_config": None},
    "tp": {"tp_config": TensorParallelConfig(degree=2), "dp_config": None},
    "fsdp x tp": {
        "dp_config": DataParallelConfig(name="fsdp"),
        "tp_config": TensorParallelConfig(degree=2),
    },
    "fsdp x pp": {
        "dp_config": DataParallelConfig(name="fsdp"),
        "pp_config": PipelineParallelConfig(degree=2),
    },
}


def trained(layout: str) -> dict[str, Any]:
    """Of each model: losses and norms, fresh weights and those after the steps."""
    fields = LAYOUTS.get(layout, {"dp_config": DataParallelConfig(name=layout)})
    optim = SGDConfig(lr=0.05, momentum=0.9)
    environment = open_environment(module_config(**fields, optim=optim))
    has_zero = environment.layout.zero_stage > 0
    size = 2 * 16
    try:
        found = {}
        for name, model in MODELS.items():
            if not (has_zero and name == "ngpt"):
                config = module_config(**fields, optim=optim, rank_microbatch_size=size)
                module = build(config, environment, **model)
                fresh = {} if has_zero else whole_weights(module)
                history = train_steps(module, 0, STEPS)
                found[name] = history, fresh, {} if has_zero else whole_weights(module)
        return found
    finally:
        environment.close()


@pytest.fixture(scope="module")
def alone(workers: WorkerPool) -> Any:
    return workers.run(1, trained, "single")[0]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "fsdp"),
        (2, "tp"),
        (2, "zero2"),
        (4, "fsdp x pp"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, "ddp"), (4, "hsdp"), (4, "fsdp x tp"))
        ),
    ],
)
def test_engines_agree_from_equal_weights(
    workers: WorkerPool, alone: Any, ranks: int, layout: str
) -> None:
    for name, got in workers.run(ranks, trained, layout)[0].items():
        history, fresh, after = alone[name]
        for step, expected in zip(got[0], history, strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5), name
            assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), name
        for weight, value in got[1].items():
            assert torch.equal(value, fresh[weight]), weight
        for weight, value in got[2].items():
            torch.testing.assert_close(value, after[weight], rtol=1e-4, atol=1e-6)


def test_vectors_have_length_one_after_training(alone: Any) -> None:
    _, fresh, after = alone["ngpt"]
    for name, weight in after.items():
        dim = unit_dimension(name)
        if dim is not None:
            assert (weight.norm(dim=dim) - 1).abs().max() < 1e-6, name
        assert not torch.equal(weight, fresh[name]), name


def continued(model: dict[str, Any]) -> Any:
    """Six steps, and three after a copy of the state of three went into a new module."""
    config = module_config("fsdp", optim=AdamWConfig(lr=1e-2, weight_decay=0.0))
    environment = open_environment(config)
    try:
        first = build(config, environment, **model)
        train_steps(first, 0, 3)
        kept = {n: local_tensor(t).clone() for n, t in first.state_tensors().items()}
        history = train_steps(first, 3, 6)
        second = build(config, environment, **model)
        for name, tensor in second.state_tensors().items():
            local_tensor(tensor).copy_(kept[name])
        second.engine.state_filled()
        loaded = second.state_tensors().items()
        is_kept = all(torch.equal(local_tensor(t), kept[n]) for n, t in loaded)
        return is_kept, history == train_steps(second, 3, 6)
    finally:
        environment.close()


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_bit_equal(workers: WorkerPool, name: str) -> None:
    assert workers.run(2, continued, MODELS[name]) == [(True, True)] * 2

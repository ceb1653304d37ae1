"""SEMANTICS 1 to 3 and 6: the split of a global batch changes nothing but rounding."""

from typing import Any

import pytest
import torch

from tests.tiny import ROWS, SEQ, build, global_batch, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.optim.config import SGDConfig

STEPS = 10
CASES = [
    ("single", 1, 2, {}),
    ("single", 1, 1, {}),
    ("ddp", 2, 4, {}),
    ("ddp", 2, 1, {}),
    ("fsdp", 2, 4, {}),
    ("fsdp", 2, 2, {}),
    ("fsdp", 1, 4, {}),
    ("fsdp", 2, 4, {"reshard_after_forward": False}),
    ("fsdp", 2, 2, {"cpu_offload": True}),
    ("hsdp", 4, 2, {"num_replicas": 2}),
    ("hsdp", 4, 1, {"num_replicas": 2}),
    ("zero1", 2, 4, {}),
    ("zero1", 2, 2, {}),
    ("zero1", 2, 2, {"cpu_offload": True}),
    ("zero2", 2, 4, {}),
    ("zero2", 2, 1, {}),
    ("zero2", 2, 2, {"cpu_offload": True}),
    ("zero3", 2, 4, {}),
    ("zero3", 2, 2, {}),
    ("zero3", 2, 2, {"cpu_offload": True}),
    ("zero3", 1, 4, {}),
]


def masked_batch(step: int) -> dict[str, torch.Tensor]:
    """Very different numbers of targets in each row, so each rank has its own count."""
    mask = torch.zeros(ROWS, SEQ, dtype=torch.bool)
    for row in range(ROWS):
        mask[row, : 2 + 2 * row] = True
    return {"input_ids": global_batch(step), "label_mask": mask}


def history_of(engine: str, rows: int, dp: dict, kind: str) -> Any:
    changes: dict[str, Any] = {}
    if kind == "sgd":
        changes["optim"] = SGDConfig(lr=0.1, momentum=0.9)
    if kind == "z_loss":
        changes["z_loss_multiplier"] = 1e-3
    config = module_config(engine, rank_microbatch_size=rows * SEQ, dp=dp, **changes)
    env = open_environment(config)
    try:
        module = build(config, env)
        batches = masked_batch if kind == "masked" else global_batch
        history = train_steps(module, 0, STEPS, batches)
        weights = {}
        if kind == "sgd":
            for name, tensor in module.state_tensors().items():
                if name.startswith("model.") and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                    weights[name] = tensor.detach().clone()
                elif name.startswith("model.") and hasattr(tensor, "full_tensor"):
                    weights[name] = tensor.full_tensor()
        return history, weights
    finally:
        env.close()


@pytest.fixture(scope="module")
def reference(workers: WorkerPool) -> dict[str, Any]:
    kinds = ("adamw", "masked", "sgd", "z_loss")
    return {kind: workers.run(1, history_of, "single", ROWS, {}, kind)[0] for kind in kinds}


def assert_equal_to_rounding(history: list[dict], expected: list[dict]) -> None:
    assert len(history) == len(expected) == STEPS
    for got, want in zip(history, expected, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("engine", "ranks", "rows", "dp"), CASES)
def test_losses_and_grad_norms_agree(
    workers: WorkerPool, reference: dict[str, Any], engine: str, ranks: int, rows: int, dp: dict
) -> None:
    history, _ = workers.run(ranks, history_of, engine, rows, dp, "adamw")[0]
    assert_equal_to_rounding(history, reference["adamw"][0])


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_unequal_target_counts_on_ranks_do_not_change_the_loss(
    workers: WorkerPool, reference: dict[str, Any], engine: str
) -> None:
    history, _ = workers.run(2, history_of, engine, 2, {}, "masked")[0]
    assert_equal_to_rounding(history, reference["masked"][0])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_parameters_agree_after_sgd_steps(
    workers: WorkerPool, reference: dict[str, Any], engine: str
) -> None:
    history, weights = workers.run(2, history_of, engine, 2, {}, "sgd")[0]
    assert_equal_to_rounding(history, reference["sgd"][0])
    expected = reference["sgd"][1]
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_z_loss_agrees(workers: WorkerPool, reference: dict[str, Any], engine: str) -> None:
    history, _ = workers.run(2, history_of, engine, 2, {}, "z_loss")[0]
    assert_equal_to_rounding(history, reference["z_loss"][0])


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp", 2), ("zero2", 2)])
def test_same_split_and_engine_is_bit_equal(workers: WorkerPool, engine: str, ranks: int) -> None:
    first = workers.run(ranks, history_of, engine, 2, {}, "adamw")[0]
    assert workers.run(ranks, history_of, engine, 2, {}, "adamw")[0] == first

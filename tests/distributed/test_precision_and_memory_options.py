"""bf16, activation checkpointing and compile: same training, to the rounding they imply."""

from typing import Any

import pytest

from tests.tiny import ROWS, SEQ, build, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.distributed.config import ActivationCheckpointingConfig


def losses(engine: str, changes: dict[str, Any]) -> list[float]:
    config = module_config(engine, rank_microbatch_size=4 * SEQ, **changes)
    env = open_environment(config)
    try:
        return [record["loss"] for record in train_steps(build(config, env), 0, 4)]
    finally:
        env.close()


@pytest.fixture(scope="module")
def exact(workers: WorkerPool) -> list[float]:
    assert ROWS % 4 == 0
    return workers.run(1, losses, "single", {})[0]


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
)
def test_bf16_follows_fp32(
    workers: WorkerPool, exact: list[float], engine: str, ranks: int
) -> None:
    low = workers.run(ranks, losses, engine, {"precision": "bf16"})[0]
    assert low == pytest.approx(exact, rel=5e-3)
    assert low != exact


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp", 2), ("zero3", 2)])
@pytest.mark.parametrize("mode", ["full", "selected_blocks"])
def test_activation_checkpointing_changes_no_loss(
    workers: WorkerPool, exact: list[float], engine: str, ranks: int, mode: Any
) -> None:
    config = ActivationCheckpointingConfig(mode=mode)
    got = workers.run(ranks, losses, engine, {"ac_config": config})[0]
    assert got == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    ("engine", "ranks", "ac"),
    [
        ("single", 1, None),
        ("ddp", 2, None),
        ("fsdp", 2, None),
        ("fsdp", 2, ActivationCheckpointingConfig(mode="full")),
        ("single", 1, ActivationCheckpointingConfig(mode="budget", budget=0.3)),
        ("zero1", 2, None),
        ("zero3", 2, None),
    ],
)
def test_compiled_model_trains_alike(
    workers: WorkerPool, exact: list[float], engine: str, ranks: int, ac: Any
) -> None:
    changes = {"compile_model": True, "ac_config": ac}
    got = workers.run(ranks, losses, engine, changes, timeout=280)[0]
    assert got == pytest.approx(exact, rel=1e-5)

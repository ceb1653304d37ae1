"""bf16, activation checkpointing and compile: same training, to the rounding they imply."""

import functools
from typing import Any
from unittest import mock

import pytest

from tests.tiny import ROWS, SEQ, build, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.models import compile as compiling
from toolkit.models.layer_configs import MoEConfig


def losses(
    engine: str, changes: dict[str, Any], backend: str = "inductor", layers: int = 2
) -> list[float]:
    config = module_config(engine, rank_microbatch_size=4 * SEQ, **changes)
    env = open_environment(config)
    compiled = functools.partial(compiling.compile_model, backend=backend)
    try:
        with mock.patch.object(compiling, "compile_model", compiled):
            module = build(config, env, num_layers=layers)
            return [record["loss"] for record in train_steps(module, 0, 4)]
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


FULL = ActivationCheckpointingConfig(mode="full")


@pytest.mark.parametrize(
    ("engine", "ranks", "ac", "backend"),
    [
        ("single", 1, None, "inductor"),
        ("single", 1, ActivationCheckpointingConfig(mode="budget", budget=0.3), "inductor"),
        ("fsdp", 2, FULL, "inductor"),
        # The same graphs, whose kernels are not compiled.
        *((engine, 2, None, "aot_eager") for engine in ("ddp", "zero1")),
        *(
            pytest.param(engine, 2, None, "inductor", marks=pytest.mark.slow)
            for engine in ("ddp", "fsdp", "zero1", "zero3")
        ),
    ],
)
def test_compiled_model_trains_alike(
    workers: WorkerPool, exact: list[float], engine: str, ranks: int, ac: Any, backend: str
) -> None:
    changes = {"compile_model": True, "ac_config": ac}
    got = workers.run(ranks, losses, engine, changes, backend, timeout=280)[0]
    assert got == pytest.approx(exact, rel=1e-5)


def test_a_block_with_the_hooks_of_zero3_is_compiled(workers: WorkerPool) -> None:
    """Around each of which there are graphs: of one block on one rank, whose kernels stay torch's,
    as more of them take half a minute (`slow`, above)."""
    exact = workers.run(1, losses, "single", {}, "inductor", 1)[0]
    changes = {"compile_model": True}
    got = workers.run(1, losses, "zero3", changes, "eager", 1, timeout=280)[0]
    assert got == pytest.approx(exact, rel=1e-5)


def wrapped(
    dp: dict[str, Any], changes: dict[str, Any]
) -> tuple[list[float], list[str], list[str]]:
    """Losses, the names of the units that are gathered at once, and what the first block gathers
    ahead."""
    from torch.distributed.fsdp import FSDPModule

    config = module_config("fsdp", dp=dp, rank_microbatch_size=4 * SEQ, **changes)
    env = open_environment(config)
    try:
        module = build(config, env)
        records = train_steps(module, 0, 4)
        model = module.engine.module
        names = {m: name for name, m in model.named_modules() if isinstance(m, FSDPModule)}
        states = {m._get_fsdp_state(): name for m, name in names.items()}  # type: ignore[operator]
        first = model.blocks[0]._get_fsdp_state()  # type: ignore[index, union-attr, operator]
        ahead = [states[state] for state in first._states_to_forward_prefetch]
        return [record["loss"] for record in records], list(names.values()), ahead
    finally:
        env.close()


@pytest.mark.parametrize(
    ("dp", "ac", "units", "ahead"),
    [
        ({}, None, ["", "blocks.0", "blocks.1", "head"], []),
        ({"wrapping_strategy": "blocks"}, None, ["", "blocks.0", "blocks.1"], []),
        ({"reshard_after_forward": False, "prefetch_factor": 2}, None,
         ["", "blocks.0", "blocks.1", "head"], ["blocks.1", "head"]),
        ({"wrapping_strategy": "fine_grained", "prefetch_factor": 1},
         ActivationCheckpointingConfig(),
         ["", "blocks.0", "blocks.0.attention", "blocks.0.feed_forward", "blocks.1",
          "blocks.1.attention", "blocks.1.feed_forward", "head"], ["blocks.0.attention"]),
    ],
)  # fmt: skip
def test_units_that_are_gathered_at_once_change_no_loss(
    workers: WorkerPool,
    exact: list[float],
    dp: dict[str, Any],
    ac: Any,
    units: list[str],
    ahead: list[str],
) -> None:
    got = workers.run(2, wrapped, dp, {"ac_config": ac})[0]
    assert got[0] == pytest.approx(exact, rel=1e-5)
    assert got[1:] == (units, ahead)


def test_with_experts_and_tied_embeddings_units_change_no_loss(workers: WorkerPool) -> None:
    exact = workers.run(1, losses_of_experts, "single", {})[0]
    dp = {"wrapping_strategy": "fine_grained", "prefetch_factor": 3, "reshard_after_forward": False}
    assert workers.run(2, losses_of_experts, "fsdp", dp)[0] == pytest.approx(exact, rel=1e-5)


def losses_of_experts(engine: str, dp: dict[str, Any]) -> list[float]:
    config = module_config(engine, dp=dp, rank_microbatch_size=4 * SEQ)
    env = open_environment(config)
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=8)
    try:
        module = build(config, env, moe=moe, tie_embeddings=True)
        return [record["loss"] for record in train_steps(module, 0, 3)]
    finally:
        env.close()

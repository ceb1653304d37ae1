"""SEMANTICS 7: a non-finite loss or gradient never reaches the weights."""

import math
from typing import Any

import pytest
import torch

from tests.tiny import ROWS, SEQ, build, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.optim.config import SGDConfig
from toolkit.train.module import Progress


def poisoned_step(engine: str, poison: str) -> tuple[list[float], list[str], list[dict]]:
    """One good step, one poisoned on the LAST rank only, one good: (skipped flags, changed
    tensors, history of the good steps)."""
    config = module_config(engine, rank_microbatch_size=2 * SEQ)
    env = open_environment(config)
    try:
        module = build(config, env)
        history = train_steps(module, 0, 1)
        before = {k: _copy(v) for k, v in module.state_tensors().items()}
        bad_rank = env.rank == env.world_size - 1
        forward = module.engine.module.forward

        def poisoned(*args: Any, **kwargs: Any) -> Any:
            sums = forward(*args, **kwargs)
            # "loss": non-finite value, finite gradients; "nan": non-finite everything.
            extra = torch.tensor(math.inf if poison == "loss" else math.nan)
            return sums._replace(loss=sums.loss + extra if poison == "loss" else sums.loss * extra)

        if bad_rank:
            module.engine.module.forward = poisoned
        skipped = [train_steps(module, 1, 2)[0]["skipped"]]
        module.engine.module.forward = forward
        after = {k: _copy(v) for k, v in module.state_tensors().items()}
        changed = [k for k in before if not torch.equal(before[k], after[k])]
        history += train_steps(module, 2, 3)
        skipped.append(history[-1]["skipped"])
        return skipped, changed, history
    finally:
        env.close()


def _copy(tensor: Any) -> torch.Tensor:
    for name in ("local", "_local_tensor"):
        tensor = getattr(tensor, name, tensor)
    return tensor.detach().clone()


@pytest.mark.parametrize("poison", ["nan", "loss"])
@pytest.mark.parametrize(
    ("engine", "ranks"),
    [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)],
)
def test_one_rank_non_finite_skips_on_all(
    workers: WorkerPool, engine: str, ranks: int, poison: str
) -> None:
    for skipped, changed, history in workers.run(ranks, poisoned_step, engine, poison):
        assert skipped == [1.0, 0.0]
        assert changed == []
        assert all(math.isfinite(record["loss"]) for record in history)


def first_step_skipped(engine: str, poison: bool) -> list[dict]:
    """Good steps under SGD with momentum, after a skipped first step or without it."""
    config = module_config(engine, optim=SGDConfig(lr=0.1, momentum=0.9))
    env = open_environment(config)
    try:
        module = build(config, env)
        if poison:
            forward = module.engine.module.forward

            def poisoned(*args: Any, **kwargs: Any) -> Any:
                sums = forward(*args, **kwargs)
                return sums._replace(loss=sums.loss * math.nan)

            module.engine.module.forward = poisoned
            # What a fresh momentum buffer would be made of, were it not zero.
            junk = [torch.full((1 << 16,), 1e30) for _ in range(8)]
            del junk
            assert train_steps(module, 0, 1)[0]["skipped"] == 1.0
            module.engine.module.forward = forward
        return train_steps(module, 1, 4)
    finally:
        env.close()


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp", 2), ("zero2", 2)])
def test_a_skipped_first_step_leaves_no_momentum(
    workers: WorkerPool, engine: str, ranks: int
) -> None:
    after_skip = workers.run(ranks, first_step_skipped, engine, True)[0]
    assert after_skip == workers.run(ranks, first_step_skipped, engine, False)[0]


def schedule_after_skip() -> list[float]:
    config = module_config()
    env = open_environment(config)
    try:
        module = build(config, env)
        rates = []
        for step in range(3):
            batch = {"input_ids": torch.zeros(ROWS, SEQ, dtype=torch.long)}
            module.train_batch(batch)
            metrics = module.optim_step(Progress(step, 0, 10, 10, 1))
            rates.append(float(metrics["lr"].value))
        return rates
    finally:
        env.close()


def test_learning_rate_is_a_function_of_the_step_alone(workers: WorkerPool) -> None:
    assert workers.run(1, schedule_after_skip)[0] == [1e-3] * 3

"""`TrainModule.evaluating`: the model holds averaged weights inside, and trains on as before."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.tiny import ROWS, SEQ, build, global_batch, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.distributed.config import PipelineParallelConfig
from toolkit.distributed.shards import LocalShard, local_tensor
from toolkit.optim.config import AdamWConfig
from toolkit.train.transformer import TransformerTrainModule


def memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.local if isinstance(tensor, LocalShard) else local_tensor(tensor)


@contextlib.contextmanager
def halved(module: TransformerTrainModule) -> Iterator[None]:
    """As a callback with averages of its own does: swaps what `state_tensors` hold."""
    weights = [memory(t) for k, t in module.state_tensors().items() if k.startswith("model.")]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.mul_(0.5)
    module.state_filled()
    yield
    for weight, old in zip(weights, kept, strict=True):
        weight.copy_(old)
    module.state_filled()


def evaluated(module: TransformerTrainModule) -> float:
    env, layout = module.environment, module.environment.layout
    rows, share = ROWS // layout.batch_ranks, layout.batch_rank(env.rank)
    sums = module.eval_batch({"input_ids": global_batch(50)[share * rows :][:rows]})
    totals = torch.stack([sums.loss.double(), sums.num_targets.double()])
    if env.world_size > 1:
        torch.distributed.all_reduce(totals)
    return (totals[0] / totals[1]).item()


def around_evaluations(engine: str, changes: dict[str, Any]) -> tuple[list, list, list]:
    """Losses of three steps, once in one go and once with evaluations in between; the losses of
    these."""
    found: list[list] = []
    evaluations = []
    config = module_config(engine, optim=AdamWConfig(lr=1e-3), **changes)
    env = open_environment(config)
    try:
        for with_evaluations in (False, True):
            module = build(config, env)
            module.averages.append(functools.partial(halved, module))
            losses = []
            for step in range(3):
                losses += train_steps(module, step, step + 1)
                if with_evaluations:
                    with module.evaluating():
                        evaluations.append(evaluated(module))
                        with module.evaluating():
                            assert evaluated(module) == evaluations[-1]
            found.append(losses)
    finally:
        env.close()
    return found[0], found[1], evaluations


@pytest.fixture(scope="module")
def expected(workers: WorkerPool) -> list[float]:
    return workers.run(1, around_evaluations, "single", {})[0][2]


PIPELINE = {"pp_config": PipelineParallelConfig(degree=2), "rank_microbatch_size": 4 * SEQ}


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ("fsdp", {}),
        pytest.param("zero1", {}, marks=pytest.mark.slow),
        ("zero3", {}),
        pytest.param("fsdp", PIPELINE, marks=pytest.mark.slow),
    ],
    ids=["fsdp", "zero1", "zero3", "pipeline"],
)
def test_evaluations_see_averages_and_training_does_not_notice(
    workers: WorkerPool, expected: list[float], engine: str, changes: dict[str, Any]
) -> None:
    straight, interrupted, evaluations = workers.run(2, around_evaluations, engine, changes)[0]
    assert interrupted == straight
    assert evaluations == pytest.approx(expected, rel=1e-5)
    assert len(set(evaluations)) == len(evaluations)

"""A mixture of experts trains alike under every engine, however a batch is split."""

from typing import Any

import pytest
import torch

from tests.tiny import ROWS, SEQ, build, global_batch, module_config, open_environment
from tests.workers import WorkerPool
from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.models.architecture import MoEConfig
from toolkit.train.module import Progress

STEPS = 4
MOE = MoEConfig(
    num_experts=6,
    top_k=2,
    intermediate_size=20,
    dense_layers=(0,),
    load_balancing_multiplier=0.05,
    router_z_loss_multiplier=0.01,
)
NAMES = ("loss", "load_balancing_loss", "router_z_loss", "expert_load_max", "grad_norm")


def masked_batch(step: int) -> dict[str, torch.Tensor]:
    mask = torch.zeros(ROWS, SEQ, dtype=torch.bool)
    for row in range(ROWS):
        mask[row, : 2 + 2 * row] = True
    return {"input_ids": global_batch(step), "label_mask": mask}


def history_of(engine: str, rows: int, changes: dict[str, Any]) -> list[dict[str, float]]:
    config = module_config(engine, rank_microbatch_size=rows * SEQ, **changes)
    env = open_environment(config)
    try:
        module = build(config, env, moe=MOE, init_std=0.1)
        own = slice(env.rank * ROWS // env.world_size, (env.rank + 1) * ROWS // env.world_size)
        history = []
        for step in range(STEPS):
            metrics = module.train_batch({k: v[own] for k, v in masked_batch(step).items()})
            metrics |= module.optim_step(Progress(step, 0, 100, 100, 1))
            line = {}
            for name in NAMES:
                value = torch.as_tensor(metrics[name].value).clone()
                if metrics[name].reduction == "sum" and env.world_size > 1:
                    torch.distributed.all_reduce(value)
                line[name] = value.item()
            history.append(line)
        return history
    finally:
        env.close()


@pytest.fixture(scope="module")
def reference(workers: WorkerPool) -> list[dict[str, float]]:
    return workers.run(1, history_of, "single", ROWS, {})[0]


@pytest.mark.parametrize(
    ("engine", "ranks", "rows", "changes"),
    [
        ("single", 1, 3, {}),
        ("ddp", 2, 4, {}),
        ("ddp", 2, 1, {}),
        ("fsdp", 2, 2, {"ac_config": ActivationCheckpointingConfig(mode="full")}),
        ("fsdp", 4, 2, {}),  # 6 experts on 4 ranks: sharded along another dimension
        ("zero2", 2, 2, {}),
        ("zero3", 2, 2, {}),
    ],
)
def test_losses_and_metrics_agree(
    workers: WorkerPool,
    reference: list[dict[str, float]],
    engine: str,
    ranks: int,
    rows: int,
    changes: dict[str, Any],
) -> None:
    histories = workers.run(ranks, history_of, engine, rows, changes)
    assert reference[0]["router_z_loss"] > 0
    assert reference[0]["expert_load_max"] > 1
    for history in histories:
        for got, want in zip(history, reference, strict=True):
            for name in NAMES:
                tolerance = 1e-4 if name == "grad_norm" else 1e-5
                assert got[name] == pytest.approx(want[name], rel=tolerance), name

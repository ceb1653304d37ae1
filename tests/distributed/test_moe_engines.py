"""A mixture of experts trains alike under every engine, however a batch is split."""

from typing import Any

import pytest
import torch

from tests.tiny import ROWS, SEQ, build, global_batch, module_config, open_environment
from tests.workers import WorkerPool
from toolkit.distributed.config import (
    ActivationCheckpointingConfig,
    ContextParallelConfig,
    ExpertParallelConfig,
    PipelineParallelConfig,
    TensorParallelConfig,
)
from toolkit.models.layer_configs import MoEConfig
from toolkit.train.module import Progress

STEPS = 4
MOE = MoEConfig(
    num_experts=6,
    top_k=2,
    score_function="sigmoid",
    scaling_factor=2.0,
    num_groups=3,
    top_k_groups=2,
    bias_update_rate=0.01,
    intermediate_size=20,
    dense_layers=(0,),
    load_balancing_multiplier=0.05,
    router_z_loss_multiplier=0.01,
)
MTP = {"num_mtp_layers": 1}
NAMES = ("loss", "load_balancing_loss", "router_z_loss", "expert_load_max", "grad_norm")
TP, CP, PP, EP = (
    {f"{axis}_config": kind(degree=2)}
    for axis, kind in (
        ("tp", TensorParallelConfig),
        ("cp", ContextParallelConfig),
        ("pp", PipelineParallelConfig),
        ("ep", ExpertParallelConfig),
    )
)
Histories = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def masked_batch(step: int) -> dict[str, torch.Tensor]:
    mask = torch.zeros(ROWS, SEQ, dtype=torch.bool)
    for row in range(ROWS):
        mask[row, : 2 + 2 * row] = True
    return {"input_ids": global_batch(step), "label_mask": mask}


def history_of(engine: str, rows: int, changes: dict[str, Any], model: dict[str, Any]) -> Histories:
    """The metrics of each step, and the biases of this rank's routers after the last."""
    config = module_config(engine, rank_microbatch_size=rows * SEQ, **changes)
    env = open_environment(config)
    try:
        module = build(config, env, moe=MOE, init_std=0.1, **model)
        share, place = ROWS // env.layout.batch_ranks, env.layout.batch_rank(env.rank)
        own = slice(place * share, (place + 1) * share)
        history = []
        for step in range(STEPS):
            metrics = module.train_batch({k: v[own] for k, v in masked_batch(step).items()})
            metrics |= module.optim_step(Progress(step, 0, 100, 100, 1))
            line = {}
            for name in (*NAMES, *(["mtp_loss"] if model else [])):
                value = torch.as_tensor(metrics[name].value).clone()
                if metrics[name].reduction == "sum" and env.world_size > 1:
                    value *= env.owns_loss
                    torch.distributed.all_reduce(value)
                line[name] = value.item()
            history.append(line)
        state = module.state_tensors().items()
        return history, {name: t.clone() for name, t in state if name.endswith("score_bias")}
    finally:
        env.close()


@pytest.fixture(scope="module")
def references(workers: WorkerPool) -> dict[bool, Histories]:
    """With and without multi-token prediction."""
    return {
        bool(model): workers.run(1, history_of, "single", ROWS, {}, model)[0] for model in (MTP, {})
    }


@pytest.mark.parametrize(
    ("engine", "ranks", "rows", "changes", "model"),
    [
        ("single", 1, 3, {}, MTP),
        ("ddp", 2, 4, {}, MTP),
        ("ddp", 2, 1, {}, MTP),
        ("fsdp", 2, 2, {"ac_config": ActivationCheckpointingConfig(mode="full")}, MTP),
        ("fsdp", 4, 2, {}, MTP),  # 6 experts on 4 ranks: sharded along another dimension
        ("fsdp", 2, 2, EP, MTP),
        ("fsdp", 2, 4, TP, {}),
        ("ddp", 2, 4, CP, {}),
        ("fsdp", 2, 4, PP, {}),
        ("zero2", 2, 2, {}, MTP),
        ("zero3", 2, 2, {}, MTP),
    ],
    ids=str,
)
def test_losses_and_metrics_agree(
    workers: WorkerPool,
    references: dict[bool, Histories],
    engine: str,
    ranks: int,
    rows: int,
    changes: dict[str, Any],
    model: dict[str, Any],
) -> None:
    results = workers.run(ranks, history_of, engine, rows, changes, model)
    reference, biases = references[bool(model)]
    assert reference[0]["router_z_loss"] > 0
    assert reference[0]["expert_load_max"] > 1
    held = {}
    for history, own in results:
        for got, want in zip(history, reference, strict=True):
            assert got.keys() == want.keys()
            for name in want:
                tolerance = 1e-4 if name == "grad_norm" else 1e-5
                assert got[name] == pytest.approx(want[name], rel=tolerance), name
        for name, bias in own.items():  # a rank of a pipeline has some
            assert torch.equal(bias, biases[name]), name
        held |= own
    assert held.keys() == biases.keys()
    assert all(bias.abs().max() >= 0.01 for bias in biases.values())

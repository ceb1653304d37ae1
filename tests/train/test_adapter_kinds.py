"""Every kind of adapter trains alike under every engine that holds it."""

from typing import Any

import pytest
import torch

from tests.tiny import ROWS, SEQ, build, global_batch, module_config, open_environment
from tests.workers import WorkerPool
from toolkit.distributed.config import ActivationCheckpointingConfig, TensorParallelConfig
from toolkit.models.architecture import MoEConfig
from toolkit.models.config import LoRAConfig
from toolkit.train.timeline import Progress

STEPS = 3
LINEAR = LoRAConfig(rank=4, dora=True, rslora=True, dropout=0.3)
TOKENS = LoRAConfig(rank=4, target_modules=("*.attention.*",), trainable_tokens=(99, 3))
EXPERTS = LoRAConfig(rank=4)
MOE = {"moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=16)}
TABLE = LoRAConfig(rank=4, target_modules=("*.query", "embeddings.tokens"), rslora=True)
KINDS: dict[str, tuple[LoRAConfig, dict[str, Any]]] = {
    "dora and dropout": (
        LINEAR,
        {"intermediate_size": 48, "qkv_bias": True, "attention_output_bias": True},
    ),
    "rows of tokens": (TOKENS, {}),
    "rows of tied tokens": (TOKENS, {"tie_embeddings": True}),
    "experts": (EXPERTS, MOE),
    "tied embeddings": (TABLE, {"tie_embeddings": True}),
}
OF_LAYERS = ("dora and dropout", "experts")
"""What tensor parallelism holds too."""


def trained(engine: str | None, kinds: tuple[str, ...], changes: dict[str, Any]) -> Any:
    """Of each kind, losses and gradient norms of a few steps, and the weights after them."""
    configs = {
        kind: module_config(engine, max_grad_norm=None, lora=KINDS[kind][0], **changes)
        for kind in kinds
    }
    env = open_environment(configs[kinds[0]])
    try:
        return {kind: _steps(build(c, env, **KINDS[kind][1]), env) for kind, c in configs.items()}
    finally:
        env.close()


def _steps(module: Any, env: Any) -> Any:
    before = {name: t.clone() for name, t in module.engine.weight_shards().items()}
    rows, place = ROWS // env.layout.batch_ranks, env.layout.batch_rank(env.rank)
    history = []
    for step in range(STEPS):
        progress = Progress(step, step * ROWS * SEQ, 100, 100 * ROWS * SEQ, ROWS * SEQ)
        module.progress = progress
        own = global_batch(step)[place * rows : (place + 1) * rows]
        metrics = module.train_batch({"input_ids": own})
        metrics |= module.optim_step(progress)
        loss = metrics["loss"].value.clone() * env.owns_loss
        if env.world_size > 1:
            torch.distributed.all_reduce(loss)
        history.append((loss.item(), float(metrics["grad_norm"].value)))
    after = module.engine.weight_shards()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return history, changed


@pytest.fixture(scope="module")
def reference(workers: WorkerPool) -> Any:
    return workers.run(1, trained, "single", tuple(KINDS), {})[0]


@pytest.mark.parametrize(
    ("engine", "kinds", "changes"),
    [
        ("ddp", tuple(KINDS), {"rank_microbatch_size": 2 * SEQ}),
        ("fsdp", tuple(KINDS), {"ac_config": ActivationCheckpointingConfig(mode="full")}),
        ("zero2", ("dora and dropout",), {}),
        ("zero3", tuple(KINDS), {}),
        ("fsdp", OF_LAYERS, {"tp_config": TensorParallelConfig(degree=2)}),
    ],
)
def test_engines_train_all_kinds_alike(
    workers: WorkerPool,
    reference: Any,
    engine: str,
    kinds: tuple[str, ...],
    changes: dict[str, Any],
) -> None:
    results = workers.run(2, trained, engine, kinds, changes)
    for kind in kinds:
        history, changed = reference[kind]
        for result in results:
            for got, want in zip(result[kind][0], history, strict=True):
                assert got[0] == pytest.approx(want[0], rel=1e-5), kind
                assert got[1] == pytest.approx(want[1], rel=1e-4), kind
        assert set.union(*(result[kind][1] for result in results)) == changed, kind

"""The split of a global batch changes nothing of a preference loss but rounding."""

from typing import Any

import pytest

from tests.tiny import ROWS, SEQ, build, module_config, open_environment, train_steps
from tests.train.preference.made import unit_batch
from tests.workers import WorkerPool
from toolkit.distributed.config import (
    ActivationCheckpointingConfig,
    ContextParallelConfig,
    TensorParallelConfig,
)
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.lora_config import LoRAConfig
from toolkit.optim.config import SGDConfig
from toolkit.train.preference.config import (
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    RewardConfig,
    SimPOConfig,
)

OBJECTIVES: dict[str, Any] = {
    "dpo": DPOConfig(loss="length_normalised", beta=5.0),
    "kto": KTOConfig(beta=1.0, undesirable_weight=0.5),
    "orpo": ORPOConfig(),
    "simpo": SimPOConfig(),
    "reward": RewardConfig(centering=0.1),
}
OF_ADAPTERS: dict[str, Any] = {
    "kto of base": KTOConfig(beta=1.0, reference_log_probs="base"),
}
STEPS = 2


def histories(
    engine: str, rows: int, names: list[str], changes: dict[str, Any] | None = None
) -> dict[str, list[dict]]:
    """Losses and gradient norms of each objective, with microbatches of so many rows."""
    changes = dict(changes or {})
    model = changes.pop("model", {})
    base = module_config(
        engine, rank_microbatch_size=rows * SEQ, optim=SGDConfig(lr=0.1), **changes
    )
    environment = open_environment(base)
    found = {}
    try:
        for name in names:
            objective = (OBJECTIVES | OF_ADAPTERS)[name]
            scores = {"num_scores": 1} if name == "reward" else {}
            module = build(base.replace(objective=objective), environment, **model, **scores)
            how = {"unit": objective.unit, "with_reference": name not in OF_ADAPTERS}
            found[name] = train_steps(
                module, 0, STEPS, lambda step, how=how: unit_batch(step, **how)
            )
    finally:
        environment.close()
    return found


@pytest.fixture(scope="module")
def expected(workers: WorkerPool) -> dict[str, list[dict]]:
    return workers.run(1, histories, "single", ROWS, list(OBJECTIVES))[0]


def assert_agree(found: dict[str, list[dict]], expected: dict[str, list[dict]]) -> None:
    for name, history in found.items():
        for got, want in zip(history, expected[name], strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=2e-5), name
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4), name


def test_microbatches_are_one_batch(workers: WorkerPool, expected: dict[str, list[dict]]) -> None:
    assert_agree(workers.run(1, histories, "single", 3, list(OBJECTIVES))[0], expected)


@pytest.mark.parametrize(
    ("engine", "rows", "names"),
    [
        ("ddp", 2, ["kto", "orpo"]),
        ("fsdp", 2, list(OBJECTIVES)),
        ("zero2", 4, ["kto"]),
        ("zero3", 2, ["dpo", "reward"]),
    ],
)
def test_engines_agree(
    workers: WorkerPool,
    expected: dict[str, list[dict]],
    engine: str,
    rows: int,
    names: list[str],
) -> None:
    assert_agree(workers.run(2, histories, engine, rows, names)[0], expected)


@pytest.mark.parametrize(
    ("axis", "names"),
    [
        ({"tp_config": TensorParallelConfig(degree=2)}, ["kto", "orpo"]),
        ({"cp_config": ContextParallelConfig(degree=2)}, ["kto", "orpo", "reward"]),
    ],
)
def test_ranks_that_share_rows_agree(
    workers: WorkerPool, expected: dict[str, list[dict]], axis: dict, names: list[str]
) -> None:
    assert_agree(workers.run(2, histories, "fsdp", 8, names, axis)[0], expected)


def test_adapters_and_experts_agree(workers: WorkerPool) -> None:
    changes: dict[str, Any] = {
        "lora": LoRAConfig(rank=2, target_modules=("*.attention.*",)),
        "model": {"moe": MoEConfig(num_experts=4, top_k=2, intermediate_size=16)},
    }
    expected = workers.run(1, histories, "single", ROWS, ["dpo"], changes)[0]
    assert_agree(workers.run(2, histories, "fsdp", 2, ["dpo"], changes)[0], expected)


def test_dropout_is_the_same_in_every_microbatch() -> None:
    """Also where blocks are computed again after the reference has run."""
    names = ["orpo", "kto of base"]
    lora = LoRAConfig(rank=4, dropout=0.3, target_modules=("*.attention.*",))
    expected = histories("single", ROWS, names, {"lora": lora})
    again = {"lora": lora, "ac_config": ActivationCheckpointingConfig(mode="full")}
    assert_agree(histories("single", 3, names, again), expected)

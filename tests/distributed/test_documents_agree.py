"""Rows of several documents under every engine: the losses and gradient norms of one process."""

from typing import Any

import pytest
import torch

from tests.tiny import ROWS, SEQ, build, global_batch, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.distributed.config import ActivationCheckpointingConfig
from toolkit.models.layer_configs import DeltaNetConfig

STEPS = 4
ENGINES = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
CHECKPOINTED = {"ac_config": ActivationCheckpointingConfig(mode="full")}
WINDOWED = {
    "norm_placement": "sandwich",
    "norm_weight_offset": 1.0,
    "feed_forward": "geglu",
    "embedding_scale": 32**0.5,
    "sliding_window": 3,
    "attention_pattern": ("sliding", "full"),
    "attention_soft_cap": 2.0,
    "logit_soft_cap": 4.0,
    "tie_embeddings": True,
}

HYBRID = {
    "attention_pattern": ("linear", "full"),
    "delta_net": DeltaNetConfig(
        num_key_heads=2, num_value_heads=4, key_head_dim=8, value_head_dim=4, norm_placement="pre"
    ),
    "norm_placement": "reordered",
    "qk_norm": "full",
}


def packed_batch(step: int) -> dict[str, torch.Tensor]:
    """Row r holds r + 1 documents, so every rank has its own number of targets; the second half of
    row 0 is padding."""
    place = torch.arange(SEQ)
    document_ids = torch.stack([place * (row + 1) // SEQ for row in range(ROWS)]).int()
    document_ids[0, SEQ // 2 :] = 1
    label_mask = torch.ones(ROWS, SEQ, dtype=torch.bool)
    label_mask[0, SEQ // 2 :] = False
    return {
        "input_ids": global_batch(step),
        "label_mask": label_mask,
        "document_ids": document_ids,
    }


def documents_history(
    engine: str, rows: int, changes: dict[str, Any], model: dict[str, Any]
) -> list[dict[str, float]]:
    config = module_config(engine, rank_microbatch_size=rows * SEQ, **changes)
    env = open_environment(config)
    try:
        return train_steps(build(config, env, **model), 0, STEPS, packed_batch)
    finally:
        env.close()


@pytest.fixture(scope="module")
def reference(workers: WorkerPool) -> dict[str, Any]:
    kinds: dict[str, Any] = {
        "fp32": ({}, {}),
        "learned": ({}, {"positions": "learned"}),
        "bf16": ({"precision": "bf16"}, {}),
        "windowed": ({}, WINDOWED),
        "windowed_bf16": ({"precision": "bf16"}, WINDOWED),
        "hybrid": ({}, HYBRID),
        "hybrid_bf16": ({"precision": "bf16"}, HYBRID),
    }
    return {
        kind: workers.run(1, documents_history, "single", ROWS, *settings)[0]
        for kind, settings in kinds.items()
    }


def assert_agree(got: list[dict], expected: list[dict], rel: float) -> None:
    assert len(got) == len(expected) == STEPS
    for ours, theirs in zip(got, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=rel)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * rel)


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_and_grad_norms_agree(
    workers: WorkerPool, reference: dict[str, Any], engine: str, rows: int
) -> None:
    got = workers.run(2, documents_history, engine, rows, {}, {})[0]
    assert_agree(got, reference["fp32"], 1e-5)


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_learned_positions_agree(
    workers: WorkerPool, reference: dict[str, Any], engine: str
) -> None:
    got = workers.run(2, documents_history, engine, 2, {}, {"positions": "learned"})[0]
    assert_agree(got, reference["learned"], 1e-5)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero3"])
def test_windows_caps_and_sandwich_norms_agree(
    workers: WorkerPool, reference: dict[str, Any], engine: str
) -> None:
    got = workers.run(2, documents_history, engine, 2, CHECKPOINTED, WINDOWED)[0]
    assert_agree(got, reference["windowed"], 1e-5)


def test_low_precision_copies_compute_what_autocast_does_in_windowed_models(
    workers: WorkerPool, reference: dict[str, Any]
) -> None:
    got = workers.run(2, documents_history, "fsdp", 2, {"precision": "bf16"}, WINDOWED)[0]
    assert got[0]["loss"] == pytest.approx(reference["windowed_bf16"][0]["loss"], rel=1e-5)
    assert_agree(got, reference["windowed_bf16"], 1e-3)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_linear_attention_agrees(
    workers: WorkerPool, reference: dict[str, Any], engine: str
) -> None:
    got = workers.run(2, documents_history, engine, 2, CHECKPOINTED, HYBRID)[0]
    assert_agree(got, reference["hybrid"], 1e-5)


def test_low_precision_copies_compute_what_autocast_does_in_linear_attention(
    workers: WorkerPool, reference: dict[str, Any]
) -> None:
    got = workers.run(2, documents_history, "fsdp", 2, {"precision": "bf16"}, HYBRID)[0]
    assert got[0]["loss"] == pytest.approx(reference["hybrid_bf16"][0]["loss"], rel=1e-5)
    assert_agree(got, reference["hybrid_bf16"], 1e-3)


@pytest.mark.parametrize("engine", ["single", *ENGINES])
def test_activation_checkpointing_changes_nothing(
    workers: WorkerPool, reference: dict[str, Any], engine: str
) -> None:
    ranks = 1 if engine == "single" else 2
    got = workers.run(ranks, documents_history, engine, 2, CHECKPOINTED, {})[0]
    assert_agree(got, reference["fp32"], 1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_agrees_with_bf16_of_one_process(
    workers: WorkerPool, reference: dict[str, Any], engine: str
) -> None:
    got = workers.run(2, documents_history, engine, 2, {"precision": "bf16"}, {})[0]
    assert got[0]["loss"] == pytest.approx(reference["bf16"][0]["loss"], rel=1e-5)
    assert_agree(got, reference["bf16"], 1e-3)
    assert_agree(got, reference["fp32"], 5e-3)


def test_the_documents_matter(workers: WorkerPool, reference: dict[str, Any]) -> None:
    from tests.distributed.test_engines_agree import history_of

    plain, _ = workers.run(1, history_of, "single", ROWS, {}, "adamw")[0]
    assert abs(plain[0]["loss"] - reference["fp32"][0]["loss"]) > 1e-3

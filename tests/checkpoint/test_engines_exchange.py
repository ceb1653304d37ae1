"""A checkpoint of one engine continues under another."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import build, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.checkpoint.commit import load_checkpoint, save_checkpoint
from toolkit.checkpoint.layout import check_files, read_metadata
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.train.config import TransformerTrainModuleConfig

ENGINES = [
    ("single", 1),
    ("ddp", 2),
    ("fsdp", 2),
    ("fsdp+offload", 2),
    ("hsdp", 4),
    ("zero1", 2),
    ("zero2", 2),
    ("zero2+offload", 2),
    ("zero3", 2),
    ("zero3+offload", 2),
]


def config_of(engine: str) -> TransformerTrainModuleConfig:
    name, _, offload = engine.partition("+")
    return module_config(name, dp={"cpu_offload": bool(offload)})


def save_after(engine: str, root: str, steps: int) -> list[dict[str, float]]:
    config = config_of(engine)
    env = open_environment(config)
    try:
        module = build(config, env)
        train_steps(module, 0, steps)
        save_checkpoint(
            Path(root), step=steps, tokens=0, tensors=module.state_tensors(), rank_state={"r": 1},
            engine=engine, rank=env.rank, group=env.cpu_group,
        )  # fmt: skip
        return train_steps(module, steps, steps + 3)
    finally:
        env.close()


def resume_from(engine: str, checkpoint: str, steps: int, again: str | None = None) -> Any:
    config = config_of(engine)
    env = open_environment(config, seed=99)  # other initial values: loading must replace them all
    try:
        module = build(config, env)
        load_checkpoint(
            Path(checkpoint), tensors=module.state_tensors(), rank=env.rank, group=env.cpu_group
        )
        module.state_filled()
        if again is not None:
            save_checkpoint(
                Path(again), step=steps, tokens=0, tensors=module.state_tensors(),
                rank_state={}, engine=engine, rank=env.rank, group=env.cpu_group,
            )  # fmt: skip
        return train_steps(module, steps, steps + 3)
    finally:
        env.close()


@pytest.fixture(scope="module")
def reference(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list]:
    root = tmp_path_factory.mktemp("reference")
    history = workers.run(1, save_after, "single", str(root), 3)[0]
    return str(root / "step3"), history


@pytest.mark.parametrize(("engine", "ranks"), ENGINES)
def test_reference_state_continues_under_every_engine(
    workers: WorkerPool, reference: tuple[str, list], engine: str, ranks: int, tmp_path: Path
) -> None:
    checkpoint, expected = reference
    history = workers.run(ranks, resume_from, engine, checkpoint, 3, str(tmp_path))[0]
    for got, want in zip(history, expected, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    # What the engine holds after loading, saved again, is bit for bit what was loaded.
    before = dict(iterate_tensors(Path(checkpoint) / "model_and_optim", ""))
    after = dict(iterate_tensors(tmp_path / "step3" / "model_and_optim", ""))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("engine", "ranks"), ENGINES[1:])
def test_every_engine_saves_what_single_continues(
    workers: WorkerPool, engine: str, ranks: int, tmp_path: Path
) -> None:
    expected = workers.run(ranks, save_after, engine, str(tmp_path), 3)[0]
    checkpoint = tmp_path / "step3"
    check_files(checkpoint, read_metadata(checkpoint), hashes=True)
    history = workers.run(1, resume_from, "single", str(checkpoint), 3)[0]
    for got, want in zip(history, expected, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)


@pytest.mark.parametrize(("engine", "ranks"), ENGINES)
def test_same_engine_resumes_bit_equal(
    workers: WorkerPool, engine: str, ranks: int, tmp_path: Path
) -> None:
    expected = workers.run(ranks, save_after, engine, str(tmp_path), 3)[0]
    history = workers.run(ranks, resume_from, engine, str(tmp_path / "step3"), 3)[0]
    assert history == expected

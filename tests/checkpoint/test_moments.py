"""Checkpoints of a run whose frozen parameters change, under every engine."""

from pathlib import Path

import pytest
import torch

from tests.tiny import build, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.load import load_checkpoint, shapes_of
from toolkit.train.matching import change_of_training, without_new_moments

BEFORE, AFTER = ("blocks.0.attention.*",), ("blocks.1.attention.*",)
NEW, DROPPED = "blocks.0.attention.query.weight", "blocks.1.attention.query.weight"


def sums(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """This rank's part of the moments, added up."""
    found = {}
    for key, tensor in tensors.items():
        if key.startswith("optim.") and key.endswith(".exp_avg_sq"):
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            local = getattr(local, "local", local)
            found[key.removeprefix("optim.").removesuffix(".exp_avg_sq")] = float(local.sum())
    return found


def change_what_is_frozen(engine: str, root: str) -> tuple[list[str], dict[str, float], list]:
    """Train two steps, save; go on with other frozen parameters for one step."""
    env = open_environment(module_config(engine))
    try:
        module = build(module_config(engine, freeze=BEFORE), env)
        train_steps(module, 0, 2)
        folder = save_checkpoint(
            Path(root), step=2, tokens=0, tensors=module.state_tensors(), rank_state={},
            engine=engine, rank=env.rank, group=env.cpu_group,
        )  # fmt: skip
        env.barrier()
        module = build(module_config(engine, freeze=AFTER), env)
        stored = shapes_of(folder)
        tensors = without_new_moments(module.state_tensors(), stored)
        load_checkpoint(folder, tensors=tensors, rank=env.rank, group=env.cpu_group)
        module.state_filled()
        loaded = sums(module.state_tensors())
        history = train_steps(module, 2, 3)
        return change_of_training(stored, module.trained_names), loaded, history
    finally:
        env.close()


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_new_parameters_start_with_fresh_moments_and_others_keep_theirs(
    workers: WorkerPool, tmp_path: Path, engine: str
) -> None:
    results = workers.run(2, change_what_is_frozen, engine, str(tmp_path))
    lines, _, history = results[0]
    assert lines[0].startswith("fresh optimizer state for 4 parameters (blocks.0.attention.")
    assert lines[1].startswith("optimizer state dropped of 4 parameters (blocks.1.attention.")
    everywhere = [loaded for _, loaded, _ in results]
    assert sum(loaded.get(NEW, 0.0) for loaded in everywhere) == 0.0
    assert all(DROPPED not in loaded for loaded in everywhere)
    kept = "blocks.1.feed_forward.down.weight"
    assert any(kept in loaded for loaded in everywhere), sorted(everywhere[0])
    assert sum(loaded.get(kept, 0.0) for loaded in everywhere) > 0.0
    assert history[0]["skipped"] == 0.0

"""One rank's failure is every rank's error, in one line that names it."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool
from toolkit.checkpoint import commit, folder
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.find import find_checkpoint
from toolkit.checkpoint.folder import read_metadata
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.errors import TrainingError


def save(root: str, step: int, env: Any) -> None:
    save_checkpoint(
        Path(root), step=step, tokens=0, tensors={"model.a": torch.ones(4)}, rank_state={},
        engine="ddp", rank=env.rank, group=env.cpu_group,
    )  # fmt: skip


def save_with_failure(root: str, where: str) -> str:
    """Step 1 is saved; step 2 fails on rank 1, or while rank 0 commits."""
    targets: dict[str, tuple[Any, str, int]] = {
        "tensors": (ShardWriter, "write", 1),
        "state": (commit, "_save_rank_state", 1),
        "commit": (commit, "commit_folder", 0),
    }
    target, name, failing = targets[where]
    env = open_environment(module_config("ddp"))
    try:
        save(root, 1, env)
        fail = mock.patch.object(target, name, side_effect=OSError("disk full"))
        failing_here = fail if env.rank == failing else contextlib.nullcontext()
        with failing_here, pytest.raises(TrainingError) as caught:
            save(root, 2, env)
        return str(caught.value)
    finally:
        env.close()


def find_with_failure(root: str) -> tuple[Path | None, tuple[Path, ...]]:
    """Two checkpoints; rank 1 cannot read its share of the newer."""
    env = open_environment(module_config("ddp"))
    try:
        save(root, 1, env)
        save(root, 2, env)
        hash_file = folder.hash_file

        def hash_or_fail(path: Path) -> str:
            if env.rank == 1 and "step2" in str(path):
                raise OSError("input/output error")
            return hash_file(path)

        with mock.patch.object(folder, "hash_file", hash_or_fail):
            return find_checkpoint(Path(root), rank=env.rank, group=env.cpu_group)
    finally:
        env.close()


@pytest.mark.parametrize(("where", "rank"), [("tensors", 1), ("state", 1), ("commit", 0)])
def test_a_save_that_fails_on_one_rank_fails_on_all(
    workers: WorkerPool, tmp_path: Path, where: str, rank: int
) -> None:
    messages = workers.run(2, save_with_failure, str(tmp_path), where)
    assert messages[0] == messages[1]
    assert f"step2: not saved, earlier checkpoints are as they were: rank {rank} on" in messages[0]
    assert messages[0].endswith("OSError: disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["step1"]


def test_each_rank_checks_a_share_and_all_agree(workers: WorkerPool, tmp_path: Path) -> None:
    found = workers.run(2, find_with_failure, str(tmp_path))
    assert found == [(tmp_path / "step1", (tmp_path / "step2",))] * 2
    files = read_metadata(tmp_path / "step1").files
    assert {"train/rank0.pt", "train/rank1.pt", "model_and_optim/.metadata"} < files.keys()

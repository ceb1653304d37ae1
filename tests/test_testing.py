"""What the toolkit offers to tests of others."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.e2e._run import environ
from tests.forked import Forked
from tests.workers import WorkerPool
from toolkit import testing
from toolkit.errors import ConfigError
from toolkit.testing import assert_same_training, run_distributed_test, tiny_experiment


def sum_over_ranks(value: float) -> tuple[int, float, int]:
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), dist.get_world_size()


def fail_on_rank_1() -> None:
    assert dist.get_rank() == 0, "not today"


def wait_for_ever() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        import time

        time.sleep(60)


@pytest.fixture(autouse=True)
def _warm_processes(workers: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "_pool", workers)


def test_ranks_meet_and_give_their_values_in_order() -> None:
    assert run_distributed_test(sum_over_ranks, args=[1.5]) == [(0, 4.5, 2), (1, 4.5, 2)]
    assert run_distributed_test(sum_over_ranks, world_size=3, args=[1.0])[2] == (2, 6.0, 3)


def test_a_rank_that_fails_or_hangs_fails_the_test_and_the_next_is_clean() -> None:
    with pytest.raises(RuntimeError, match="not today"):
        run_distributed_test(fail_on_rank_1)
    with pytest.raises(TimeoutError, match=r"ranks \[.*\] did not finish"):
        run_distributed_test(wait_for_ever, timeout=8)
    assert run_distributed_test(sum_over_ranks, world_size=1, args=[2.0]) == [(0, 2.0, 1)]


def test_two_tiny_runs_are_the_same_training_and_a_changed_one_is_not(tmp_path: Path) -> None:
    steps = {"value": 4, "unit": "steps"}
    config = tiny_experiment(tmp_path, trainer={"max_duration": steps})
    assert config.trainer.max_duration.value == 4
    words = ["train", str(tmp_path / "tiny.json"), "--train_module.scheduler.warmup=1"]
    for name, more in (("a", []), ("b", []), ("c", ["--seed=2"])):
        output = tmp_path / f"output-{name}"
        run = Forked([*words, "--name", name, *more], cwd=tmp_path, env=environ(), output=output)
        assert run.wait(120) == 0, output.read_text()
    runs = tmp_path / "runs" / "tiny"
    assert_same_training(runs / "a", runs / "b")
    with pytest.raises(AssertionError, match=r"train\.jsonl: .*step=1"):
        assert_same_training(runs / "a", runs / "c")
    for stream in ("train", "eval"):
        shutil.copy(runs / "a" / "metrics" / f"{stream}.jsonl", runs / "c" / "metrics")
    with pytest.raises(AssertionError, match="differs"):
        assert_same_training(runs / "a", runs / "c")


def test_sections_are_laid_over_the_tiny_config(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path, train_module={"optim": {"type": "lion"}}, seed=7)
    assert (type(config.train_module.optim).__name__, config.seed) == ("LionConfig", 7)
    with pytest.raises(ConfigError, match="optim"):
        tiny_experiment(tmp_path, train_module={"optim": {"type": "lions"}})


def test_ranks_that_make_a_tiny_experiment_at_once_read_it_whole(tmp_path: Path) -> None:
    """Files are replaced, never written in place."""
    tiny_experiment(tmp_path)
    with (tmp_path / "tiny.json").open() as before:
        tiny_experiment(tmp_path)
        assert os.fstat(before.fileno()).st_ino != (tmp_path / "tiny.json").stat().st_ino

"""Saving while training goes on, and what a save that fails costs."""

import errno
import json
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.workers import WorkerPool
from toolkit.checkpoint.host_copy import HostCopy
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.errors import RunError, ToolkitError
from toolkit.train.callbacks.checkpointer import Checkpointer
from toolkit.train.callbacks.config import CheckpointerConfig

STEPS = 12


def run(
    root: str, name: str, trouble: str = "", checkpointer: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A run of `STEPS` steps that saves every 3, in this worker; what came of it."""
    from toolkit.commands.train import train
    from toolkit.experiment.load import load_experiment

    settings = {"interval": 3, "keep_last": None, "export_hf": False} | (checkpointer or {})
    config = load_experiment(
        "smoke",
        [
            f"--run.root={root}/runs",
            f"--run.name={name}",
            f"--dataset.root={root}/data",
            "--train_module.precision=fp32",
            f"--trainer.max_duration.value={STEPS}",
            "--trainer.callbacks.lm_evaluator={interval: 6}",
            f"--trainer.callbacks.checkpointer={json.dumps(settings)}",
            "--trainer.callbacks.console_logger.enabled=false",
            "--trainer.callbacks.system_monitor.enabled=false",
        ],
    ).config
    seen = Troubled(trouble)
    before = ShardWriter.write
    ShardWriter.write = seen.write  # type: ignore[method-assign]
    finish = HostCopy.finish
    HostCopy.finish = seen.finish  # type: ignore[method-assign]
    disk_usage = shutil.disk_usage
    if trouble == "no room":
        shutil.disk_usage = lambda _: SimpleNamespace(free=1000)  # type: ignore[assignment, return-value]
    code, message = 0, ""
    try:
        code = train(config)
    except ToolkitError as error:
        code, message = error.exit_code, str(error)
    finally:
        ShardWriter.write = before  # type: ignore[method-assign]
        HostCopy.finish = finish  # type: ignore[method-assign]
        shutil.disk_usage = disk_usage
    folder = Path(root) / "runs" / "smoke" / name
    status = json.loads((folder / "metadata" / "status.json").read_text())
    return {
        "code": code,
        "message": message,
        "log": (folder / "logs" / "rank0.log").read_text(),
        "steps": sorted(int(p.name[4:]) for p in (folder / "checkpoints").iterdir()),
        "state": status["state"],
        "most_at_once": seen.most_at_once,
        "main_thread": seen.main_thread,
        "late_copies": seen.late_copies,
    }


class Troubled:
    """`ShardWriter.write` that is slow, or fails for step 6."""

    original = ShardWriter.write
    original_finish = HostCopy.finish

    def __init__(self, trouble: str) -> None:
        self.trouble = trouble
        self.at_once = self.most_at_once = 0
        self.main_thread: list[bool] = []
        self.late_copies = 0

    @property
    def finish(self) -> Any:
        """Copies that are slower than a step: the optimizer must wait for them."""

        def finish(copy: HostCopy) -> None:
            if self.trouble == "slow" and copy._late_on_cpu:
                self.late_copies += 1
                time.sleep(0.1)
            Troubled.original_finish(copy)

        return finish

    @property
    def write(self) -> Any:
        def write(shards: ShardWriter, folder: Path, resolve: Any) -> Any:
            self.main_thread.append(threading.current_thread() is threading.main_thread())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                if self.trouble == "slow":
                    time.sleep(0.3)
                is_last_rank = shards._rank == 0 if shards._group is None else shards._rank == 1
                if self.trouble == "full" and is_last_rank and "step6.tmp" in str(folder):
                    raise OSError(errno.ENOSPC, "No space left on device")
                if self.trouble == "limit" and is_last_rank and "step6.tmp" in str(folder):
                    with file_size_limit(100_000):
                        return Troubled.original(shards, folder, resolve)
                return Troubled.original(shards, folder, resolve)
            finally:
                self.at_once -= 1

        return write


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let this process write more than `size` bytes into any file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tensors_of(root: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    folder = root / "runs" / "smoke" / name / "checkpoints" / f"step{step}" / "model_and_optim"
    return dict(iterate_tensors(folder, ""))


@pytest.mark.parametrize("ranks", [1, 2])
def test_background_saves_hold_what_blocking_ones_do(
    workers: WorkerPool, tmp_path: Path, ranks: int
) -> None:
    slow = workers.run(ranks, run, str(tmp_path), "background", "slow")[0]
    blocking = workers.run(ranks, run, str(tmp_path), "blocking", "", {"asynchronous": False})[0]
    assert slow["steps"] == blocking["steps"] == [3, 6, 9, 12]
    assert slow["most_at_once"] == 1
    assert slow["main_thread"] == [False, False, False, True]  # the last one waits
    assert slow["late_copies"] == 3
    assert blocking["main_thread"] == [True] * 4
    for step in (3, 12):
        ours, theirs = (tensors_of(tmp_path, name, step) for name in ("background", "blocking"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("trouble", "cause"), [("full", "No space left on device"), ("limit", "File too large")]
)
def test_a_full_disk_costs_one_checkpoint(
    workers: WorkerPool, tmp_path: Path, ranks: int, asynchronous: bool, trouble: str, cause: str
) -> None:
    got = workers.run(ranks, run, str(tmp_path), "r", trouble, {"asynchronous": asynchronous})[0]
    assert (got["code"], got["state"], got["steps"]) == (0, "finished", [3, 9, 12])
    assert f"step6: not saved, earlier checkpoints are as they were: rank {ranks - 1}" in got["log"]
    assert f"{cause}; training goes on" in got["log"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_ends_the_run_where_the_config_says_so(
    workers: WorkerPool, tmp_path: Path, ranks: int
) -> None:
    results = workers.run(ranks, run, str(tmp_path), "r", "full", {"on_error": "stop"})
    for got in results:
        assert (got["code"], got["state"]) == (1, "failed")
        assert "No space left on device" in got["message"]
    assert results[0]["steps"] == [3]


def test_space_is_looked_at_before_anything_is_written(workers: WorkerPool, tmp_path: Path) -> None:
    got = workers.run(1, run, str(tmp_path), "r", "no room")[0]
    assert (got["code"], got["state"], got["steps"]) == (1, "failed", [])
    assert "GB are needed on the disk of" in got["message"]
    assert got["log"].count("training goes on") == 3
    assert not got["main_thread"]


def test_kinds_of_checkpoints_stay_by_their_rules(workers: WorkerPool, tmp_path: Path) -> None:
    # 2 for ever; 4 and 8 replaced by 12; 5 and 10 ephemeral.
    rules = {"interval": 4, "keep_last": 1, "fixed_steps": [2], "ephemeral_interval": 5}
    assert workers.run(1, run, str(tmp_path), "r", "", rules)[0]["steps"] == [2, 12]
    # The loss falls: of the two evaluations the first is worse.
    best = {"interval": 6, "keep_last": 1, "keep_best": 1}
    assert workers.run(1, run, str(tmp_path), "s", "", best)[0]["steps"] == [12]
    best["best_mode"] = "max"
    assert workers.run(1, run, str(tmp_path), "t", "", best)[0]["steps"] == [6, 12]


def test_a_writer_that_lost_the_run_leaves_the_new_owners_files(tmp_path: Path) -> None:
    unfinished = tmp_path / "checkpoints" / "step7.tmp"
    unfinished.mkdir(parents=True)

    def refuse() -> None:
        raise RunError("taken over")

    state: Any = SimpleNamespace(
        run=SimpleNamespace(check_owner=refuse, path=tmp_path.joinpath),
        environment=SimpleNamespace(broadcast=lambda value: value),
        step=7,
    )
    saver = Checkpointer(CheckpointerConfig())
    saver.state = state
    for in_background in (False, True):
        with pytest.raises(RunError, match="taken over"):
            saver._save("permanent", in_background=in_background)
    assert unfinished.is_dir()

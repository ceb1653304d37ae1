"""When something fails the first cause is told, and nothing that was removed is made anew."""

import errno
import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_remote_runs import run
from tests.workers import WorkerPool
from toolkit.checkpoint.folder import METADATA_FILE
from toolkit.errors import EXIT_STOPPED
from toolkit.metrics.streams import MetricStreams
from toolkit.runs.manager import RunManager
from toolkit.runs.registry import start_run
from toolkit.runs.status import read_status
from toolkit.train.trainer import Trainer

FLAGS = ("--trainer.no_evals", "--trainer.metrics_collect_interval=1")


def at_step(step: int, action: Any) -> None:
    """`action(trainer)` in the middle of a step, once; for the rest of this worker's job."""
    unchanged = Trainer._train_step

    def train_step(trainer: Trainer, batch: Any) -> None:
        if trainer.state.step == step - 1:
            Trainer._train_step = unchanged  # type: ignore[method-assign]
            action(trainer)
        unchanged(trainer, batch)

    Trainer._train_step = train_step  # type: ignore[method-assign, assignment]


def remove_run(folder: str, data: str, how: str) -> tuple[int, str]:
    if os.environ["RANK"] == "0":

        def remove(_: Trainer) -> None:
            # At once: what other threads write meanwhile would make rmtree fail, in the trainer.
            os.rename(folder, folder + ".moved")
            if how == "removed":
                shutil.rmtree(folder + ".moved")

        at_step(4, remove)
    return run(folder, data, *FLAGS)


@pytest.mark.parametrize(("ranks", "how"), [(1, "removed"), (2, "removed"), (1, "moved")])
def test_a_run_folder_that_goes_ends_the_run_and_stays_away(
    workers: WorkerPool, tmp_path: Path, ranks: int, how: str
) -> None:
    folder = tmp_path / "run"
    results = workers.run(ranks, remove_run, str(folder), str(tmp_path / "data"), how)
    code, message = results[0]
    expected = f"{folder}: the run folder was removed or moved while training"
    assert (code, message[: len(expected)]) == (2, expected)
    for code, message in results[1:]:  # quietly
        assert code == 1
        assert message.startswith(("another rank has failed", "rank 1 on ", expected))
    assert not folder.exists()


def fill_disk(folder: str, data: str, what: str) -> tuple[tuple[int, str], bool]:
    """Every write of metrics, and if asked for every later status and log, fails from step 4 on."""
    full = OSError(errno.ENOSPC, "No space left on device", f"{folder}/metrics/train.jsonl")

    def fail(*_: Any, **__: Any) -> None:
        raise full

    def fill(_: Trainer) -> None:
        MetricStreams.write = fail  # type: ignore[method-assign]
        MetricStreams.close = fail  # type: ignore[method-assign]
        if what == "everything":
            RunManager._write_status = fail  # type: ignore[method-assign]
            for handler in logging.getLogger("toolkit").handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.setStream(open("/dev/full", "w"))  # noqa: SIM115

    kept = MetricStreams.write, MetricStreams.close, RunManager._write_status
    at_step(4, fill)
    try:
        return run(folder, data, *FLAGS), os.path.exists(f"{folder}/metadata/lock.json")
    finally:
        MetricStreams.write, MetricStreams.close, RunManager._write_status = kept  # type: ignore[method-assign]


@pytest.mark.parametrize("what", ["metrics", "everything"])
def test_on_a_full_disk_the_first_cause_is_the_message(
    workers: WorkerPool, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "run"
    (((code, message), is_locked),) = workers.run(
        1, fill_disk, str(folder), str(tmp_path / "data"), what
    )
    assert code == 1
    assert message == (
        f"metrics cannot be written: {folder}/metrics/train.jsonl: No space left on device: free "
        "some space there; then go on with `toolkit resume`"
    )
    assert not is_locked
    status = read_status(folder)
    assert status is not None
    if what == "metrics":
        assert (status.state, status.message) == ("failed", message)


def lose_helper(folder: str, data: str, phase: str) -> tuple[int, str]:
    """What a signal for the whole group does: this process is asked, and a helper of it dies."""

    def lose(trainer: Trainer) -> None:
        if phase == "optimizer step":
            trainer.state.heartbeat.beat(phase, trainer.state.step)
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a compiler was killed")

    at_step(4, lose)
    try:
        return run(folder, data, *FLAGS)
    except RuntimeError as error:
        return -1, str(error)


def test_a_helper_that_dies_with_the_request_is_part_of_the_stop(
    workers: WorkerPool, tmp_path: Path
) -> None:
    data = str(tmp_path / "data")
    ((code, _),) = workers.run(1, lose_helper, str(tmp_path / "run"), data, "forward and backward")
    assert code == EXIT_STOPPED
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.step, status.exit_reason) == ("stopped", 3, "SIGTERM")
    assert (tmp_path / "run" / "checkpoints" / "step3").is_dir()
    lines = (tmp_path / "run" / "metrics" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_half_an_optimizer_step_is_no_stop(workers: WorkerPool, tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    ((code, message),) = workers.run(1, lose_helper, str(tmp_path / "run"), data, "optimizer step")
    assert (code, message) == (-1, "a compiler was killed")


def interrupt_start(folder: str, data: str, reason: str) -> tuple[int, str]:
    from toolkit.experiment.training import Training

    def interrupted(*_: Any) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a helper died of it")

    kept, Training.train = Training.train, interrupted  # type: ignore[method-assign]
    try:
        return run(folder, data)
    finally:
        Training.train = kept  # type: ignore[method-assign]


def test_a_start_that_is_stopped_says_so_in_the_status(workers: WorkerPool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    data = str(tmp_path / "data")
    assert workers.run(1, interrupt_start, str(folder), data, "SIGTERM") == [(EXIT_STOPPED, "")]
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.exit_reason) == ("stopped", "SIGTERM")
    assert status.message == "SIGTERM before the first step"
    assert workers.run(1, run, str(folder), data, *FLAGS) == [(0, "")]  # it goes on


@pytest.mark.parametrize("saved", [True, False])
def test_a_second_request_leaves_a_status(tmp_path: Path, saved: bool) -> None:
    from types import SimpleNamespace
    from typing import cast

    from toolkit.launch.stopping import StopRequest
    from toolkit.launch.watchdog import Heartbeat
    from toolkit.train.ending import listening
    from toolkit.train.state import TrainState

    manager = start_run("exp", "one", root=tmp_path)
    checkpoint = manager.folder / "checkpoints" / "step5"
    if saved:
        checkpoint.mkdir(parents=True)
        (checkpoint / METADATA_FILE).write_text("{}")
    stop, heartbeat = StopRequest(), Heartbeat()
    heartbeat.beat("forward and backward", 8)
    state = SimpleNamespace(
        run=manager, step=8, tokens=80, tokens_per_step=10, heartbeat=heartbeat, stop_request=stop,
        last_loss=2.5,
    )  # fmt: skip
    with listening(cast(TrainState, state)):
        line = stop.last_words("SIGINT")
    newest = "the newest checkpoint is step5" if saved else "nothing is saved yet"
    assert line == f"SIGINT again: stopped now at step 7; {newest}"
    manager.set_status("running")  # the thread that was about to say so
    status = read_status(manager.folder)
    assert status is not None
    assert (status.state, status.exit_reason) == ("stopped" if saved else "failed", "SIGINT")
    assert (status.step, status.tokens, status.message) == (7, 70, line)
    assert status.loss == 2.5
    assert manager._lock is not None
    manager._lock.release()  # as the end of the process would


def test_a_failure_leaves_the_newest_loss(tmp_path: Path) -> None:
    from types import SimpleNamespace
    from typing import cast

    from toolkit.train.ending import close_after_failure
    from toolkit.train.state import TrainState

    manager = start_run("exp", "one", root=tmp_path)
    manager.set_status("running", step=1, loss=5.5)
    state = SimpleNamespace(run=manager, step=72, tokens=720, recorder=None, last_loss=2.83)
    close_after_failure(cast(TrainState, state), "lost rank 1")
    status = read_status(manager.folder)
    assert status is not None
    assert (status.state, status.step, status.loss) == ("failed", 72, 2.83)


def test_a_rank_ended_for_anothers_failure_is_no_stop(tmp_path: Path) -> None:
    from toolkit.errors import EXIT_FAILED
    from toolkit.launch.failures import Peers
    from toolkit.launch.starting import RunStart

    start = RunStart()
    start.run = start_run("exp", "one", root=tmp_path)
    start.run.path("metadata/ranks").mkdir()
    Peers(start.run, rank=1, world_size=2).fail(ValueError("bad"), step=0)
    assert start.stop("SIGTERM") == EXIT_FAILED
    status = read_status(start.run.folder)
    assert status is not None
    assert status.state == "failed"
    assert "rank 1 on" in str(status.message)
    assert str(status.message).endswith("ValueError: bad")


def test_an_end_that_is_asked_for_after_the_last_step_leaves_nothing_out(
    workers: WorkerPool, tmp_path: Path
) -> None:
    stopping = {"enabled": True, "metric": "train/loss", "min_delta": 100, "patience": 10}
    flags = (
        "--trainer.metrics_collect_interval=10",
        "--trainer.callbacks.lm_evaluator={interval: 250}",
        f"--trainer.callbacks.early_stopping={json.dumps(stopping)}",
    )
    folder = tmp_path / "run"
    done = workers.run(1, run, str(folder), str(tmp_path / "data"), *flags)
    assert done == [(0, "")]
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.step, status.exit_reason) == ("finished", 12, "done")
    (line,) = (folder / "metrics/eval.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 12

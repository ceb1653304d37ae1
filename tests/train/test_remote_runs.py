"""Runs that copy their checkpoints elsewhere, come back from there, or begin there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.s3 import BUCKET, s3_server, times
from tests.workers import WorkerPool
from toolkit.checkpoint.folder import saved_steps
from toolkit.errors import ToolkitError

STEPS = 12


def run(folder: str, data: str, *flags: str) -> tuple[int, str]:
    """A run in `folder`, in this worker; exit code and message."""
    from toolkit.commands.train import train
    from toolkit.experiment.load import load_experiment

    config = load_experiment(
        "smoke",
        [
            f"--run.save_folder={folder}",
            f"--dataset.root={data}",
            "--train_module.precision=fp32",
            f"--trainer.max_duration.value={STEPS}",
            "--trainer.callbacks.lm_evaluator={interval: 6, at_start: true}",
            "--trainer.callbacks.checkpointer.interval=3",
            "--trainer.callbacks.checkpointer.export_hf=false",
            "--trainer.callbacks.console_logger.enabled=false",
            "--trainer.callbacks.system_monitor.enabled=false",
            *flags,
        ],
    ).config
    try:
        return train(config), ""
    except ToolkitError as error:
        return error.exit_code, str(error)


def losses(folder: Path, stream: str = "train") -> dict[int, float]:
    lines = (folder / "metrics" / f"{stream}.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


@pytest.fixture(scope="module")
def undisturbed(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run folder, data root) of a whole run on one process."""
    place = tmp_path_factory.mktemp("undisturbed")
    assert workers.run(1, run, str(place / "run"), str(place / "data")) == [(0, "")]
    return place / "run", place / "data"


def to(url: str, *more: str) -> list[str]:
    return [f"--trainer.callbacks.checkpointer.upload_to={url}", *more]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_machine_is_gone_goes_on_elsewhere(
    workers: WorkerPool, undisturbed: tuple[Path, Path], tmp_path: Path, ranks: int
) -> None:
    expected, data = undisturbed
    url, folder = f"file://{tmp_path}/store", tmp_path / "run"
    flags = to(url, "--trainer.callbacks.checkpointer.keep_last=2")
    stop = "--trainer.hard_stop={value: 7, unit: steps}"
    results = workers.run(ranks, run, str(folder), str(data), *flags, stop)
    assert results == [(0, "")] * ranks
    assert saved_steps(url) == saved_steps(folder / "checkpoints") == [6, 7]
    shutil.rmtree(folder)
    assert workers.run(ranks, run, str(folder), str(data), *flags) == [(0, "")] * ranks
    assert saved_steps(url) == [9, 12]
    got, want = losses(folder), losses(expected)
    assert list(got) == list(range(8, STEPS + 1))
    assert got == pytest.approx({step: want[step] for step in got}, rel=1e-5)
    if ranks == 1:
        assert got == {step: want[step] for step in got}


@pytest.mark.parametrize("in_place", ["true", "false"])
def test_a_run_begins_from_the_weights_of_an_s3_folder(
    workers: WorkerPool, undisturbed: tuple[Path, Path], tmp_path: Path, in_place: str
) -> None:
    expected, data = undisturbed
    url = f"s3://{BUCKET}/begin-{in_place}"
    environ = s3_server().environ
    again = ("--trainer.no_evals=true",)
    # The run is finished: resuming it copies what is not there yet.
    code = workers.run(
        1, run, str(expected), str(data), *to(url, *again), environ=environ
    )  # fmt: skip
    assert code == [(0, "")]
    assert saved_remote_steps_at(url, environ) == [12]
    folder = tmp_path / "run"
    results = workers.run(
        1, run, str(folder), str(data),
        f"--trainer.load_path={url}", "--trainer.load_weights_only=true",
        f"--trainer.load_in_place={in_place}", "--trainer.hard_stop={value: 1, unit: steps}",
        environ=environ,
    )  # fmt: skip
    assert results == [(0, "")]
    assert losses(folder, "eval")[0] == losses(expected, "eval")[STEPS]
    assert saved_steps(folder / "downloads") == ([] if in_place == "true" else [12])


def test_a_store_that_refuses_costs_the_copies_and_is_said(
    workers: WorkerPool, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    server = s3_server()
    url, folder = f"s3://{BUCKET}/refused", tmp_path / "run"
    with server.failing(times(10_000, "403", "PUT")):
        code, message = workers.run(
            1, run, str(folder), str(undisturbed[1]), *to(url), environ=server.environ
        )[0]
    assert code == 1
    assert f"{url}/step12: not uploaded" in message
    assert saved_steps(folder / "checkpoints") == [6, 9, 12]
    assert (
        "training goes on, the next one will be tried"
        in (folder / "logs" / "rank0.log").read_text()
    )
    # Later, when the store is there again:
    again = workers.run(1, run, str(folder), str(undisturbed[1]), *to(url), environ=server.environ)
    assert again == [(0, "")]
    assert saved_remote_steps_at(url, server.environ) == [12]


def saved_remote_steps_at(url: str, environ: dict[str, str]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        return saved_steps(url)

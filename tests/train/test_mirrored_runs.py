"""Runs at a URL: the machine goes away, and another one goes on from the URL alone, bit for bit."""

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.checkpoint.exchange import differences, stored
from tests.s3 import BUCKET, S3Server, times
from tests.train.test_remote_runs import STEPS, losses, run
from tests.workers import WorkerPool
from toolkit.checkpoint.folder import saved_steps
from toolkit.cli import main as cli
from toolkit.distributed import environment
from toolkit.launch.mirror import Mirror
from toolkit.launch.remote_run import local_copy
from toolkit.runs.config import folder_of_url
from toolkit.runs.status import read_status


@pytest.fixture(scope="module")
def undisturbed(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run folder, data root) of a whole run on one process."""
    place = tmp_path_factory.mktemp("undisturbed")
    assert workers.run(1, run, str(place / "run"), str(place / "data")) == [(0, "")]
    return place / "run", place / "data"


def at(machine: Path, *more: str) -> list[str]:
    return [f"--run.work_dir={machine}", *more]


def continued(url: str, machine: str, data: str) -> Any:
    """`toolkit resume URL` on an empty machine, in this worker."""
    words = ["resume", url, "--work-dir", machine, f"--dataset.root={data}"]
    return cli.run([*words, "--trainer.hard_stop=null"])


def test_an_empty_machine_goes_on_from_the_url_bit_for_bit(
    workers: WorkerPool, undisturbed: tuple[Path, Path], s3: S3Server, tmp_path: Path
) -> None:
    expected, data = undisturbed
    url = f"s3://{BUCKET}/{tmp_path.name}/run"
    stop = "--trainer.hard_stop={value: 7, unit: steps}"
    flags = at(tmp_path / "one", stop)
    assert workers.run(1, run, url, str(data), *flags, environ=s3.environ) == [(0, "")]
    assert saved_steps(f"{url}/checkpoints") == [3, 6, 7]
    second = str(tmp_path / "two")
    assert workers.run(1, continued, url, second, str(data), environ=s3.environ) == [0]
    copy = local_copy(url, str(tmp_path / "three"))
    assert losses(copy) == losses(expected)
    assert losses(copy, "eval").items() >= losses(expected, "eval").items()  # and of the stop
    last = f"checkpoints/step{STEPS}"
    assert differences(stored(copy / last), stored(expected / last)) == []
    # The first machine has missed what happened since.
    first = folder_of_url(url, str(tmp_path / "one"))
    assert len(losses(first)) == 7
    assert workers.run(1, continued, url, str(tmp_path / "one"), str(data), environ=s3.environ) == [
        0
    ]
    assert losses(first) == losses(expected)


def run_watched(marker: str, *words: str) -> tuple[int, str, bool]:
    """`run` beside a slow mirror; and whether all of it had been sent when this rank went on."""
    close = Mirror.close

    def slow(self: Mirror, **how: Any) -> None:
        if not self._closing.is_set():
            assert dist.is_initialized()
            time.sleep(1.0)
        close(self, **how)
        Path(marker).touch()

    with mock.patch.object(Mirror, "close", slow):
        if os.environ["RANK"] == "0":
            return *run(*words), Path(marker).exists()
        closed: list[bool] = []
        leave = environment.close_process_groups

        def note(**how: Any) -> None:
            closed.append(Path(marker).exists())
            leave(**how)

        with mock.patch.object(environment, "close_process_groups", note):
            return *run(*words), closed[0]


def test_two_ranks_share_a_mirrored_run(
    workers: WorkerPool, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/store/run"
    flags = at(tmp_path / "one")
    marker = str(tmp_path / "mirrored")
    results = workers.run(2, run_watched, marker, url, str(undisturbed[1]), *flags)
    assert results == [(0, "", True)] * 2
    copy = local_copy(url, str(tmp_path / "two"))
    assert losses(copy) == pytest.approx(losses(undisturbed[0]), rel=1e-5)


def test_a_store_that_is_down_costs_the_copy_alone(
    workers: WorkerPool, undisturbed: tuple[Path, Path], s3: S3Server, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}/run"
    flags = at(tmp_path / "one", "--run.mirror_wait=0.5")
    with s3.failing(lambda method, path: "403" if "metrics" in path else None):
        results = workers.run(1, run, url, str(undisturbed[1]), *flags, environ=s3.environ)
    assert results == [(0, "")]
    folder = folder_of_url(url, str(tmp_path / "one"))
    assert losses(folder) == losses(undisturbed[0])
    text = (folder / "logs" / "rank0.log").read_text()
    assert f"bring it there with `toolkit runs push {folder}`" in text
    assert cli.run(["runs", "push", str(folder)]) == 0
    assert losses(local_copy(url, str(tmp_path / "two"))) == losses(undisturbed[0])


def test_a_run_that_is_refused_has_started_nothing(
    workers: WorkerPool, undisturbed: tuple[Path, Path], s3: S3Server, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}/run"
    with s3.failing(times(99, "403", "PUT")):
        ((code, message),) = workers.run(
            1, run, url, str(undisturbed[1]), *at(tmp_path / "one"), environ=s3.environ
        )
    assert code == 2
    assert message.endswith("check credentials and permissions; nothing was started")
    assert not (tmp_path / "one").exists()


def test_verbs_take_the_url(
    workers: WorkerPool,
    undisturbed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/store/run"
    flags = at(tmp_path / "one", "--trainer.hard_stop={value: 6, unit: steps}")
    assert workers.run(1, run, url, str(undisturbed[1]), *flags) == [(0, "")]
    # `train` at a URL that holds a run continues it, on an empty machine too.
    assert workers.run(1, run, url, str(undisturbed[1]), *at(tmp_path / "two")) == [(0, "")]
    there = read_status(Path(url.removeprefix("file://")))
    assert there is not None
    assert (there.attempt, there.step) == (2, STEPS)

    def said(*words: str, code: int = 0) -> str:
        assert cli.run([*words]) == code, capsys.readouterr()
        return capsys.readouterr().out

    assert said("verify", url).count("OK") == 3
    assert f"step {STEPS}" not in said("verify", f"{url}/checkpoints/step9", "--quick")
    assert "smoke/run" in said("runs", "list", "--root", url.rpartition("/")[0])
    assert said("batch", url, "5") == said("batch", str(undisturbed[0]), "5")
    assert "step 12" in said("eval", url, "--json").replace('"step":', "step ")
    damaged = Path(url.removeprefix("file://")) / "checkpoints" / "step9" / "train" / "rank0.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "rank0.pt has" in said("verify", url, code=1)

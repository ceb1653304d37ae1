"""`toolkit train --processes N`: the same run as under a launcher, its stop, its errors."""

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from tests.e2e._run import Process, committed, losses, run
from tests.e2e.test_bad_input import assert_one_line
from tests.e2e.test_interruptions import has_steps, status
from tests.workers import free_port

TRAIN = ("toolkit", "train", "my.json", "--train_module.precision=fp32")


@pytest.mark.slow
def test_the_launcher_gives_the_numbers_of_torchrun_and_a_stop_is_saved(
    fsdp: Path, place: Path
) -> None:
    folder = place / "runs" / "e2e" / "by_itself"
    process = Process(
        [*TRAIN, "--name", folder.name, "--processes", "2", "--engine", "fsdp"], cwd=place
    )
    process.wait_until(has_steps(folder, 10, beyond=1))
    process.send(signal.SIGTERM)
    result = process.wait()
    assert result.code == 75, result.output
    assert result.output.count("SIGTERM: stopping after this step") == 1
    seen, done = status(folder), losses(folder)
    assert (seen["state"], seen["engine"], seen["world_size"]) == ("stopped", "fsdp", 2)
    assert committed(folder)[-1] == seen["step"] == len(done)
    assert done == losses(fsdp)[: len(done)]


def test_an_error_that_only_a_worker_finds_is_one_line(place: Path) -> None:
    result = run(*TRAIN, "--processes=2", "--save-folder", "my.json/run", cwd=place)
    assert_one_line(result, "my.json/run: cannot write there")


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_of_one_of_two_machines_is_a_stop_of_both(
    asked: int, place: Path, tmp_path: Path
) -> None:
    folder = place / "runs" / "e2e" / f"two_machines_{asked}"
    head = f"127.0.0.1:{free_port()}"
    command = [*TRAIN, "--name", folder.name, "--processes", "1", "--nodes", "2", "--head", head]
    places = [tmp_path / str(rank) for rank in range(2)]
    for rank in range(2):
        places[rank].mkdir()
        shutil.copy(place / "my.json", places[rank])
    both = [Process([*command, "--node-rank", str(rank)], cwd=places[rank]) for rank in range(2)]
    both[0].wait_until(has_steps(folder, 10, beyond=1))
    both[asked].send(signal.SIGTERM)
    results = [process.wait() for process in both]
    assert [result.code for result in results] == [75, 75], [r.output for r in results]
    assert committed(folder)[-1] == status(folder)["step"]
    again = [
        Process(
            ["toolkit", "resume", folder, *command[6:], "--node-rank", str(rank)],
            cwd=places[rank],
        )
        for rank in range(2)
    ]
    assert [process.wait().code for process in again] == [0, 0]


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_other_with_one_line(place: Path, tmp_path: Path) -> None:
    folder = place / "runs" / "e2e" / "one_machine_dies"
    head = f"127.0.0.1:{free_port()}"
    command = [*TRAIN, "--name", folder.name, "--processes", "1", "--nodes", "2", "--head", head]
    (tmp_path / "b").mkdir()
    shutil.copy(place / "my.json", tmp_path / "b")
    first = Process([*command, "--node-rank", "0"], cwd=place)
    second = Process([*command, "--node-rank", "1"], cwd=tmp_path / "b")
    first.wait_until(has_steps(folder, 10, beyond=1))
    family = psutil.Process(second.pid).children(recursive=True)
    for member in [psutil.Process(second.pid), *family]:
        os.kill(member.pid, signal.SIGKILL)
    result = first.wait()
    assert result.code == 1, result.output
    assert len(result.errors) == 1
    assert "lost" in result.errors[0]

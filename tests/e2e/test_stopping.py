"""Requests to stop, ranks that die, hang or are started again: with real processes."""

import contextlib
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e._run import (
    Process,
    Result,
    committed,
    count_lines,
    losses,
    read_json,
    read_lines,
    run,
)
from tests.e2e.conftest import STEPS
from tests.e2e.test_interruptions import has_steps, records_of, status

FAULTY = Path(__file__).parent / "_faulty.py"


def torchrun(*words: str | Path) -> list[str | Path]:
    return ["torchrun", "--nproc-per-node=2", *words]


def workers_of(process: Process) -> list[psutil.Process]:
    """The ranks that a launcher started, in order."""
    ranks = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
    return sorted(ranks, key=lambda child: int(child.environ()["RANK"]))


def is_alive(process: psutil.Process) -> bool:
    """An orphan that ended may wait long, as a zombie, until the first process looks at it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="module")
def asked(single: tuple[Path, Result], place: Path) -> dict[str, Any]:
    """One long run, stopped by a file, by the time limit and by SIGUSR1."""
    folder = place / "runs" / "e2e" / "asked"
    seen: dict[str, Any] = {"folder": folder}
    process = Process(
        ["toolkit", "train", "my.json", "--name", "asked", "--trainer.max_duration.value=5000"],
        cwd=place,
    )
    process.wait_until(has_steps(folder, 10, beyond=1))
    (folder / "stop").touch()
    seen["file"] = process.wait(), status(folder)
    seen["file is gone"] = not (folder / "stop").exists()

    result = run("toolkit", "resume", folder, "--trainer.max_wall_time=1m1s", cwd=place)
    seen["time"] = result, status(folder)

    process = Process(["toolkit", "resume", folder, "--trainer.max_wall_time=null"], cwd=place)
    process.wait_until(records_of(folder, 3))
    process.send(signal.SIGUSR1)
    seen["signal"] = process.wait(), status(folder)
    return seen


@pytest.mark.parametrize(
    ("how", "reason"),
    [("file", "the stop file"), ("time", "trainer.max_wall_time"), ("signal", "SIGUSR1")],
)
def test_every_request_to_stop_saves_and_says_resumable(
    how: str, reason: str, asked: dict[str, Any]
) -> None:
    result, seen = asked[how]
    assert result.code == 75, result.output
    assert (seen["state"], seen["exit_reason"]) == ("stopped", reason)
    assert f"({reason}); continue with: toolkit resume {asked['folder']}" in result.output


def test_the_stop_file_is_consumed(asked: dict[str, Any]) -> None:
    assert asked["file is gone"]
    assert committed(asked["folder"])[-1] == asked["signal"][1]["step"]


@pytest.mark.slow
def test_workers_that_are_started_again_continue_their_run(
    single: tuple[Path, Result], place: Path
) -> None:
    """Rank 0 is killed; the run has no name, so its successor must find it."""
    result = run(
        *torchrun("--max-restarts=1", FAULTY, "die", "0", "15", "train", "my.json"),
        *("--run.experiment=again", "--trainer.callbacks.checkpointer.interval=5"),
        cwd=place,
    )
    assert result.code == 0, result.output
    (folder,) = (place / "runs" / "again").iterdir()
    assert f"started again by the launcher; continuing {folder}" in result.output
    assert "lost rank 0 (pid " in result.output  # told by rank 1, the lowest one left
    seen = status(folder)
    assert (seen["state"], seen["attempt"], seen["step"]) == ("finished", 2, STEPS)
    attempts = {r["attempt"] for r in read_lines(folder / "metrics" / "train.jsonl")}
    assert attempts == {1, 2}
    assert losses(folder) == pytest.approx(losses(single[0]), rel=1e-3)


@pytest.fixture(scope="module")
def broken(single: tuple[Path, Result], place: Path) -> dict[str, Any]:
    """Rank 1 raises an error; `toolkit resume`, the run's own launcher, loses rank 1 to SIGKILL."""
    folder = place / "runs" / "e2e" / "broken"
    seen: dict[str, Any] = {"folder": folder}
    command = torchrun(FAULTY, "raise", "1", "15", "train", "my.json", "--name", "broken")
    seen["raised"] = run(*command, "--trainer.max_duration.value=5000", cwd=place)
    seen["status"] = status(folder)
    process = Process(["toolkit", "resume", folder], cwd=place)
    process.wait_until(records_of(folder, 2))
    family = [psutil.Process(process.pid), *workers_of(process)]
    seen["listening"] = {
        connection.laddr.ip
        for member in family
        for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    workers_of(process)[1].kill()
    seen["killed"] = process.wait(60)
    return seen


@pytest.mark.slow
def test_the_first_cause_is_named_by_the_rank_that_had_it(broken: dict[str, Any]) -> None:
    result = broken["raised"]
    assert result.code == 1
    assert "[rank1]: ValueError: a fault was asked for" in result.output
    assert "failed at step 15; its log: " in result.output
    assert "[rank0]: Traceback" not in result.output
    (line,) = result.errors
    assert line.startswith("error: rank 0 on ")
    assert "ended because rank 1 on " in line
    assert "failed at step 15: ValueError: a fault was asked for" in line
    assert broken["status"]["state"] == "failed"
    assert broken["status"]["message"] == line.removeprefix("error: ")
    traceback = (broken["folder"] / "logs" / "rank1.log").read_text()
    assert "ValueError: a fault was asked for" in traceback


def test_a_resumed_run_listens_to_this_machine_alone(broken: dict[str, Any]) -> None:
    assert broken["listening"] <= {"127.0.0.1", "::1"}


def test_a_killed_rank_ends_the_others(broken: dict[str, Any]) -> None:
    result = broken["killed"]
    assert result.code == 1, result.output
    assert "Traceback" not in result.output
    assert any("lost rank 1 (pid " in line for line in result.errors), result.output
    assert not any("another process is writing" in line for line in result.errors)


@pytest.mark.parametrize("prefix", [("torchrun", "--nproc-per-node=2"), ("accelerate", "launch")])
def test_workers_of_a_launcher_killed_during_their_start_end(
    prefix: tuple[str, ...], single: tuple[Path, Result], place: Path
) -> None:
    name = f"early-{prefix[0]}"
    process = Process(
        [*prefix, "-m", "toolkit", "train", "my.json", "--name", name,
         "--trainer.max_duration.value=50000"],
        cwd=place,
    )  # fmt: skip
    launcher = psutil.Process(process.pid)
    process.wait_until(lambda: bool(launcher.children()))
    children = launcher.children()
    process.send(signal.SIGKILL)
    process.wait()
    process.wait_for(lambda: not any(is_alive(child) for child in children), 120)
    assert not (place / "runs" / "e2e" / name / "metadata" / "lock.json").exists()


def test_a_rank_that_hangs_is_named_and_ends_the_job(
    single: tuple[Path, Result], place: Path
) -> None:
    folder = place / "runs" / "e2e" / "hanging"
    command = torchrun(FAULTY, "sleep", "1", "15", "train", "my.json", "--name", "hanging")
    result = run(*command, "--trainer.watchdog_timeout=3", cwd=place)
    assert result.code == 1
    (line,) = result.errors
    assert line.startswith("error: rank 1 on ")
    assert "step 16, waiting for data, at _faulty.py:" in line
    assert " in sleep_for_ever; the others wait at step 16, " in line
    assert "sleep_for_ever" in (folder / "logs" / "rank1.log").read_text()
    assert "most recent call first" in (folder / "logs" / "rank0.log").read_text()
    seen = status(folder)
    assert (seen["state"], seen["exit_reason"]) == ("failed", "watchdog")
    assert committed(folder) == [10]


@pytest.mark.slow
def test_a_frozen_rank_is_named_by_an_orphan(single: tuple[Path, Result], place: Path) -> None:
    """Rank 1 is frozen and the launcher killed: rank 0 waits in a collective and has nobody."""
    folder = place / "runs" / "e2e" / "orphan"
    process = Process(
        torchrun("-m", "toolkit", "train", "my.json", "--name", "orphan",
                 "--trainer.max_duration.value=5000"),
        cwd=place,
    )  # fmt: skip
    process.wait_until(has_steps(folder, 10, beyond=1))
    ranks = workers_of(process)
    ranks[1].suspend()
    process.send(signal.SIGKILL)
    process.wait()
    process.wait_for(lambda: not ranks[0].is_running(), 240)
    ranks[1].kill()
    seen = status(folder)
    assert (seen["state"], seen["exit_reason"]) == ("failed", "watchdog")
    assert seen["message"].startswith("rank gives no sign of life, dead or frozen: 1")


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_nodes(single: tuple[Path, Result], place: Path) -> None:
    """Two launchers of one process each; one goes, then the stop file ends what is left."""
    folder = place / "runs" / "e2e" / "fewer"
    command = [
        *("torchrun", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:29777", "--rdzv-id=job7"),
        *("-m", "toolkit", "train", "my.json", "--name", "fewer"),
        *("--trainer.max_duration.value=50000", "--trainer.callbacks.checkpointer.interval=100"),
    ]
    first = Process(command, cwd=place)
    first.wait_until(lambda: psutil.Process(first.pid).num_threads() > 1)
    second = Process(command, cwd=place)
    first.wait_until(has_steps(folder, 100, beyond=1), 180)
    assert status(folder)["world_size"] == 2
    second.kill()
    first.wait_until(
        lambda: (
            status(folder)["world_size"] == 1
            and count_lines(folder / "metrics" / "train.jsonl") > 0
            and read_lines_attempt(folder) > 1
        ),
        300,
    )
    (folder / "stop").touch()
    result = first.wait(120)
    seen = status(folder)
    assert (seen["state"], seen["exit_reason"]) == ("stopped", "the stop file"), result.output
    assert "was asked to stop, so it is not started again" in result.output


def read_lines_attempt(folder: Path) -> int:
    """The attempt that recorded the newest whole line."""
    lines = (folder / "metrics" / "train.jsonl").read_text().splitlines()
    return 2 if '"attempt":1,' not in lines[-1] else 1


def test_the_notes_of_ranks_say_where_they_run(broken: dict[str, Any]) -> None:
    notes = [read_json(broken["folder"] / "metadata" / "ranks" / f"rank{r}.json") for r in (0, 1)]
    assert [(note["rank"], note["attempt"]) for note in notes] == [(0, 2), (1, 2)]
    assert len({note["pid"] for note in notes}) == 2

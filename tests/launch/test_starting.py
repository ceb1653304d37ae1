"""Which run a worker continues that its launcher started again."""

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from toolkit.launch.starting import Launch, current_launch, find_predecessor, stays_stopped
from toolkit.runs.config import RunConfig
from toolkit.runs.manager import RunManager

NOW = time.time()
MINE = Launch(run_id="none", host="node0", pid=5, started=NOW - 30)


def start(root: Path, name: str, launch: Launch | None, state: Any = None, **more: Any) -> Path:
    folder = root / "default" / name
    (folder / "metadata").mkdir(parents=True)
    run = RunManager(folder, experiment="default", name=name)
    run.set_status("running", launch=launch and msgspec.to_builtins(launch))
    run.close(state, **more)
    return folder


def stamp(seconds_ago: float) -> str:
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime(NOW - seconds_ago)) + "-abcd"


def replace(**changes: Any) -> Launch:
    return msgspec.structs.replace(MINE, **changes)


@pytest.mark.parametrize(
    ("recorded", "mine", "expected"),
    [
        (MINE, MINE, True),
        (replace(pid=6), MINE, False),  # another launcher of this machine
        (replace(started=NOW - 9999), MINE, False),  # an earlier one with this pid
        (replace(run_id="a"), MINE, False),
        (replace(run_id="a", host="node1"), replace(run_id="a"), True),  # rank 0 moved
        (replace(host="node1"), MINE, False),  # without an id nobody can tell
        (None, MINE, False),
        (MINE, None, False),
    ],
)
@pytest.mark.parametrize("given", ["nothing", "name", "folder"])
def test_workers_of_one_launch_are_successors(
    recorded: Launch | None, mine: Launch | None, expected: bool, given: str, tmp_path: Path
) -> None:
    start(tmp_path, stamp(9999), replace(run_id="other"))
    folder = start(tmp_path, stamp(10), recorded)
    config = {
        "nothing": RunConfig(root=str(tmp_path)),
        "name": RunConfig(root=str(tmp_path), name=folder.name),
        "folder": RunConfig(save_folder=str(folder)),
    }[given]
    assert find_predecessor(config, mine) == (folder if expected else None)


def test_a_first_worker_finds_nothing(tmp_path: Path) -> None:
    assert find_predecessor(RunConfig(root=str(tmp_path / "none")), MINE) is None


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("stopped", "the stop file", True),
        ("stopped", "trainer.max_wall_time", True),
        ("stopped", "SIGUSR1", True),
        ("stopped", "SIGTERM", False),  # launchers send it to workers that they start again
        ("failed", "error", False),
        (None, "", False),
    ],
)
def test_a_run_that_was_asked_to_stop_stays_stopped(
    state: Any, reason: str, expected: bool, tmp_path: Path
) -> None:
    more = {"exit_reason": reason} if state else {}
    assert stays_stopped(start(tmp_path, "a", MINE, state, **more)) is expected


def test_the_launcher_is_the_parent_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert current_launch() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    launch = current_launch()
    assert launch is not None
    assert (launch.run_id, launch.pid) == ("job7", os.getppid())

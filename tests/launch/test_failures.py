"""Which rank failed first, and what the others say of their own end."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import TrainingError
from toolkit.launch import failures as module
from toolkit.launch.failures import LostPeerError, Peers, clear_notes, is_lost_peer
from toolkit.runs.manager import RunManager

GLOO = RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunManager:
    monkeypatch.setattr(module, "_SECONDS_FOR_THE_FIRST", 0.0)
    (tmp_path / "metadata").mkdir()
    return RunManager(tmp_path, experiment="a", name="b")


def ranks(run: RunManager, world_size: int = 3, **options: Any) -> list[Peers]:
    found = [Peers(run, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for peers in found:
        peers.publish()
    return found


def test_the_first_failure_is_named_by_the_others(run: RunManager) -> None:
    three = ranks(run)
    three[1].fail(ValueError("bad\nnews"), step=7)
    three[2].fail(TrainingError("too late"), step=8)
    lost = three[0].explain(GLOO, step=8)
    assert isinstance(lost, LostPeerError)
    assert f"step 8: ended because rank 1 on {os.uname().nodename} failed at step 7: " in str(lost)
    assert "ValueError: bad; its traceback is in " in str(lost)
    assert "logs/rank1.log" in str(lost)
    assert not lost.only_here  # the command line shows rank 0's


def test_a_consequence_is_not_the_first_failure(run: RunManager) -> None:
    three = ranks(run)
    three[0].fail(GLOO, step=8)
    assert three[1].first_failure() is None
    three[1].fail(ValueError("bad"), step=7)
    assert three[0].explain(ValueError("bad"), step=7) is None


def test_a_killed_process_is_named_by_the_lowest_rank_left(run: RunManager) -> None:
    three = ranks(run)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    note = run.folder / "metadata" / "ranks" / "rank0.json"
    note.write_text(note.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {gone.pid}'))
    lost = [three[rank].explain(GLOO, step=8) for rank in (1, 2)]
    assert f"lost rank 0 (pid {gone.pid} on " in str(lost[0])
    assert [error.only_here for error in lost if error] == [True, False]


def test_stages_of_a_pipeline_are_named(run: RunManager) -> None:
    three = ranks(run, role_of=lambda rank: f"stage {rank + 1} of 3")
    three[1].fail(ValueError("bad"), step=7)
    lost = str(three[0].explain(GLOO, step=8))
    assert lost.startswith("rank 0 (stage 1 of 3) on ")
    assert "ended because rank 1 (stage 2 of 3) on " in lost
    assert three[2].notes()[1].describe().startswith("rank 1 (stage 2 of 3) on ")


def test_without_a_trace_the_words_of_the_collective_are_shown(run: RunManager) -> None:
    lost = ranks(run)[0].explain(GLOO, step=8)
    assert "lost the connection to another rank ([/gloo/transport/tcp/pair.cc" in str(lost)


def test_causes_count_too() -> None:
    wrapped = TrainingError("metrics: recording failed")
    wrapped.__cause__ = GLOO
    assert is_lost_peer(wrapped)
    assert not is_lost_peer(TrainingError("disk full"))


def test_notes_of_an_earlier_attempt_do_not_count(run: RunManager) -> None:
    before = ranks(run)
    before[1].fail(ValueError("bad"), step=7)
    run.close("failed")
    after = Peers(RunManager(run.folder, experiment="a", name="b"), rank=0, world_size=3)
    assert (after.attempt, after.notes(), after.first_failure()) == (2, {}, None)
    clear_notes(run.folder)
    assert list((run.folder / "metadata" / "ranks").iterdir()) == []

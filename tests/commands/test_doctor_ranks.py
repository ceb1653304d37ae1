"""`toolkit doctor` on several ranks and machines."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.workers import WorkerPool
from toolkit.cli.main import run
from toolkit.commands import doctor_ranks
from toolkit.commands.doctor import Finding
from toolkit.launch.plan import LaunchPlan


def examined(folder: str, hosts: list[str], others: Mapping[int, str], local: list[int]) -> Any:
    """The report of this rank, on the machine that `hosts` names; ranks in `others` see another
    folder. What one machine alone says is short: it has tests of its own."""
    rank = int(os.environ["RANK"])
    os.environ |= {"LOCAL_RANK": str(local[rank]), "LOCAL_WORLD_SIZE": str(max(local) + 1)}
    found = [
        Finding("ok", "libraries", "all the same"),
        Finding("note" if rank else "ok", "disks", f"of rank {rank}"),
    ]
    with (
        mock.patch.object(doctor_ranks, "host_name", return_value=hosts[rank]),
        mock.patch.object(doctor_ranks, "examine", return_value=found),
    ):
        gathered = doctor_ranks.examine_ranks(folder=Path(others.get(rank, folder)))
    return [tuple(finding) for finding in gathered.told()], gathered.as_records()


def test_machines_are_gathered_and_what_differs_is_named(
    workers: WorkerPool, tmp_path: Path
) -> None:
    both = workers.run(2, examined, str(tmp_path), ["a", "b"], {}, [0, 0])
    assert both[0][1][:3] == both[1][1][:3]
    told, records = both[0]
    assert told[:3] == [
        ("ok", "libraries", "all the same"),
        ("ok", "disks", "of rank 0 [a]"),
        ("note", "disks", "of rank 1 [b]"),
    ]
    level, about, text = told[3]
    assert (level, about) == ("ok", "all-reduce")
    assert re.match(r"gloo, 2 ranks: [\d.]+ [MG]B/s on each link, [\d,]+ us for one number", text)
    see = f"{tmp_path}: all 2 machines see the same files and locks"
    assert told[4] == ("ok", "shared folder", see)
    assert records[2] == {
        "level": "note", "about": "disks", "text": "of rank 1", "machines": ["b"]
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "other").mkdir()
    apart = workers.run(2, examined, str(tmp_path), ["a", "a"], {1: f"{tmp_path}/other"}, [0, 0])
    level, about, text = apart[0][0][-1]
    assert (level, about) == ("note", "shared folder")
    assert "a (node 1) cannot see the files of a (node 0); put runs on a shared disk" in text
    one = workers.run(2, examined, str(tmp_path), ["a", "a"], {}, [0, 1])
    assert [about for _, about, _ in one[1][0]] == ["libraries", "disks", "all-reduce"]


@pytest.mark.parametrize(
    ("words", "processes", "nodes"),
    [
        (["--processes", "3"], 3, None),
        (["--launch"], 2, None),
        (["--launch", "--nodes", "2", "--node-rank", "1", "--head", "h"], 2, 2),
    ],
)
def test_processes_are_those_asked_for_or_one_for_each_gpu(
    words: list[str], processes: int, nodes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[LaunchPlan] = []

    def start(plan: LaunchPlan, *_: Any, debug: bool) -> int:
        started.append(plan)
        return 7

    monkeypatch.setattr(doctor_ranks, "usual_processes", lambda: 2)
    monkeypatch.setattr(doctor_ranks, "start", start)
    assert run(["doctor", *words]) == 7
    (plan,) = started
    assert plan.processes == processes
    assert (plan.nodes and plan.nodes.number) == nodes


@pytest.mark.slow
def test_two_processes_of_this_machine(tmp_path: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "toolkit", "doctor", "--processes", "2", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    found = {record["about"]: record["text"] for record in json.loads(said.stdout)}
    assert found["all-reduce"].startswith("gloo, 2 ranks: ")
    assert list(tmp_path.iterdir()) == []

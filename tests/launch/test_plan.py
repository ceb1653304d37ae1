"""Which processes the options ask for, and how many a machine can hold."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from toolkit.distributed.ranks import LAUNCH_FOLDER
from toolkit.errors import ConfigError
from toolkit.launch import capacity
from toolkit.launch.nodes import Nodes
from toolkit.launch.plan import LaunchPlan, plan_launch

TWO: dict[str, Any] = {"processes": 4, "nodes": 2, "node_rank": 1, "head": "node0"}


def test_options_become_a_plan() -> None:
    assert plan_launch({}) is None
    assert plan_launch({LAUNCH_FOLDER: "/x", "WORLD_SIZE": "2"}, processes=2) is None
    plan = plan_launch({}, processes=2)
    assert plan == LaunchPlan(2)
    assert plan.environ({"A": "b"}) == {"A": "b", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert plan_launch({}, processes=2, nodes=1, node_rank=0) == plan
    assert not LaunchPlan(1).starts_workers
    several = plan_launch({}, **TWO, interface="eth1", join_timeout="2m")
    assert several == LaunchPlan(4, Nodes(2, 1, "node0", 29500, "eth1", 120.0))
    assert (several.world_size, several.starts_workers) == (8, True)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("fd00::2", ("fd00::2", 29500)),
        ("[fd00::2]:80", ("fd00::2", 80)),
        ("[fd00::2]", ("fd00::2", 29500)),
    ],
)
def test_heads_have_ports(head: str, expected: tuple[str, int]) -> None:
    plan = plan_launch({}, **TWO | {"head": head})
    assert plan is not None
    assert plan.nodes is not None
    assert (plan.nodes.host, plan.nodes.port) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"nodes": 2}, "--nodes needs --processes N"),
        ({"processes": 2, "interface": "eth0"}, "--interface belongs to --nodes M"),
        ({"processes": 2, "nodes": 2, "head": "h"}, "--nodes 2 needs --node-rank R"),
        ({"processes": 2, "nodes": 2, "node_rank": 0}, "--nodes 2 needs --head HOST"),
        (TWO | {"node_rank": 2}, "--node-rank 2 with --nodes 2: give 0 to 1"),
        (TWO | {"head": "h:0"}, "--head h:0: give HOST or HOST:PORT"),
        (TWO | {"head": ".."}, "--head ..: .. is no name or address of a machine"),
        (TWO | {"head": f"{'x' * 64}:80"}, f"--head {'x' * 64}:80: {'x' * 64} is no name"),
        (TWO | {"head": "h:http"}, "--head h:http: give HOST or HOST:PORT"),
        (TWO | {"head": ":80"}, "--head :80: give HOST or HOST:PORT"),
        (TWO | {"join_timeout": "soon"}, "--join-timeout: 'soon' is no length of time"),
    ],
)
def test_options_that_do_not_fit_each_other(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_launch({}, **given)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"])
def test_one_launcher_is_enough(name: str) -> None:
    with pytest.raises(ConfigError, match=f"another launcher started this process .{name}=1"):
        plan_launch({name: "1"}, processes=2)


def machine(
    monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, usable: int = 0, free: float = 64e9
) -> None:
    @contextmanager
    def nvml() -> Any:
        yield None, [object()] * gpus

    monkeypatch.setattr(capacity, "nvml_gpus", nvml)
    monkeypatch.setattr("toolkit.distributed.devices.usable_gpus", lambda: usable)
    monkeypatch.setattr(capacity.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(capacity, "free_memory", lambda: int(free))


def refusal(number: int, **environ: str) -> str:
    with pytest.raises(ConfigError) as error:
        capacity.check_processes(number, environ)
    return str(error.value)


def test_one_process_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=4, usable=2)
    capacity.check_processes(2, {"CUDA_VISIBLE_DEVICES": "0,3"})
    assert refusal(3, CUDA_VISIBLE_DEVICES="0,3") == (
        "--processes 3: this machine has 2 GPUs, for one process each; give --processes 2 or fewer"
    )
    capacity.check_processes(32, {"ACCELERATE_USE_CPU": "true"})


def test_cores_and_memory_bound_processes_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=1, usable=0)  # torch is built for CPUs
    capacity.check_processes(32, {})
    assert "has 2 cores, for at most 32 processes" in refusal(33)
    machine(monkeypatch, free=1.7e9)
    capacity.check_processes(4, {})
    assert "has 1.7 GB of free memory, for at most 4 processes of 0.4 GB" in refusal(5)
    machine(monkeypatch, free=0)
    capacity.check_processes(1, {})


def test_free_memory_of_a_container_counts_what_can_be_freed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    group = {"memory.max": "1000", "memory.current": "900", "memory.stat": "file 700\nshmem 100\n"}
    for name, text in group.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(capacity, "_CONTAINER", tmp_path)
    assert capacity.free_memory() == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert capacity.free_memory() > 1000


def test_free_memory_is_that_of_the_machine_at_most() -> None:
    assert 0 < capacity.free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

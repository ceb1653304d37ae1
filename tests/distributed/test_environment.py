"""Where a process stands, and what is refused before training begins."""

import dataclasses
import datetime
import io
import logging
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool
from toolkit.distributed.environment import (
    TrainingEnvironment,
    check_shared_folder,
    prepare_training_environment,
    single_environment,
)
from toolkit.distributed.layout import Layout
from toolkit.errors import ConfigError, RunError


def look(folder: str, is_shared: bool) -> tuple[str, list[str]]:
    """What checking says where rank 1 sees `folder`, or another one of its own."""
    env = open_environment(module_config("ddp"))
    os.environ["GROUP_RANK"] = str(env.rank)
    try:
        own = Path(folder) / ("run" if is_shared else f"host{env.rank}")
        own.mkdir(exist_ok=True)
        try:
            check_shared_folder(env, own)
        except RunError as error:
            return str(error), [path.name for path in own.iterdir()]
        return "", [path.name for path in own.iterdir()]
    finally:
        del os.environ["GROUP_RANK"]
        env.close()


def test_machines_without_a_shared_folder_are_refused(workers: WorkerPool, tmp_path: Path) -> None:
    for message, left in workers.run(2, look, str(tmp_path), False):
        blind = f"node 1 ({socket.gethostname()})"
        assert f"not visible on {blind}; a run on several machines needs" in message
        assert "--save-folder" in message
        assert left == []


def test_a_shared_folder_is_fine_and_left_clean(workers: WorkerPool, tmp_path: Path) -> None:
    assert workers.run(2, look, str(tmp_path), True) == [("", [])] * 2


def another_size() -> str:
    """An environment of two where a process group of one is open."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        open_environment(module_config("ddp"))
    except ConfigError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""


def test_a_process_group_of_another_size_is_no_ground_to_stand_on(workers: WorkerPool) -> None:
    for message in workers.run(2, another_size):
        assert message.startswith("a process group of 1 exists, the launcher started 2")


def test_one_of_several_processes_must_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched, and each would train by its"):
        single_environment()


def deterministic_state() -> dict[str, bool]:
    """What `trainer.deterministic` leaves switched on."""
    trainer = SimpleNamespace(deterministic=True, collective_timeout=77.0)
    settings = SimpleNamespace(seed=1, train_module=module_config(), trainer=trainer)
    before = torch.utils.deterministic.fill_uninitialized_memory
    env = prepare_training_environment(settings)
    try:
        return {
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
            "fills memory": torch.utils.deterministic.fill_uninitialized_memory,
            "memory-efficient attention": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        }
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.backends.cuda.enable_cudnn_sdp(True)
        env.close()


def test_deterministic_mode_fills_no_memory_and_keeps_the_kernel_of_fp32(
    workers: WorkerPool,
) -> None:
    assert workers.run(1, deterministic_state) == [
        {
            "deterministic": True,
            "only warns": False,  # the memory-efficient kernel's order is fixed in strict mode only
            "fills memory": False,
            "memory-efficient attention": True,
            "cudnn attention": False,
        }
    ]


DEGREES: list[dict[str, Any]] = [
    {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "cp": 2, "tp": 2, "ep": 4},
    {"dp_shard": 2, "cp": 2},
    {"dp_replicate": 2, "dp_shard": 3},
    {"pp": 2, "tp": 2},
]


def meshes(degrees: dict[str, Any], rank: int) -> dict[str, Any]:
    """Ranks of the groups and meshes that `rank` has, of ranks that only seem to be there."""
    layout = Layout(**degrees, is_fsdp=True)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    env = TrainingEnvironment(
        rank=rank, local_rank=0, device=torch.device("cpu"), layout=layout, seed=0
    )

    def ranks(group: dist.ProcessGroup | None) -> tuple[int, ...]:
        return (rank,) if group is None else tuple(dist.get_process_group_ranks(group))

    try:
        names = env.fsdp_mesh.mesh_dim_names or ()
        return {
            "fsdp": (names, ranks(env.fsdp_mesh.get_group(names[-1]))),
            "loss": ranks(env.loss_group),
            "weight": ranks(env.weight_group),
            "experts": {a: ranks(env.expert_mesh.get_group(a)) for a in layout.expert_shape},
            "axes": {axis: ranks(env.group(axis)) for axis in layout.shape},
        }
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_groups_by_purpose_are_those_of_the_layout(
    workers: WorkerPool, degrees: dict[str, Any]
) -> None:
    layout = Layout(**degrees, is_fsdp=True)
    for rank in {0, layout.world_size // 3, layout.world_size - 1}:
        (found,) = workers.run(1, meshes, degrees, rank)
        assert found["loss"] == ranks_along(layout, rank, "dp_replicate", "dp_shard")
        assert found["weight"] == ranks_along(layout, rank, "pp", "dp_shard", "cp", "tp")
        for axis, ranks in (found["axes"] | found["experts"]).items():
            assert ranks == ranks_along(layout, rank, axis), axis
        names, sharing = found["fsdp"]
        assert sharing == ranks_along(layout, rank, "dp_shard", "cp")
        assert (len(names) == 2) == (layout.dp_replicate > 1)


def ranks_along(layout: Layout, rank: int, *axes: str) -> tuple[int, ...]:
    """The ranks that differ from `rank` along `axes` alone, itself among them."""
    experts = not set(axes) <= set(layout.shape)
    places = [layout.place(other, experts=experts) for other in range(layout.world_size)]
    fixed = {axis: place for axis, place in places[rank].items() if axis not in axes}
    return tuple(other for other, place in enumerate(places) if fixed.items() <= place.items())


def reduced(tp: int) -> list[float]:
    """Two ranks' sum, mean and maximum, where the ranks are replicas or share one product."""
    env = open_environment(module_config("ddp"))
    try:
        layout = Layout(dp_replicate=2 // tp, tp=tp)
        env = dataclasses.replace(env, layout=layout)
        columns = [("a", "sum"), ("b", "mean"), ("c", "max"), ("d", "sum")]
        mine = torch.arange(4, dtype=torch.float64) + 10 * env.rank
        return env.reduce_columns(columns, mine).tolist()
    finally:
        env.close()


def test_ranks_that_do_not_own_a_sum_add_nothing_to_it(workers: WorkerPool) -> None:
    assert workers.run(2, reduced, 1) == [[10.0, 6.0, 12.0, 16.0]] * 2
    assert workers.run(2, reduced, 2) == [[0.0, 6.0, 12.0, 3.0]] * 2


def asked(**options: Any) -> tuple[float, str, list[str]]:
    """Time-out of the groups, backend, and what this rank says on the console."""
    trainer = SimpleNamespace(deterministic=False, collective_timeout=77.0, log_ranks="rank0")
    settings = SimpleNamespace(seed=1, train_module=module_config("fsdp"), trainer=trainer)
    env = prepare_training_environment(settings, **options)
    try:
        with mock.patch("sys.stderr", io.StringIO()) as console:
            logging.getLogger("toolkit.x").info("hello")
        groups: list[Any] = [
            dist.group.WORLD,
            env.cpu_group,
            env.metrics_group,
            env.checkpoint_group,
        ]
        found = {g._get_backend(torch.device("cpu")).options._timeout for g in groups}
        assert found == {env.timeout}
        return env.timeout.total_seconds(), dist.get_backend(), console.getvalue().splitlines()
    finally:
        env.close()
        logger = logging.getLogger("toolkit")
        logger.handlers.clear()
        logger.propagate = True


@pytest.mark.parametrize(
    ("log_ranks", "spoken"),
    [
        ("rank0", [["hello"], []]),
        ("local_rank0", [["hello"], ["[rank 1] hello"]]),
        ("all", [["hello"], ["[rank 1] hello"]]),
    ],
)
def test_timeout_backend_and_who_speaks_are_what_is_asked_for(
    workers: WorkerPool, log_ranks: str, spoken: list[list[str]]
) -> None:
    own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} if log_ranks == "local_rank0" else {}
    ranks = workers.run(2, asked_on_a_machine, own, log_ranks)
    assert [seconds for seconds, _, _ in ranks] == [77.0, 77.0]
    assert [lines for _, _, lines in ranks] == spoken
    ranks = workers.run(2, asked_with_more_time)
    assert [(seconds, backend) for seconds, backend, _ in ranks] == [(5.0, "gloo")] * 2


def asked_on_a_machine(variables: dict[str, str], log_ranks: Any) -> tuple[float, str, list[str]]:
    """With `variables` each rank is alone on its machine."""
    os.environ.update(variables)
    return asked(log_filter_type=log_ranks)


def asked_with_more_time() -> tuple[float, str, list[str]]:
    return asked(timeout=datetime.timedelta(seconds=5), backend="gloo")


def test_a_file_system_that_is_said_to_be_shared_is_not_looked_at(
    workers: WorkerPool, tmp_path: Path
) -> None:
    assert workers.run(2, trusting, str(tmp_path)) == [[], []]


def trusting(folder: str) -> list[str]:
    env = open_environment(module_config("ddp"))
    try:
        env = dataclasses.replace(env, shared_filesystem=True)
        own = Path(folder) / f"host{env.rank}"
        own.mkdir()
        check_shared_folder(env, own)
        return [path.name for path in own.iterdir()]
    finally:
        env.close()

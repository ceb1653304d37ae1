"""Where a process stands, and what is refused before training begins."""

import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool
from toolkit.distributed.environment import check_shared_folder, single_environment
from toolkit.errors import ConfigError, RunError


def look(folder: str, is_shared: bool) -> tuple[str, list[str]]:
    """What checking says where rank 1 sees `folder`, or another one of its own."""
    env = open_environment(module_config("ddp"))
    try:
        own = Path(folder) / ("run" if is_shared else f"host{env.rank}")
        own.mkdir(exist_ok=True)
        try:
            check_shared_folder(env, own)
        except RunError as error:
            return str(error), [path.name for path in own.iterdir()]
        return "", [path.name for path in own.iterdir()]
    finally:
        env.close()


def test_machines_without_a_shared_folder_are_refused(workers: WorkerPool, tmp_path: Path) -> None:
    for message, left in workers.run(2, look, str(tmp_path), False):
        assert f"not visible on {socket.gethostname()}; a run on several machines needs" in message
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

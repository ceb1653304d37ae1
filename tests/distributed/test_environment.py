"""Where a process stands, and what is refused before training begins."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool
from toolkit.distributed.environment import (
    check_shared_folder,
    prepare_training_environment,
    single_environment,
)
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


def deterministic_state() -> dict[str, bool]:
    """What `trainer.deterministic` leaves switched on."""
    settings = SimpleNamespace(
        seed=1, train_module=module_config(), trainer=SimpleNamespace(deterministic=True)
    )
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

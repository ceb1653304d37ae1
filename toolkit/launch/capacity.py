"""How many processes of a run this machine can hold. Does not import torch where it need not."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from toolkit.distributed.ranks import wants_cpu
from toolkit.errors import ConfigError
from toolkit.metrics.system import nvml_gpus
from toolkit.threads import cores_here
from toolkit.wording import count

PROCESSES_PER_CORE = 16
"""What is started on CPUs at most, to try a layout out."""
BYTES_PER_PROCESS = 400_000_000
"""Memory that a process has to itself before it has any of a model (docs/launching.md)."""

_CONTAINER = Path("/sys/fs/cgroup")


class Capacity(NamedTuple):
    most: int
    why: str
    gpus: int = 0


def check_processes(number: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError: this machine cannot hold `number` processes."""
    if 0 < number <= _gpus_of_driver(environ):
        return
    capacity = capacity_here(environ)
    if number > capacity.most:
        raise ConfigError(
            f"--processes {number}: this machine has {capacity.why}; give --processes "
            f"{capacity.most} or fewer"
        )


def capacity_here(environ: Mapping[str, str] = os.environ) -> Capacity:
    """One process for each GPU; on CPUs as many as cores and free memory allow, at least 1."""
    if _may_have_gpus(environ):
        from toolkit.distributed.devices import usable_gpus

        if gpus := usable_gpus():
            return Capacity(gpus, f"{count(gpus, 'GPU')}, for one process each", gpus)
    cores, free = cores_here(), free_memory()
    by_cores = PROCESSES_PER_CORE * cores
    by_memory = max(1, free // BYTES_PER_PROCESS)
    if by_memory < by_cores:
        why = f"{free / 1e9:.1f} GB of free memory, for at most {count(by_memory, 'process')}"
        return Capacity(by_memory, f"{why} of {BYTES_PER_PROCESS / 1e9} GB")
    why = f"{count(cores, 'core')}, for at most {count(by_cores, 'process')}"
    return Capacity(by_cores, f"{why} without a GPU")


def _gpus_of_driver(environ: Mapping[str, str]) -> int:
    """GPUs that NVIDIA's driver has for this process: at least as many as torch can use."""
    asked = environ.get("CUDA_VISIBLE_DEVICES")
    if wants_cpu(environ) or asked in ("", "-1"):
        return 0
    with nvml_gpus() as (_, gpus):
        return len(gpus) if asked is None else min(len(gpus), asked.count(",") + 1)


def _may_have_gpus(environ: Mapping[str, str]) -> bool:
    """False where torch need not be asked, which takes seconds; /dev/kfd is AMD's driver."""
    return _gpus_of_driver(environ) > 0 or Path("/dev/kfd").exists()


def free_memory() -> int:
    """Bytes that processes can still take: of the machine, and of this container (cgroup v2)."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # none, or "max"
        limit = int((_CONTAINER / "memory.max").read_text())
        used = int((_CONTAINER / "memory.current").read_text())
        lines = (_CONTAINER / "memory.stat").read_text().splitlines()
        parts = {name: int(size) for name, _, size in (line.partition(" ") for line in lines)}
        # Files that are cached make room when it is needed; files in memory do not.
        used -= parts.get("file", 0) - parts.get("shmem", 0)
        free = min(free, max(0, limit - used))
    return free

"""How fast a machine computes, and how fast its ranks exchange tensors: each number takes a
fraction of a second."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.distributed.devices import wait_for

_SECONDS = 0.1
"""Of one measurement, after a first call that does not count."""
_MOST_CALLS = 1 << 16
_FP8_CAPABILITY = (8, 9)
"""Lowest compute capability with products of fp8."""
_FILE_BYTES = 32 << 20
_FILE_SECONDS = 1.0


def matmul_speeds(device: torch.device) -> dict[str, float]:
    """FLOP/s of a square product by precision: fp32, bf16, and fp8 where the device has it."""
    size = 4096 if device.type == "cuda" else 512
    whole = torch.randn(size, size, device=device)
    half = whole.to(torch.bfloat16)
    steps: dict[str, Callable[[], Tensor]] = {
        "fp32": lambda: whole @ whole,
        "bf16": lambda: half @ half,
    }
    is_cuda = device.type == "cuda" and torch.version.hip is None
    if is_cuda and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY:
        eighth, one = whole.to(torch.float8_e4m3fn), torch.ones((), device=device)
        steps["fp8"] = lambda: torch._scaled_mm(
            eighth, eighth.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        )
    return {name: 2 * size**3 / _seconds_each(step, device) for name, step in steps.items()}


def _seconds_each(step: Callable[[], Tensor], device: torch.device) -> float:
    step()
    wait_for(device)
    calls = 1
    while True:
        started = time.perf_counter()
        for _ in range(calls):
            step()
        wait_for(device)
        seconds = time.perf_counter() - started
        if seconds >= _SECONDS or calls >= _MOST_CALLS:
            return max(seconds, 1e-9) / calls
        calls *= 2


class Exchange(NamedTuple):
    """All-reduce between all ranks."""

    latency: float
    """Seconds of one number."""
    bandwidth: float
    """Bytes/s on the busiest link: of n ranks, 2 (n - 1) / n of the tensor's bytes go over each
    (NCCL tests, doc/PERFORMANCE.md, "bus bandwidth")."""


def all_reduce_speed(device: torch.device) -> Exchange:
    """Of the default process group, by the backend that it has for `device`. Every rank calls it,
    and every rank gets the same answer."""
    nbytes = (256 if device.type == "cuda" else 8) << 20
    latency = _seconds_of_exchange(torch.zeros(1, device=device))
    seconds = _seconds_of_exchange(torch.zeros(nbytes // 4, device=device))
    ranks = dist.get_world_size()
    return Exchange(latency, 2 * (ranks - 1) / ranks * nbytes / seconds)


def _seconds_of_exchange(tensor: Tensor) -> float:
    """Of the slowest rank. All ranks have to make the same number of calls: it follows from the
    slowest one's second call."""

    def timed(calls: int) -> float:
        dist.barrier()
        started = time.perf_counter()
        for _ in range(calls):
            dist.all_reduce(tensor)
        wait_for(tensor.device)
        slowest = torch.tensor([time.perf_counter() - started], device=tensor.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return max(float(slowest.item()), 1e-9) / calls

    timed(1)  # connections are made by the first
    return timed(min(max(int(_SECONDS / timed(1)), 1), 1000))


class DiskSpeed(NamedTuple):
    """Bytes/s of a file of 32 MiB, or of what a second allows."""

    write: float
    """Until it is on the disk."""
    read: float | None
    """From the disk; None: the system cannot be asked to forget what it keeps in memory."""
    cached: float
    """From memory."""


def disk_speed(path: Path) -> DiskSpeed:
    """Write the file `path`, which is new, and read it. Raises OSError."""
    block, written = os.urandom(1 << 20), 0
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        started = time.perf_counter()
        while written < _FILE_BYTES and time.perf_counter() - started < _FILE_SECONDS:
            written += os.write(descriptor, block)
        os.fsync(descriptor)
        write = written / (time.perf_counter() - started)
        read = None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            read = _read_speed(descriptor)
        return DiskSpeed(write, read, _read_speed(descriptor))
    finally:
        os.close(descriptor)


def _read_speed(descriptor: int) -> float:
    os.lseek(descriptor, 0, os.SEEK_SET)
    started, total = time.perf_counter(), 0
    while part := os.read(descriptor, 1 << 20):
        total += len(part)
    return total / max(time.perf_counter() - started, 1e-9)

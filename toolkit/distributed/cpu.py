"""Process-wide settings of a run on CPUs."""

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
_KEPT_BYTES = 1 << 30


def tune_cpu(*, local_world_size: int = 1) -> None:
    """This process's share of the cores, and freed memory kept for the next step.

    Launchers set OMP_NUM_THREADS=1 when nobody gave a number; a run that owns the machine wants its
    share of the cores. TOOLKIT_NUM_THREADS says otherwise.
    """
    asked = os.environ.get("TOOLKIT_NUM_THREADS")
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    torch.set_num_threads(int(asked) if asked else max(1, cores // local_world_size))
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Reuse the memory of freed tensors instead of giving it back to the system at once.

    glibc maps every tensor of some megabytes anew, and each step pays for thousands of page faults:
    4 to 6% of a step (docs/LOG.md). Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)

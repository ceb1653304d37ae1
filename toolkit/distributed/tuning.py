"""Memory, cores and threads of this process. No torch at import: its allocator reads its variable
once."""

import ctypes
import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from toolkit.errors import ConfigError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
_KEPT_BYTES = 1 << 30
_THREADS_PER_CORE = 4
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The name since torch 2.9, and the older ones, which it still prefers."""


def set_defaults(environ: MutableMapping[str, str] = os.environ) -> None:
    """Variables for libraries that read them once, unless somebody has set them: call it before
    torch is imported. Later it still serves CUDA's allocator (until CUDA is first used), and all
    processes that this one starts.

    The allocator grows the blocks that it has instead of adding others, which fragment. Threads of
    libgomp spin shortly while they wait: by default so long that two programs with as many threads
    as cores slow each other down tenfold (docs/LOG.md). Code that torch has compiled is kept where
    it outlives a restart of the machine; torch's own choice is the folder for temporary files.
    """
    environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not any(name in environ for name in _VARIABLES):
        environ[_VARIABLES[0]] = "expandable_segments:True"
    cache = Path(environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    if cache.is_absolute() and os.access(existing, os.W_OK):  # not each user has a home
        environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "toolkit" / "compiled"))


def tune_cpu(*, local_world_size: int = 1, threads: int | None = None) -> None:
    """This process's share of the cores, or `threads`, and freed memory kept for the next step.

    Launchers set OMP_NUM_THREADS=1 when nobody gave a number; a run that owns the machine wants its
    share of the cores. TOOLKIT_NUM_THREADS says otherwise.
    """
    import torch

    asked = threads_asked_for(os.environ, threads)
    torch.set_num_threads(asked or max(1, cores_here() // local_world_size))
    keep_freed_memory()
    take_fast_products()


def cores_here() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Model of the CPU."""
    if name := _cpu_info().get("model name"):
        return name
    import platform

    return platform.processor() or platform.machine()


def cpu_details() -> str:
    """What tells CPUs apart whose names are the same, as those of virtual machines are."""
    known = _cpu_info()
    return " ".join(known.get(key, "") for key in ("cpu family", "model", "stepping", "flags"))


def _cpu_info() -> dict[str, str]:
    """What Linux tells of the first core; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def asked_threads(environ: Mapping[str, str]) -> int | None:
    """TOOLKIT_NUM_THREADS: threads of each process's CPU operations; None when it is not set.
    Raises ConfigError: it is no number, less than 1, or more than 4 for each core there is."""
    asked = environ.get("TOOLKIT_NUM_THREADS", "")
    if not asked:
        return None
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError(
            f"environment variable TOOLKIT_NUM_THREADS: expected a number of threads, not {asked!r}"
        )
    return _checked_threads(int(asked), "environment variable TOOLKIT_NUM_THREADS")


def threads_asked_for(environ: Mapping[str, str], configured: int | None) -> int | None:
    """`asked_threads`, or else what `trainer.num_threads` says. Raises ConfigError: as there."""
    asked = asked_threads(environ)
    if asked is None and configured is not None:
        return _checked_threads(configured, "trainer.num_threads")
    return asked


def _checked_threads(number: int, where: str) -> int:
    """`number`: threads that a machine cannot start end the process without a word."""
    cores = os.cpu_count() or 1
    most = _THREADS_PER_CORE * cores
    if number > most:
        raise ConfigError(
            f"{where}: {number} threads are more than {_THREADS_PER_CORE} for each core of this "
            f"machine ({cores}); give {most} or fewer"
        )
    return number


def take_fast_products() -> None:
    """Let oneDNN compute fp32 matrix products where MKL does not use the processor.

    On AMD's processors MKL has no kernels for AVX-512: 110 GFLOP/s a core of a Zen 5, where oneDNN
    has 250. torch gives it fp32 products when it may round operands to bf16, which oneDNN does on
    processors with AMX only; a product that shows rounding turns it off again all the same. Not
    beside GPUs, for whose switches torch has an older interface that does not bear a mixture.
    """
    import torch

    has = torch.cpu.get_capabilities()
    is_amd = "AMD" in str(has.get("cpu_name", "")) and has.get("avx512_f", False)
    if not is_amd or has.get("amx_bf16", False) or torch.cuda.is_available():
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"  # of oneDNN alone
    for size in (64, 256):
        exact = torch.full((size, size), 1.0 + 2.0**-20)
        if not torch.equal(exact @ torch.eye(size), exact):
            matmul.fp32_precision = before


def keep_freed_memory() -> None:
    """Reuse the memory of freed tensors instead of giving it back to the system at once.

    glibc maps every tensor of some megabytes anew, and each step pays for thousands of page faults:
    2 to 10% of a step (docs/LOG.md). Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)

"""Memory, cores and threads of this process. No torch at import: its allocator reads its variable
once."""

import ctypes
import hashlib
import itertools
import os
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from toolkit.errors import ConfigError
from toolkit.threads import cores_here

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
    as cores slow each other down tenfold (docs/LOG.md).
    """
    environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not any(name in environ for name in _VARIABLES):
        environ[_VARIABLES[0]] = "expandable_segments:True"


def keep_compiled_code(environ: MutableMapping[str, str] = os.environ) -> None:
    """Keep what torch compiles where it outlives a restart of the machine, unless somebody has set
    a folder: call it before anything is compiled. torch's own choice is the folder for temporary
    files.

    Machines may share a home, and code is compiled for the CPU that compiles it, which torch's keys
    do not name: each kind of CPU has a folder of its own.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in environ:
        return
    cache = Path(environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not cache.is_absolute():  # not each user has a home
        return
    import torch

    kind = f"{cpu_name()} {cpu_details()} {torch.__version__}"
    folder = cache / "toolkit" / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
    except OSError:  # no place for it, or no room: torch's own choice stays
        return
    environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


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
        with open("/proc/cpuinfo") as file:  # all cores of a large machine take long to read
            first = list(itertools.takewhile(str.strip, file))
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first)
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
    beside GPUs, which would round.

    torch has an older interface, by which libraries ask, and raises where the two disagree: the
    switch is set by the older one, which sets it in both.
    """
    import torch

    has = torch.cpu.get_capabilities()
    is_amd = "AMD" in str(has.get("cpu_name", "")) and has.get("avx512_f", False)
    if not is_amd or has.get("amx_bf16", False) or torch.cuda.is_available():
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    torch.set_float32_matmul_precision("medium")
    if not all(_products_are_exact(*shape) for shape in ((64, 64), (256, 128), (1024, 64))):
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def _products_are_exact(rows: int, inner: int) -> bool:
    """Whether products keep the last bits of fp32, by each of the functions that models use."""
    import torch

    linear = torch.nn.functional.linear
    exact, one, zero = torch.full((rows, inner), 1.0 + 2.0**-20), torch.eye(inner), torch.zeros(1)
    batch, ones = exact.expand(2, -1, -1), one.expand(2, -1, -1)
    found = (
        torch.mm(exact, one),
        torch.addmm(zero, exact, one),
        linear(exact, one),
        linear(exact, one, zero.expand(inner)),
        *torch.bmm(batch, ones),
        *torch.baddbmm(zero, batch, ones),
    )
    return all(torch.equal(product, exact) for product in found)


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

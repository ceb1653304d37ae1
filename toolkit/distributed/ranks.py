"""Ranks as any launcher says them, under the names that `torchrun` uses.

`mpirun`, `srun` and DeepSpeed's launchers over pdsh have variables of their own. Everything that
asks for RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE, in this package and in the libraries
below it, finds them after `adopt_ranks`. No torch here: `--dry-run` asks too.
"""

import ipaddress
import os
import re
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import NamedTuple

from toolkit.errors import ConfigError


class Ranks(NamedTuple):
    """What one launcher says of this process; local numbers are those of its machine."""

    launcher: str
    rank: int | None
    world_size: int | None
    local_rank: int | None
    local_world_size: int | None


def adopt_ranks(environ: MutableMapping[str, str]) -> None:
    """Add what `torchrun` would have set and another launcher says; what is set stays. Raises
    ConfigError: the processes are on several machines and nobody says where they meet."""
    if "WORLD_SIZE" not in environ:
        found = next((r for r in _said(environ) if (r.world_size or 1) > 1), None)
        if found is None or found.rank is None:
            return
        environ["WORLD_SIZE"] = str(found.world_size)
        environ["RANK"] = str(found.rank)
        _adopt_local(found, environ)
        _choose_meeting_place(found, environ)
        return
    for found in _said(environ):
        if found.world_size is None or str(found.world_size) == environ["WORLD_SIZE"]:
            _adopt_local(found, environ)


def has_own_gpu(environ: Mapping[str, str]) -> bool:
    """Whether this process may see no GPU but its own: `srun` and `mpirun` can show each process
    another one, which each then counts as its first."""
    size = environ.get("WORLD_SIZE")
    by_others = any(str(ranks.world_size) == size for ranks in _said(environ))
    devices = environ.get("CUDA_VISIBLE_DEVICES", "")
    return by_others and "TORCHELASTIC_RUN_ID" not in environ and devices.count(",") == 0


def _adopt_local(found: Ranks, environ: MutableMapping[str, str]) -> None:
    if found.local_rank is not None:
        environ.setdefault("LOCAL_RANK", str(found.local_rank))
    if found.local_world_size is not None:
        environ.setdefault("LOCAL_WORLD_SIZE", str(found.local_world_size))


def _choose_meeting_place(found: Ranks, environ: MutableMapping[str, str]) -> None:
    if "MASTER_ADDR" in environ and "MASTER_PORT" in environ:
        return
    if found.local_world_size != found.world_size:
        give = "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
        if found.launcher == "srun":
            give = (
                'export MASTER_PORT=29500 MASTER_ADDR="$(scontrol show hostnames '
                '"$SLURM_JOB_NODELIST" | head -n 1)"'
            )
        error = ConfigError(
            f"{found.launcher} started {found.world_size} processes on several machines; say where "
            f"they meet, on the machine of rank 0: {give}; or, where its variables are left from "
            "another command, unset them"
        )
        error.only_here = True  # they may be left in a shell: nobody else would say it
        raise error
    environ["MASTER_ADDR"] = "127.0.0.1"
    # The same for all processes of a job, and another one for the next job.
    job = "".join(
        environ.get(name, "")
        for name in ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    environ["MASTER_PORT"] = str(20_000 + zlib.crc32(job.encode()) % 10_000)


def _said(environ: Mapping[str, str]) -> Iterator[Ranks]:
    """What each launcher that left its variables says, the surest first."""
    for launcher, *names in (
        ("mpirun", *(f"OMPI_COMM_WORLD_{what}" for what in _PARTS)),
        ("mpirun", *(f"MV2_COMM_WORLD_{what}" for what in _PARTS)),
        ("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ):
        if names[3] in environ:
            yield Ranks(launcher, *(_number(environ, name) for name in names))
    # Not SLURM_NTASKS: a batch script has it too, outside any `srun`.
    if "SLURM_STEP_NUM_TASKS" in environ:
        rank, size = (_number(environ, f"SLURM_{n}") for n in ("PROCID", "STEP_NUM_TASKS"))
        yield Ranks("srun", rank, size, _number(environ, "SLURM_LOCALID"), _slurm_here(environ))
    if "LOCAL_SIZE" in environ:  # DeepSpeed's launcher; it sets the others as torchrun does
        yield Ranks("deepspeed", None, None, None, _number(environ, "LOCAL_SIZE"))


_PARTS = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")


def _slurm_here(environ: Mapping[str, str]) -> int | None:
    """Tasks of the step on this machine, from a list for all of them: "4(x2),3"."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID")
    return counts[node] if node is not None and node < len(counts) else None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() else None


ENGINE = "TOOLKIT_ENGINE"
"""Variable of `--engine`."""
LAUNCH_FOLDER = "TOOLKIT_LAUNCH_FOLDER"
"""Variable of processes that `toolkit` itself started: a private folder of their launcher."""
STORE_FILE = "TOOLKIT_STORE_FILE"
"""Variable of such processes on one machine: the file through which they find each other."""
STORE_FD = "TOOLKIT_STORE_FD"
"""Variable of rank 0 of such processes on several machines: the socket of its store, inherited."""

_HINT = "it is from the environment, not from a config: unset it, or start with a launcher"


def check_launcher_variables(environ: Mapping[str, str] = os.environ) -> None:
    """Check what `torchrun`, `accelerate launch`, `deepspeed` or a job script said about ranks.
    Raises ConfigError: names the variable and its value. Every process shows it, since none knows
    whether it is rank 0."""
    try:
        _check(environ)
    except ConfigError as error:
        error.only_here = True
        raise


def _check(environ: Mapping[str, str]) -> None:
    size = _checked_number(environ, "WORLD_SIZE", least=1)
    rank = _checked_number(environ, "RANK")
    local_rank = _checked_number(environ, "LOCAL_RANK")
    local_size = _checked_number(environ, "LOCAL_WORLD_SIZE", least=1)
    if size is None:
        for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
            if value:
                raise ConfigError(f"{name}={value} without WORLD_SIZE; {_HINT}")
        return
    if rank is None and size > 1:
        raise ConfigError(
            f"WORLD_SIZE={size} without RANK, so no process knows which one it is; {_HINT}"
        )
    if rank is not None and rank >= size:
        raise ConfigError(f"RANK={rank} with WORLD_SIZE={size}: ranks are 0 to {size - 1}; {_HINT}")
    if local_size is not None and local_size > size:
        raise ConfigError(f"LOCAL_WORLD_SIZE={local_size} is more than WORLD_SIZE={size}; {_HINT}")
    if local_rank is not None and local_rank >= (local_size or size):
        most = f"LOCAL_WORLD_SIZE={local_size}" if local_size else f"WORLD_SIZE={size}"
        raise ConfigError(f"LOCAL_RANK={local_rank} with {most}: too large; {_HINT}")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name):
                raise ConfigError(
                    f"WORLD_SIZE={size} without {name}, which says where the processes meet; "
                    "unset WORLD_SIZE to train on one process, or start with a launcher"
                )
        port = _checked_number(environ, "MASTER_PORT")
        if port is not None and not 0 < port < 65536:
            raise ConfigError(f"MASTER_PORT={port}: ports are 1 to 65535; {_HINT}")


def wants_cpu(environ: Mapping[str, str]) -> bool:
    """Whether the CPU of a machine with GPUs is asked for."""
    return environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")


def is_one_machine(environ: Mapping[str, str]) -> bool:
    """Whether all ranks surely run on this machine."""
    size = environ.get("WORLD_SIZE", "1")
    return environ.get("LOCAL_WORLD_SIZE") == size or is_loopback(environ.get("MASTER_ADDR", ""))


def is_loopback(address: str) -> bool:
    """Whether an address names this machine alone."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def loopback_interface() -> str:
    """The name of the network interface that never leaves the machine: `lo` on Linux."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    return "lo"


def _checked_number(environ: Mapping[str, str], name: str, *, least: int = 0) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise ConfigError(f"{name}={text!r} is no number of {least} or more; {_HINT}")
    return int(text)

"""Ranks as any launcher says them, under the names that `torchrun` uses.

`mpirun`, `srun` and DeepSpeed's launchers over pdsh have variables of their own. Everything that
asks for RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE, in this package and in the libraries
below it, finds them after `adopt_ranks`. No torch here: `--dry-run` asks too.
"""

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
    """Add what `torchrun` would have set and another launcher says; what is set stays.

    Raises:
        ConfigError: the processes are on several machines and nobody says where they meet.
    """
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

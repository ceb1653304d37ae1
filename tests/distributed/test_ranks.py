"""Ranks as other launchers than torchrun say them."""

import pytest

from toolkit.distributed.ranks import adopt_ranks, has_own_gpu
from toolkit.errors import ConfigError

MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_NODEID": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def ranks(environ: dict[str, str]) -> list[str | None]:
    """Rank and world size, then those of this machine."""
    environ = dict(environ)
    adopt_ranks(environ)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return [environ.get(name) for name in names]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, [None] * 4),
        (MPI, ["3", "4", "3", "4"]),
        ({k.replace("OMPI_", "MV2_"): v for k, v in MPI.items()}, ["3", "4", "3", "4"]),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            ["1", "2", "1", "2"],
        ),
        (SRUN, ["9", "11", "1", "3"]),
        (SRUN | {"SLURM_NODEID": "1", "SLURM_PROCID": "5"}, ["5", "11", "1", "4"]),
        # One task of a step that starts another launcher, and a batch script outside any step.
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, [None] * 4),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, [None] * 4),
        # DeepSpeed over pdsh.
        (
            {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_SIZE": "8"},
            ["11", "16", "3", "8"],
        ),
        # mpirun, whose script sets what torch needs but not what is local.
        (MPI | {"RANK": "3", "WORLD_SIZE": "4"}, ["3", "4", "3", "4"]),
        # torchrun in a step of as many machines.
        (SRUN | {"RANK": "40", "WORLD_SIZE": "88", "LOCAL_RANK": "5"}, ["40", "88", "5", None]),
        # One process on each of two machines, by a scheduler that says no more.
        ({"RANK": "1", "WORLD_SIZE": "2"}, ["1", "2", None, None]),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "many"}, [None] * 4),
    ],
)
def test_ranks_of_each_launcher(environ: dict[str, str], expected: list[str | None]) -> None:
    assert ranks(environ) == expected


def test_processes_of_one_machine_meet_on_it_at_a_port_of_their_own() -> None:
    first, again, other = (MPI | {"PMIX_NAMESPACE": job} for job in ("prterun-a-1",) * 2 + ("b",))
    for environ in (first, again, other):
        adopt_ranks(environ)
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == again["MASTER_PORT"] != other["MASTER_PORT"]
    assert 20_000 <= int(first["MASTER_PORT"]) < 30_000
    given = MPI | {"MASTER_ADDR": "h", "MASTER_PORT": "1"}
    adopt_ranks(given)
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("h", "1")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({k: v for k, v in SRUN.items() if "MASTER" not in k}, r"srun started 11 .*scontrol show"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, r"mpirun started 4 .*mpirun -x MASTER_ADDR=HO"),
    ],
)
def test_processes_of_several_machines_are_told_to_say_where(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        adopt_ranks(dict(environ))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (SRUN | {"CUDA_VISIBLE_DEVICES": "2"}, True),
        (MPI, True),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "0,1"}, False),
        (SRUN | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, False),
        (SRUN | {"TORCHELASTIC_RUN_ID": "x"}, False),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_who_may_have_a_gpu_of_its_own(environ: dict[str, str], expected: bool) -> None:
    environ = dict(environ)
    adopt_ranks(environ)
    assert has_own_gpu(environ) == expected

"""Which device a process takes, and what is said where it takes none; with a CUDA that only says
what it has."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.tiny import module_config, open_environment
from toolkit.commands.models import pick_device as pick_by_name
from toolkit.distributed import devices, environment, process_groups, tuning
from toolkit.distributed.devices import pick_device, unused_gpus, usable_gpus
from toolkit.distributed.layout import resolve_layout
from toolkit.distributed.ranks import adopt_ranks
from toolkit.distributed.tuning import keep_compiled_code, set_defaults
from toolkit.errors import ConfigError
from toolkit.experiment.resuming import processes_here
from toolkit.launch import capacity
from toolkit.train.telling import resume_promise

PDSH = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_SIZE": "8"}
"""The fourth process on the second of two machines with 8 GPUs, under DeepSpeed's launcher."""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with as many GPUs as it is called with."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def have(number: int) -> list[torch.device]:
        taken: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        return taken

    return have


def pick(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    environ = dict(environ)
    adopt_ranks(environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    said = environ.get("LOCAL_WORLD_SIZE")
    return str(pick_device(int(environ.get("LOCAL_RANK", "0")), int(said) if said else None))


@pytest.mark.parametrize(
    ("environ", "number", "expected"),
    [
        ({}, 8, "cuda:0"),
        (PDSH, 8, "cuda:3"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, "cuda:0"),  # one process on each machine
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, 8, "cuda:1"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 0, "cpu"),
        ({"LOCAL_RANK": "1", "ACCELERATE_USE_CPU": "True"}, 1, "cpu"),
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "2",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
                "CUDA_VISIBLE_DEVICES": "2",
            },
            1,
            "cuda:0",
        ),
    ],
)
def test_each_process_takes_its_own(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, environ: dict, number: int, expected: str
) -> None:
    taken = gpus(number)
    assert pick(environ, monkeypatch) == expected
    assert [str(device) for device in taken] == ([] if expected == "cpu" else [expected])


@pytest.mark.parametrize(
    ("environ", "number", "message"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "16"},
            8,
            "16 processes on a machine that shows them 8 GPUs; start at most 8 on each machine, or "
            "train on the CPU with ACCELERATE_USE_CPU=true",
        ),
        (
            {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "6"},
            1,
            "4 processes on a machine that shows them 1 GPU (CUDA_VISIBLE_DEVICES=6); start at "
            "most 1 on each machine, or",
        ),
    ],
)
def test_more_processes_than_gpus_are_refused(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, environ: dict, number: int, message: str
) -> None:
    gpus(number)
    with pytest.raises(ConfigError) as caught:
        pick(environ, monkeypatch)
    assert str(caught.value).startswith(message)


def test_only_several_processes_bind_their_group_to_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **given: opened.append(given))
    monkeypatch.setattr(process_groups, "open_store", lambda *_: None)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    for library in ("GLOO", "NCCL"):
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "lo")
    for world_size in (1, 2):
        process_groups.open_process_groups(torch.device("cuda", 0), world_size)
    assert ["device_id" in given for given in opened] == [False, True]
    assert {given["timeout"] for given in opened} == {process_groups.COLLECTIVE_TIMEOUT}


def test_libraries_find_the_device_of_a_process_that_sees_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert open_environment(module_config()).local_rank == 3
    assert os.environ["LOCAL_RANK"] == "0"


def test_a_device_that_is_named_becomes_the_current_one(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = gpus(2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert pick_by_name("cuda:1") == torch.device("cuda", 1)
    environment.single_environment(device="cuda:1", precision="fp32")
    assert taken == [torch.device("cuda", 1)] * 2


def test_a_run_on_the_cpu_counts_no_gpus(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    monkeypatch.setattr(capacity, "_may_have_gpus", lambda _: usable_gpus() > 0)
    assert (usable_gpus(), processes_here(4)) == (2, 2)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert (usable_gpus(), processes_here(4)) == (0, 4)


class Nvml(SimpleNamespace):
    """NVIDIA's management library, on a machine with two GPUs."""

    NVMLError = RuntimeError

    def __init__(self, cuda: int, count: int = 2) -> None:
        super().__init__(
            nvmlInit=lambda: None,
            nvmlShutdown=lambda: None,
            nvmlDeviceGetCount=lambda: count,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetName=lambda handle: "NVIDIA L40S",
            nvmlSystemGetCudaDriverVersion_v2=lambda: cuda,
            nvmlSystemGetDriverVersion=lambda: "550.54",
        )


@pytest.mark.parametrize(
    ("built", "cuda", "expected"),
    [
        (
            "13.0",
            12040,
            "2 x NVIDIA L40S are not used, this runs on the CPU: torch 9.9 is built for CUDA 13.0, "
            "and the driver 550.54 knows CUDA 12.4; update the driver, or pip install "
            "--force-reinstall 'torch>=2.11,<2.15' --index-url "
            "https://download.pytorch.org/whl/cu126",
        ),
        (
            None,
            13000,
            "2 x NVIDIA L40S are not used, this runs on the CPU: torch 9.9 is built for CPUs; "
            "pip install --force-reinstall 'torch>=2.11' --index-url "
            "https://download.pytorch.org/whl/cu130",
        ),
        (
            "12.6",
            11040,
            "2 x NVIDIA L40S are not used, this runs on the CPU: torch 9.9 is built for CUDA 12.6, "
            "and the driver 550.54 knows CUDA 11.4; update the driver (525 or "
            "newer for CUDA 12, 580 or newer for CUDA 13)",
        ),
        (
            "12.6",
            13000,
            "2 x NVIDIA L40S are not used, this runs on the CPU: torch 9.9 cannot use CUDA: no way",
        ),
    ],
)
def test_gpus_that_torch_cannot_use_are_told_with_what_helps(
    gpus: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    built: str | None,
    cuda: int,
    expected: str,
) -> None:
    def refuse() -> None:
        raise RuntimeError("no way\nmore")

    gpus(0)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml(cuda))
    monkeypatch.setattr(torch, "__version__", "9.9")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    with caplog.at_level(logging.WARNING, logger=devices.__name__):
        assert pick_device(0).type == "cpu"
        assert pick_device(1).type == "cpu"  # one line for each machine
    assert caplog.messages == [expected]


@pytest.mark.parametrize("environ", [{"CUDA_VISIBLE_DEVICES": ""}, {"ACCELERATE_USE_CPU": "true"}])
def test_who_hides_the_gpus_is_not_told_of_them(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    gpus(0)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml(12040))
    assert unused_gpus({}) is not None
    assert unused_gpus(environ) is None
    monkeypatch.setitem(__import__("sys").modules, "pynvml", Nvml(12040, count=0))
    assert unused_gpus({}) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, {}),
        ({"PYTORCH_HIP_ALLOC_CONF": ""}, {}),
        ({"GOMP_SPINCOUNT": "7"}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
    ],
)
def test_the_allocator_grows_blocks_and_threads_spin_shortly_unless_somebody_says_otherwise(
    before: dict[str, str], after: dict[str, str]
) -> None:
    environ = dict(before)
    set_defaults(environ)
    assert environ == {"GOMP_SPINCOUNT": "1000", **after, **before}


def test_compiled_code_is_kept_in_the_users_cache_where_there_is_one(tmp_path: Path) -> None:
    for said, kept in (
        ({"XDG_CACHE_HOME": f"{tmp_path}/new"}, f"{tmp_path}/new/toolkit/compiled"),
        ({"XDG_CACHE_HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": "its/own"}, "its"),
        ({"XDG_CACHE_HOME": "relative"}, None),
    ):
        found = compiled_code(said)
        assert (found and os.path.dirname(found)) == kept


def compiled_code(environ: dict[str, str]) -> str | None:
    environ = dict(environ)
    keep_compiled_code(environ)
    return environ.get("TORCHINDUCTOR_CACHE_DIR")


def test_code_compiled_for_another_cpu_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    here = compiled_code(environ)
    assert compiled_code(environ) == here
    monkeypatch.setattr(tuning, "cpu_details", lambda: "an older one")
    assert compiled_code(environ) != here


def test_a_cache_folder_that_cannot_be_made_or_written_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/dev/full"), Path("/proc/nowhere")):
        assert compiled_code({"XDG_CACHE_HOME": str(place)}) is None

    def no_room(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning.tempfile, "TemporaryFile", no_room)
    assert compiled_code({"XDG_CACHE_HOME": str(tmp_path)}) is None


def test_the_command_line_sets_it_before_torch_is_there() -> None:
    import subprocess
    import sys

    program = (
        "import sys, os; sys.argv = ['toolkit', 'schema']\n"
        "from toolkit.cli import main\n"
        "main.run = lambda args: print('torch' in sys.modules, os.environ['PYTORCH_ALLOC_CONF'])\n"
        "main.main()"
    )
    environ = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False expandable_segments:True\n"


def test_rank_0_says_what_precision_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(_: Any, own: Any) -> Any:
        """What rank 0 has sent, whose device is faster at bf16."""
        return own[0], "bf16"

    monkeypatch.setattr(environment.TrainingEnvironment, "broadcast", said)
    here = environment.TrainingEnvironment(
        rank=1,
        local_rank=0,
        device=torch.device("cpu"),
        layout=resolve_layout("auto", None, {}),
        seed=0,
    )
    found = environment._with_choices(here, None, 1, None, frozenset())
    assert found.layout.precision == "bf16"


def test_what_resuming_promises_is_said_where_it_is_less() -> None:
    assert resume_promise("cpu", deterministic=False) is None
    assert resume_promise("cuda", deterministic=True) == (
        "a resumed run will be bit-equal on as many GPUs of the same kind"
    )
    assert resume_promise("cuda", deterministic=False) == (
        "a resumed run will be equal to rounding: GPU kernels add up in any order; "
        "--trainer.deterministic=true makes it bit-equal, and slower"
    )

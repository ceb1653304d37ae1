"""The check for GPUs runs where there is none, and says what fails."""

import contextlib
import io
from unittest import mock

import pytest
import torch

from tests import gpu_check
from tests.gpu_machine import CheckFailed, Machine, check_close, no_waiting
from tests.workers import WorkerPool

QUICK = [
    "no sync: dense, compiled", "no sync: documents, eager", "DDP", "experts against",
    "soft cap, 256", "fp32 with", "save", "gpt2_124M",
]  # fmt: skip
CPU = Machine(torch.device("cpu"))


def check(names: list[str]) -> tuple[int, list[str]]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = gpu_check.main(["--device", "cpu", "--only", *names])
    return code, out.getvalue().splitlines()


def test_its_parts_run_on_a_cpu(workers: WorkerPool) -> None:
    code, lines = workers.run(1, check, QUICK, timeout=280)[0]
    table = lines[-len(QUICK) - 1 : -1]
    assert code == 0, table
    assert [line.split()[0] for line in table] == ["-", *["ok"] * 7]
    assert "compiles for GPUs only" in table[0]
    assert "loop equals the loop, empty groups have zero gradients" in table[3]
    assert "MB/s; training stood still for" in table[6]
    assert "tokens/s" in table[7]
    assert lines[-1] == "all checks passed"


def test_one_failure_is_the_exit_code_and_a_line_of_the_table() -> None:
    def holds(machine: Machine) -> str:
        return "as it should"

    def differs(machine: Machine) -> str:
        return check_close("loss", 2.0, 1.0, 1e-3)

    def breaks(machine: Machine) -> str:
        raise ValueError("no such\nkernel")

    parts = {"a": holds, "b": differs, "c": breaks}
    with mock.patch.object(gpu_check, "PARTS", parts):
        code, lines = check(["a"])
        assert (code, lines[-1]) == (0, "all checks passed")
        code, lines = check(["a", "b", "c"])
    assert code == 1
    assert [line.split()[0] for line in lines[-4:-1]] == ["ok", "FAIL", "FAIL"]
    assert lines[-3].endswith("loss 2 instead of 1")
    assert "ValueError: no such (test_gpu_check.py:" in lines[-2]
    assert lines[-1] == "2 of 3 checks failed"


def test_a_host_that_waits_is_found() -> None:
    value = torch.ones(3)
    with no_waiting(CPU):
        value.sum()
    with pytest.raises(CheckFailed, match="asks for a value"), no_waiting(CPU):
        value.sum().item()
    with pytest.raises(CheckFailed, match="asks for a value"), no_waiting(CPU):
        bool(value.sum() > 2)


def test_numbers_that_are_none_are_not_close() -> None:
    with pytest.raises(CheckFailed, match="loss nan instead of 1"):
        check_close("loss", float("nan"), 1.0, 1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main([])
    assert "torch sees no GPU here; --device cpu runs what a CPU can" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--device", "cpu", "--only", "xyz"])
    assert "no part contains 'xyz': no sync: dense, eager" in capsys.readouterr().err

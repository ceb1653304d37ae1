"""The check for GPUs runs where there is none, and says what fails."""

import contextlib
import io
import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests import gpu_check, gpu_report
from tests.gpu_machine import CheckFailed, Machine, check_close, no_waiting
from tests.workers import WorkerPool

QUICK = [
    "gpt2_124M", "no sync: dense, compiled", "no sync: documents, eager", "DDP", "experts against",
    "soft cap, 256", "fp32 with", "save",
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
    assert [line.split()[0] for line in table] == ["ok", "-", *["ok"] * 6]
    assert "tokens/s" in table[0]
    assert "compiles for GPUs only" in table[1]
    assert "loop equals the loop, empty groups have zero gradients" in table[4]
    assert "MB/s; training stood still for" in table[7]
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


def test_the_table_is_kept_and_no_part_begins_too_late(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    parts = {name: lambda _: "as it should" for name in "ab"}
    with mock.patch.object(gpu_check, "PARTS", parts), contextlib.redirect_stdout(io.StringIO()):
        options = ["--device", "cpu", "--json", str(file)]
        assert gpu_check.main(options) == 0
        assert [p["state"] for p in json.loads(file.read_text())["parts"]] == ["ok", "ok"]
        assert gpu_check.main([*options, "--minutes", "-1"]) == 0
    found = json.loads(file.read_text())
    assert [(p["state"], p["detail"]) for p in found["parts"]] == [("-", "no time was left")] * 2
    assert found["where"].startswith("CPU, torch")


def test_a_part_that_hangs_ends_with_what_is_known(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    report = gpu_report.Report(CPU, str(file))
    report.lines.append(gpu_report.Line("ok", "a", 1.0, "as it should"))
    report.running = "b"
    with mock.patch.object(os, "_exit") as left, contextlib.redirect_stdout(io.StringIO()):
        report.give_up()
    left.assert_called_once_with(1)
    states = [(p["name"], p["state"]) for p in json.loads(file.read_text())["parts"]]
    assert states == [("a", "ok"), ("b", "FAIL")]


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
    assert "no part contains 'xyz': speed: gpt2_124M" in capsys.readouterr().err

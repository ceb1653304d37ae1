"""Tests of CPUs stay on the CPU on a machine with GPUs, in this process and in those it starts."""

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest
from tests.workers import WorkerPool

HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def devices() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in HIDDEN}


def test_gpus_are_hidden_here_and_from_all_children(workers: WorkerPool) -> None:
    program = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert child.stdout == "''\n"
    assert workers.run(2, devices) == [HIDDEN, HIDDEN]
    assert devices() == HIDDEN


@pytest.mark.parametrize(
    ("expression", "shown"),
    [("gpu", "0,1"), (" gpu ", "0,1"), ("not slow and not gpu", ""), ("", "")],
)
def test_only_the_tests_of_gpus_see_them(
    monkeypatch: pytest.MonkeyPatch, expression: str, shown: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    option = SimpleNamespace(markexpr=expression)
    session: Any = SimpleNamespace(config=SimpleNamespace(option=option))
    conftest.pytest_sessionstart(session)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown


def test_a_pool_may_have_devices_of_its_own() -> None:
    pool = WorkerPool({"CUDA_VISIBLE_DEVICES": "7"})
    try:
        assert pool.run(1, devices) == [HIDDEN | {"CUDA_VISIBLE_DEVICES": "7"}]
    finally:
        pool.close()
    assert devices() == HIDDEN

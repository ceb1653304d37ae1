"""`python FILE.py`, of `toolkit.main(build_config)`: starts and resumes like `toolkit train`."""

import sys
from pathlib import Path

import pytest

from tests.e2e._run import Process, committed, run
from tests.e2e.test_bad_input import assert_one_line
from tests.e2e.test_interruptions import status
from tests.workers import free_port

FILE = """
import helper
import toolkit
from toolkit.testing import tiny_experiment

def build_config():
    optim = {"type": helper.OPTIM, "lr": 0.01}
    length = {"max_duration": {"value": 6, "unit": "steps"}}
    config = tiny_experiment("FOLDER", trainer=length).to_dict()
    config["train_module"]["optim"] = optim
    return config

def broken():
    return {}["nothing"]

if __name__ == "__main__":
    toolkit.main(FUNCTION)
"""
SHORT = "--trainer.hard_stop={value: 2, unit: steps}"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A current folder with a module of the user's, and one that must not be taken for Python's;
    the file is in `sub`, with another module beside it."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here.py").write_text("import torch\n\nclass Mine(torch.optim.AdamW):\n    pass\n")
    (tmp_path / "json.py").write_text("raise ImportError('not of Python')")
    (tmp_path / "sub" / "helper.py").write_text("OPTIM = 'here:Mine'\n")
    for name, function in (("mine", "build_config"), ("bad", "broken")):
        text = FILE.replace("FOLDER", str(tmp_path / "work")).replace("FUNCTION", function)
        (tmp_path / "sub" / f"{name}.py").write_text(text)
    return tmp_path


def python(file: str, *words: str) -> list[str]:
    return [sys.executable, f"sub/{file}.py", *words]


@pytest.mark.slow
def test_a_file_starts_processes_and_its_run_resumes_elsewhere(here: Path) -> None:
    """Workers find the user's modules where the launcher does, beside the file and in the current
    folder, and no others."""
    folder = here / "work" / "runs" / "tiny" / "a"
    result = run(*python("mine", "--processes=2", "--engine=fsdp", "--name=a", SHORT), cwd=here)
    assert result.code == 0, result.output
    seen = status(folder)
    assert (seen["step"], seen["world_size"], seen["engine"]) == (2, 2, "fsdp")
    result = run("toolkit", "resume", folder, "--trainer.hard_stop=null", cwd=here / "elsewhere")
    assert result.code == 0, result.output
    assert "relaunching with 2 processes" in result.output
    assert committed(folder)[-1] == 6


@pytest.mark.parametrize(
    ("file", "words", "message"),
    [
        ("bad", [], "sub/bad.py, line 14: broken() fails: KeyError: 'nothing'"),
        # Which only a worker finds.
        ("mine", ["--save-folder", "here.py/run"], "here.py/run: cannot write there"),
    ],
)
def test_a_file_that_fails_is_one_line(
    file: str, words: list[str], message: str, here: Path
) -> None:
    result = run(*python(file, "--processes", "2", *words), cwd=here)
    assert_one_line(result, f"{here}/{message}")


@pytest.mark.slow
def test_a_file_starts_and_resumes_on_two_machines(here: Path) -> None:
    folder = here / "work" / "runs" / "tiny" / "two"
    head = f"127.0.0.1:{free_port()}"
    nodes = ("--processes=1", "--nodes=2", "--head", head)
    for words in (["--name=two", SHORT], ["resume", str(folder), "--trainer.hard_stop=null"]):
        both = [
            Process(python("mine", *words, *nodes, f"--node-rank={rank}"), cwd=here)
            for rank in range(2)
        ]
        results = [process.wait() for process in both]
        assert [result.code for result in results] == [0, 0], [r.output for r in results]
    seen = status(folder)
    assert (seen["step"], seen["world_size"]) == (6, 2)

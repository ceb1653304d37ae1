"""Runs that several tests look at: each is made once a session."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e._run import ROOT, Process, Result, run

STEPS = 60
RECIPE = json.loads((ROOT / "toolkit" / "recipes" / "smoke.json").read_text())


@pytest.fixture(scope="session", autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    yield
    for process in Process.started:
        process.kill()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with my.json: the smoke recipe, longer, in fp32, saving often."""
    folder = tmp_path_factory.mktemp("e2e")
    config = json.loads(json.dumps(RECIPE))
    config["run"] |= {"experiment": "e2e", "root": str(folder / "runs")}
    config["dataset"]["root"] = str(folder / "data")
    config["train_module"]["precision"] = "fp32"
    config["trainer"]["max_duration"]["value"] = STEPS
    config["trainer"]["callbacks"] |= {
        "network_monitor": {"interval": 20},
        "lm_evaluator": {"interval": 20},
        "checkpointer": {"interval": 10},
    }
    (folder / "my.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def single(place: Path) -> tuple[Path, Result]:
    """(run folder, result) of an undisturbed run on one process, started as Python runs a folder:
    `accelerate launch toolkit train` from the repository's root."""
    result = run(
        *("accelerate", "launch", "toolkit", "train", place / "my.json", "--name", "single"),
        cwd=ROOT,
    )
    assert result.code == 0, result.output
    return place / "runs" / "e2e" / "single", result


@pytest.fixture(scope="session")
def fsdp(place: Path, single: tuple[Path, Result]) -> Path:
    """Run folder of an undisturbed FSDP run on two processes."""
    result = run(
        *("torchrun", "--nproc-per-node=2", "-m", "toolkit", "train", "my.json"),
        *("--train_module.dp_config={name: fsdp, param_dtype: float32}", "--name", "fsdp"),
        cwd=place,
    )
    assert result.code == 0, result.output
    return place / "runs" / "e2e" / "fsdp"

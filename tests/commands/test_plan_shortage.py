"""A run without memory is told what its layout needs and what fits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.cli import main as cli
from toolkit.commands.plan.shortage import shortage
from toolkit.distributed.layout import layout_of
from toolkit.experiment.load import load_experiment
from toolkit.train.trainer import Trainer

GIB = 2**30


def told(*overrides: str, world_size: int, name: str = "NVIDIA H100 80GB HBM3") -> str:
    config = load_experiment("llama3_8B", overrides).config
    layout = layout_of(config.train_module, {"WORLD_SIZE": f"{world_size}"})
    return shortage(config, layout, name, 79 * GIB, Path("run/metadata/config.json"))


def test_it_names_the_plan_and_the_largest_microbatch_that_fits() -> None:
    flags = ("--train_module.ac_config=null", "--train_module.dp_config.name=fsdp")
    line = told(*flags, "--train_module.rank_microbatch_size=32768", world_size=16)
    assert line.startswith(
        "no memory left on NVIDIA H100 80GB HBM3 (79.0 GiB): the plan for fsdp with 4 rows a "
        "microbatch is "
    )
    assert "--train_module.rank_microbatch_size=8192 fits; or compare layouts with: " in line
    assert line.endswith(
        "toolkit plan run/metadata/config.json --world-size 16 --gpus-per-node 1 --device h100 "
        "--search"
    )


def test_where_no_microbatch_fits_other_layouts_are_all_that_is_left() -> None:
    line = told(world_size=1, name="some GPU")
    assert "fits" not in line
    assert line.endswith("--world-size 1 --gpus-per-node 1 --search")


def test_a_run_that_has_no_memory_left_says_so_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(trainer: Trainer, batch: dict[str, Any]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "_train_step", step)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", "smoke", "--save-folder", "run"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "rank 0: no memory left on " in lines[0]
    assert f"toolkit plan {tmp_path}/run/metadata/config.json --world-size 1" in lines[0]

"""Every way to start, and every engine's numbers."""

import json
from pathlib import Path

import pytest

from tests.e2e._run import ROOT, Result, losses, read_json, run
from tests.e2e.conftest import STEPS

CONFIGS = ROOT / "accelerate_configs"


def test_accelerate_runs_the_module_from_any_folder(place: Path) -> None:
    result = run(
        *("accelerate", "launch", "-m", "toolkit", "train", "my.json"),
        *("--train_module.optim.lr=6e-3", "--dry-run"),
        cwd=place,
    )
    assert result.code == 0, result.output
    assert "0.006" in next(line for line in result.output.splitlines() if "optim.lr " in line)
    assert "engine      single, 1 process" in result.output
    assert "Nothing was written." in result.output


def test_torchrun_takes_engine_and_precision_from_the_config(place: Path) -> None:
    result = run(
        *("torchrun", "--nproc-per-node=2", "-m", "toolkit", "train", "my.json", "--dry-run"),
        "--train_module.dp_config={name: fsdp, param_dtype: bfloat16}",
        "--train_module.precision=auto",
        cwd=place,
    )
    assert result.code == 0, result.output
    assert result.output.count("dry run of my.json") == 1
    assert "fsdp, 2 processes, from train_module.dp_config" in result.output
    assert "precision bf16" in result.output


def test_every_short_option_reaches_the_dry_run(place: Path, tmp_path: Path) -> None:
    result = run(
        *("toolkit", "train", place / "my.json", "--name", "run1", "--sequence-length", "32"),
        *("--data-root", "D", "--save-folder", "F", "--work-dir", "W", "--dry-run"),
        cwd=tmp_path,
    )
    assert result.code == 0, result.output
    shown = " ".join(result.output.split())
    for expected in (
        "run.name run1 < --name",
        "run.work_dir W < --work-dir",
        "dataset.root D < --data-root",
        "sequences of 32 tokens",
        f"writes {tmp_path / 'F'} {tmp_path / 'D'}",
    ):
        assert expected in shown
    assert not any(path for path in tmp_path.iterdir() if not path.name.startswith(".output"))


def test_the_console_tells_what_happened(single: tuple[Path, Result]) -> None:
    folder, result = single
    lines = result.output.splitlines()
    start = next(line for line in lines if line.startswith("training 41,120 parameters"))
    assert start.startswith("training 41,120 parameters on 1 process, single in fp32 on the CPU (")
    assert start.endswith(f"): {folder}")
    assert any(line.startswith(f"step {STEPS}/{STEPS}  loss ") for line in lines)
    assert f"done at step {STEPS}; everything is in {folder}" in lines


def test_fsdp_gives_the_losses_of_one_process(single: tuple[Path, Result], fsdp: Path) -> None:
    assert read_json(fsdp / "metadata" / "status.json")["engine"] == "fsdp"
    assert losses(fsdp)[:10] == pytest.approx(losses(single[0])[:10], rel=1e-5)
    assert losses(fsdp) == pytest.approx(losses(single[0]), rel=1e-3)


@pytest.mark.parametrize(
    ("engine", "processes"),
    [
        ("ddp", 2),
        pytest.param("zero3", 2, marks=pytest.mark.slow),
        pytest.param("fsdp", 2, marks=pytest.mark.slow),
        pytest.param("zero1", 2, marks=pytest.mark.slow),
        pytest.param("zero2", 2, marks=pytest.mark.slow),
        pytest.param("zero3_offload", 2, marks=pytest.mark.slow),
        pytest.param("hsdp", 4, marks=pytest.mark.slow),
        pytest.param("fsdp_tp", 4, marks=pytest.mark.slow),
        pytest.param("fsdp_cp", 4, marks=pytest.mark.slow),
        pytest.param("hsdp_tp", 8, marks=pytest.mark.slow),
    ],
)
def test_every_accelerate_config_gives_the_losses_of_one_process(
    engine: str, processes: int, single: tuple[Path, Result], place: Path
) -> None:
    result = run(
        *("accelerate", "launch", "--config_file", f"accelerate_configs/{engine}.yaml"),
        *("--num_processes", str(processes), "toolkit", "train", place / "my.json"),
        *("--name", f"by_yaml_{engine}", "--trainer.hard_stop={value: 10, unit: steps}"),
        *("--trainer.no_checkpoints", "--trainer.no_evals"),
        *("--train_module.rank_microbatch_size", "256"),
        cwd=ROOT,
    )
    assert result.code == 0, result.output
    folder = place / "runs" / "e2e" / f"by_yaml_{engine}"
    status = read_json(folder / "metadata" / "status.json")
    data_parallel, _, axis = engine.removesuffix("_offload").partition("_")
    assert status["engine"] == data_parallel + (f", {axis} 2" if axis else "")
    assert status["world_size"] == processes
    assert losses(folder) == pytest.approx(losses(single[0])[:10], rel=1e-5)


def test_every_accelerate_config_is_tested() -> None:
    tested = {"single", "ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3", "zero3_offload"}
    tested |= {"fsdp_tp", "fsdp_cp", "hsdp_tp"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == tested | {"multi_node_fsdp"}
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert (CONFIGS / f"{path.stem}.yaml").exists()
        json.loads(path.read_text())

"""Checkpoints of a run against their manifests."""

import shutil
from pathlib import Path

import pytest
import torch

from toolkit.checkpoint.commit import save_checkpoint
from toolkit.cli import main as cli
from toolkit.commands.verify import verify_checkpoints
from toolkit.errors import RunError
from toolkit.experiment.load import load_experiment
from toolkit.runs.manager import RunManager


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with whole checkpoints of steps 2 and 10."""
    (tmp_path / "metadata").mkdir()
    RunManager(tmp_path, experiment="a", name="b").close("finished")
    for step in (2, 10):
        save_checkpoint(
            tmp_path / "checkpoints", step=step, tokens=0, tensors={"model.a": torch.ones(9)},
            rank_state={"step": step}, engine="single", rank=0, group=None,
        )  # fmt: skip
    return tmp_path


def problems(path: Path, *, quick: bool = False) -> dict[str, str | None]:
    return {report.folder.name: report.problem for report in verify_checkpoints(path, quick=quick)}


def test_whole_checkpoints_are_ok_in_order_of_steps(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["verify", str(run)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["checkpoint", "engine", "size", "result"]
    assert [row.split()[0] for row in rows] == ["step2", "step10"]
    assert all(row.split()[1:4] == ["single", "x", "1"] and row.endswith("  OK") for row in rows)


@pytest.mark.parametrize("kind", ["flip", "cut", "delete"])
def test_every_file_that_is_not_whole_is_named(run: Path, kind: str) -> None:
    for file in sorted(p for p in (run / "checkpoints" / "step10").rglob("*") if p.is_file()):
        before = file.read_bytes()
        middle = len(before) // 2
        flipped = before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :]
        file.write_bytes(flipped if kind == "flip" else before[:-1])
        if kind == "delete":
            file.unlink()
        found = problems(run)
        assert found["step2"] is None
        assert file.name in str(found["step10"]), (file.name, found)
        file.write_bytes(before)
    assert problems(run) == {"step2": None, "step10": None}


def test_quick_looks_at_sizes_only(run: Path) -> None:
    file = run / "checkpoints" / "step2" / "train" / "rank0.pt"
    data = file.read_bytes()
    file.write_bytes(bytes(len(data)))
    assert problems(run, quick=True)["step2"] is None
    assert problems(run)["step2"] == "train/rank0.pt has changed since it was saved"
    file.write_bytes(data + b"x")
    cut = f"train/rank0.pt has {len(data) + 1} bytes, expected {len(data)}"
    assert problems(run, quick=True)["step2"] == cut


def test_one_damaged_checkpoint_is_exit_1_and_leftovers_are_not(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run / "checkpoints"
    (root / "step12.tmp").mkdir()
    shutil.copytree(root / "step2", root / "step2.invalid")
    (root / "step2.invalid" / "train" / "rank0.pt").unlink()
    assert cli.run(["verify", str(run)]) == 0
    output = capsys.readouterr().out
    assert "set aside: train/rank0.pt is missing" in output
    assert "unfinished: being written, or left by a crash" in output
    (root / "step10" / ".metadata.json").write_text("{}")
    assert cli.run(["verify", str(run)]) == 1
    said = (
        ".metadata.json: not the JSON that belongs there: Object missing required field `version`"
    )
    assert said in capsys.readouterr().out


def test_a_checkpoint_can_be_given_by_itself(run: Path) -> None:
    assert problems(run / "checkpoints" / "step2") == {"step2": None}
    (run / "checkpoints" / "step2").rename(run / "step5")
    assert problems(run / "step5") == {"step5": ".metadata.json says step 2"}


def test_bad_input_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="neither a run folder nor a step"):
        verify_checkpoints(tmp_path)
    for words, expected in (
        ([], "neither a run folder nor"),
        (["--step", "3"], "--step belongs to --replay"),
        (["--quick", "--replay", "3"], "--quick does not go with --replay"),
        (["--replay", "3"], "not a run folder"),
    ):
        assert cli.run(["verify", str(tmp_path), *words]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("is_link", [False, True])
def test_checkpoints_that_are_gone_are_no_clean_bill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_link: bool
) -> None:
    (tmp_path / "metadata").mkdir()
    manager = RunManager(tmp_path, experiment="a", name="b")
    manager.set_status("running", step=10)
    if is_link:
        (tmp_path / "checkpoints").symlink_to("/no/such/disk")
    assert cli.run(["verify", str(tmp_path)]) == 1
    why = "a link to /no/such/disk, which is" if is_link else "is"
    assert f"{why} not there, and the run is at step 10" in capsys.readouterr().out
    config = load_experiment("smoke", ["--trainer.no_checkpoints=true"]).config
    manager.log_metadata(config, "metadata/config.json")
    assert cli.run(["verify", str(tmp_path)]) == 0


def test_a_config_that_nothing_can_be_resumed_with_is_exit_1(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, origins = run / "metadata" / "config.json", run / "metadata" / "origins.json"
    config.write_bytes(load_experiment("smoke").config.to_json())
    assert cli.run(["verify", str(run)]) == 0
    broken = {
        b"{": "  1:2: not valid JSON",
        b'{"seed": "x"}': "seed: expected a whole number, not 'x'; model: required",
        None: "is missing, and without it the run cannot go on",
    }
    origins.write_bytes(b"{}")
    capsys.readouterr()
    for content, problem in broken.items():
        config.unlink() if content is None else config.write_bytes(content)
        assert cli.run(["verify", str(run)]) == 1
        (row, *steps) = capsys.readouterr().out.splitlines()[1:]
        assert row.split()[0] == "config.json"
        assert problem in row
        assert [line.split()[0] for line in steps] == ["step2", "step10"]
    origins.unlink()  # it was started from Python, of parts that no config describes
    assert cli.run(["verify", str(run)]) == 0

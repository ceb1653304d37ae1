"""Finished runs prove themselves: checkpoints whole, steps repeated, batches shown."""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e._run import Result, content, read_json, run
from tests.e2e.conftest import STEPS
from toolkit.cli import main as cli


def test_checkpoints_of_real_runs_are_whole(
    single: tuple[Path, Result], fsdp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, engine in ((single[0], "single x 1"), (fsdp, "fsdp x 2")):
        assert cli.run(["verify", str(folder)]) == 0
        rows = capsys.readouterr().out.splitlines()[1:]
        assert len(rows) == 3
        assert all(engine in row and row.endswith(" OK") for row in rows)


def test_a_replay_gives_the_recorded_losses_bit_for_bit_and_touches_nothing(
    single: tuple[Path, Result], place: Path
) -> None:
    folder = single[0]
    before = content(folder)
    registry = (place / "runs" / "registry.sqlite").read_bytes()
    result = run("toolkit", "verify", folder, "--replay", "7", cwd=place)
    assert result.code == 0, result.output
    assert "replayed steps 51 to 57 from step50: single x 1, fp32; compared bit for bit" in (
        result.output
    )
    assert "equal bit for bit: 7 losses, largest relative difference 0" in result.output
    after = content(folder)
    receipt = json.loads(after.pop("metadata/verify-replay-step50.json"))
    assert after == before
    assert (place / "runs" / "registry.sqlite").read_bytes() == registry
    assert (receipt["verdict"], receipt["comparison"]) == ("equal", "bit for bit")
    for side in ("replayed", "recorded"):
        receipt[side].pop("chosen")  # the replay is given what the run had chosen
    assert receipt["replayed"] == receipt["recorded"]
    (folder / "metadata" / "verify-replay-step50.json").unlink()


@pytest.mark.slow
def test_a_replay_on_another_engine_finds_the_step_that_was_changed(
    fsdp: Path, place: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(fsdp, folder)
    metrics = folder / "metrics" / "train.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    recorded = records[52]["loss"]
    records[52]["loss"] *= 1 + 1e-4
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ("toolkit", "verify", folder, "--replay", "5", "--step", "50")
    result = run("env", "WORLD_SIZE=1", "RANK=0", *words, cwd=place)
    assert result.code == 1, result.output
    assert "compared within a relative 1e-05" in result.output
    assert "not bit for bit: engine: fsdp then, single now" in result.output
    assert f"differs: step 53: recorded loss {records[52]['loss']!r}, replayed " in result.output
    receipt = read_json(folder / "metadata" / "verify-replay-step50.json")
    assert receipt["first_difference"]["step"] == 53
    assert receipt["first_difference"]["replayed"] == pytest.approx(recorded, rel=1e-5)
    assert receipt["largest_difference"] == pytest.approx(1e-4, rel=0.1)


@pytest.mark.slow
def test_a_replay_of_several_processes_launches_them(fsdp: Path, place: Path) -> None:
    result = run("toolkit", "verify", fsdp, "--replay", "5", cwd=place)
    assert result.code == 0, result.output
    assert f"replayed steps {STEPS - 9} to {STEPS - 5} from step50: fsdp x 2" in result.output
    assert "equal bit for bit: 5 losses" in result.output


def test_a_batch_is_shown_as_text(
    single: tuple[Path, Result], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["batch", str(single[0]), "--step", "7", "--show", "2"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("step 7: batch 7 of ")
    assert "16 instances, 1,024 tokens, 1,008 targets" in output
    assert "(as in the run's checkpoint)" in output
    assert output.count("\n[[ ]]: targets") == 1
    assert output.count("[[") == 1 + 2  # the targets of a row stand together


def test_a_resume_is_explained(fsdp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(fsdp)
    words = ["resume", "--explain", str(fsdp), "--trainer.max_duration.value=70"]
    assert cli.run(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "engine      fsdp x 2 in fp32, as saved" in lines
    assert "config      trainer.max_duration.value: 60 -> 70" in lines
    assert "goes on     from step 61 to 70" in lines
    assert content(fsdp) == before

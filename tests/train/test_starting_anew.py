"""A run that has trained never starts again from step 0 by itself, and loses nothing where it is
told to."""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e._run import content
from tests.train.test_remote_runs import run
from tests.workers import WorkerPool
from toolkit.checkpoint.folder import saved_steps
from toolkit.commands.explain import explain_resume
from toolkit.train.progress import reached_step

STEPS = 6
LENGTH = f"--trainer.max_duration.value={STEPS}"
ANEW = "--trainer.start_anew=true"


@pytest.fixture(scope="module")
def trained(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of a run of six steps, saved at 3 and 6; data root)."""
    place = tmp_path_factory.mktemp("anew")
    assert workers.run(1, run, str(place / "run"), str(place / "data"), LENGTH) == [(0, "")]
    return place / "run", place / "data"


@pytest.fixture
def copy(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def damage(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / "checkpoints" / f"step{step}" / "train" / "rank0.pt").write_bytes(b"")


def steps_of(folder: Path, metrics: str = "metrics") -> list[int]:
    lines = (folder / metrics / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_it_is_refused_and_nothing_is_touched(
    workers: WorkerPool, trained: tuple[Path, Path], copy: Path
) -> None:
    damage(copy, 3, 6)
    before = content(copy)
    code, message = workers.run(1, run, str(copy), str(trained[1]), LENGTH)[0]
    assert code == 2
    assert f"{copy}: it has done 6 steps, and no checkpoint of it is whole" in message
    assert "step6: train/rank0.pt has 0 bytes, expected" in message
    assert "--trainer.start_anew starts it again from step 0" in message
    assert explain_resume(copy, (), {}).refused == [message]
    assert content(copy) == before


def test_changed_contents_are_seen_before_anything_is_written(
    workers: WorkerPool, trained: tuple[Path, Path], copy: Path
) -> None:
    for step in (3, 6):
        file = copy / "checkpoints" / f"step{step}" / "model_and_optim" / "__0_0.distcp"
        data = file.read_bytes()
        file.write_bytes(data[:-200] + bytes([data[-200] ^ 1]) + data[-199:])
    before = content(copy)
    code, message = workers.run(1, run, str(copy), str(trained[1]), LENGTH)[0]
    assert (code, "__0_0.distcp has changed since it was saved" in message) == (2, True)
    assert content(copy) == before


def test_started_anew_it_keeps_what_there_was(
    workers: WorkerPool, trained: tuple[Path, Path], copy: Path
) -> None:
    damage(copy, 3, 6)
    recorded = (copy / "metrics" / "train.jsonl").read_bytes()
    assert explain_resume(copy, ["--trainer.start_anew"], {}).refused == []
    assert workers.run(1, run, str(copy), str(trained[1]), LENGTH, ANEW) == [(0, "")]
    assert (copy / "metrics.attempt1" / "train.jsonl").read_bytes() == recorded
    assert any((copy / "tb.attempt1" / "train").iterdir())
    assert steps_of(copy) == list(range(1, STEPS + 1))
    assert saved_steps(copy / "checkpoints") == [3, 6]
    for step in (3, 6):
        kept = copy / "checkpoints" / f"step{step}.invalid"
        assert (kept / "train" / "rank0.pt").stat().st_size == 0
        assert (kept / "model_and_optim" / "__0_0.distcp").stat().st_size > 0
    # For one start: the next continues.
    config = json.loads((copy / "metadata" / "config.json").read_text())
    assert config["trainer"]["start_anew"] is False
    longer = "--trainer.max_duration.value=7"
    assert workers.run(1, run, str(copy), str(trained[1]), longer, ANEW) == [(0, "")]
    assert steps_of(copy) == list(range(1, STEPS + 2))
    assert not (copy / "metrics.attempt2").exists()


def test_a_damaged_newest_is_set_aside_and_the_one_before_continues(
    workers: WorkerPool, trained: tuple[Path, Path], copy: Path
) -> None:
    damage(copy, 6)
    (copy / "checkpoints" / "step6.invalid").mkdir()  # of an earlier accident
    assert workers.run(1, run, str(copy), str(trained[1]), LENGTH) == [(0, "")]
    assert (copy / "checkpoints" / "step6.invalid.2" / "train" / "rank0.pt").stat().st_size == 0
    assert (copy / "checkpoints" / "step6.invalid").is_dir()
    assert saved_steps(copy / "checkpoints") == [3, 6]
    assert steps_of(copy) == steps_of(trained[0])


def test_a_run_without_checkpoints_is_not_repeated_by_itself(
    workers: WorkerPool, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, never = str(tmp_path / "never"), "--trainer.no_checkpoints=true"
    short = "--trainer.max_duration.value=2"
    assert workers.run(1, run, folder, str(trained[1]), short, never) == [(0, "")]
    code, message = workers.run(1, run, folder, str(trained[1]), short, never)[0]
    assert code == 2
    assert "it has done 2 steps" in message
    assert "trainer.no_checkpoints is true" in message


def test_what_a_folder_tells_of_its_progress(copy: Path) -> None:
    assert reached_step(copy) == 6
    (copy / "metadata" / "status.json").unlink()
    shutil.rmtree(copy / "checkpoints")
    assert reached_step(copy) == 6
    with (copy / "metrics" / "train.jsonl").open("ab") as file:
        file.write(b"\0" * 40_000)  # blocks that a crash of the machine left empty
    assert reached_step(copy) == 6
    shutil.rmtree(copy / "metrics")
    assert reached_step(copy) == 0
    (copy / "checkpoints" / "step4").mkdir(parents=True)
    assert reached_step(copy) == 4


def test_a_load_path_that_is_not_there_is_refused(
    workers: WorkerPool, trained: tuple[Path, Path], copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    own = copy / "checkpoints"
    for path, expected in (
        (tmp_path / "runn", "there is no such folder, but run"),
        (tmp_path / "file", "it is a file; give a run folder"),
        (own / "step4", "there is no such folder, but step3, step6"),
        (copy / "metrics", "give a run folder or a step"),
    ):
        flags = (f"--trainer.load_path={path}", "--trainer.load_weights_only=true")
        new = tmp_path / "new"
        code, message = workers.run(1, run, str(new), str(trained[1]), *flags)[0]
        assert (code, new.exists()) == (2, False)
        assert f"trainer.load_path {path}: holds no valid checkpoint" in message
        assert expected in message
    shutil.rmtree(own)
    flags = (f"--trainer.load_path={copy}", "--trainer.load_weights_only=true")
    message = workers.run(1, run, str(tmp_path / "new"), str(trained[1]), *flags)[0][1]
    assert f"holds no valid checkpoint; see `toolkit verify {copy}`" in message
    alone = "--trainer.load_weights_only=true"
    message = workers.run(1, run, str(tmp_path / "new"), str(trained[1]), alone)[0][1]
    assert "trainer.load_weights_only: there is nothing to load" in message


def test_a_metric_that_no_evaluation_has_is_refused_with_those_there_are(
    workers: WorkerPool, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    flag = "--trainer.callbacks.checkpointer.best_metric=val_loss"
    code, message = workers.run(1, run, str(tmp_path / "new"), str(trained[1]), flag)[0]
    assert code == 2
    assert "no evaluation gives 'val_loss'" in message
    assert "there are val/loss, val/ppl, val/bits_per_byte" in message
    keep = ("--trainer.callbacks.checkpointer.keep_best=1", "--trainer.no_evals=true")
    code, message = workers.run(1, run, str(tmp_path / "new"), str(trained[1]), *keep)[0]
    assert (code, "no evaluation runs" in message) == (2, True)


def test_changed_freezing_continues_and_explain_says_so(
    workers: WorkerPool, trained: tuple[Path, Path], copy: Path
) -> None:
    freeze = "--train_module.freeze=[blocks.0.attention.*]"
    longer = "--trainer.max_duration.value=8"
    explanation = explain_resume(copy, [freeze, longer], {})
    assert explanation.refused == []
    assert "optimizer state dropped of 4 parameters" in dict(explanation.rows)["optimizer"][0]
    assert workers.run(1, run, str(copy), str(trained[1]), freeze, longer) == [(0, "")]
    other = ["--train_module.freeze=[blocks.1.attention.*]", "--trainer.max_duration.value=9"]
    explanation = explain_resume(copy, other, {})
    assert explanation.refused == []
    assert [line.split(" parameters")[0] for line in dict(explanation.rows)["optimizer"]] == [
        "fresh optimizer state for 4",
        "optimizer state dropped of 4",
    ]
    assert workers.run(1, run, str(copy), str(trained[1]), *other) == [(0, "")]
    assert steps_of(copy) == list(range(1, 10))
    refused = explain_resume(copy, ["--train_module.freeze=[nothing.*]"], {}).refused
    assert "train_module.freeze: 'nothing.*' matches no parameter" in refused[0]

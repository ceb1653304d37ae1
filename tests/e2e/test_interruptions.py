"""Crashes, kills and requests to stop: the run goes on as if nothing had happened.

Two runs go through a chain of interruptions each; the tests look at what every link left behind.
"""

import dataclasses
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e._run import (
    Process,
    Result,
    committed,
    content,
    count_lines,
    kill_while_saving,
    losses,
    read_json,
    read_lines,
    run,
)
from tests.e2e.conftest import STEPS

SAVED_EXACTLY = ("step", "tokens", "loss", "ppl", "lr", "grad_norm", "skipped", "epoch")


@dataclasses.dataclass
class Chain:
    """What was seen between the links of a chain of interruptions."""

    folder: Path
    results: dict[str, Result] = dataclasses.field(default_factory=dict)
    seen: dict[str, Any] = dataclasses.field(default_factory=dict)


def has_steps(folder: Path, step: int, *, beyond: int) -> Callable[[], bool]:
    """Whether checkpoint `step` is committed and at least `beyond` later steps are recorded."""
    metadata = folder / "checkpoints" / f"step{step}" / ".metadata.json"
    train = folder / "metrics" / "train.jsonl"
    return lambda: metadata.exists() and count_lines(train) >= step + beyond


def records_of(folder: Path, attempt: int) -> Callable[[], bool]:
    """Whether `attempt` has recorded a step."""
    return lambda: f'"attempt":{attempt},' in (folder / "metrics" / "train.jsonl").read_text()


def status(folder: Path) -> dict[str, Any]:
    return read_json(folder / "metadata" / "status.json")


@pytest.fixture(scope="module")
def killed(single: tuple[Path, Result], place: Path, tmp_path_factory: Any) -> Chain:
    """One process: SIGKILL between checkpoints, SIGKILL while one is written, SIGTERM, the end."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folder = place / "runs" / "e2e" / "killed"
    chain = Chain(folder)
    # The data root is relative to the first folder; later commands come from another one.
    process = Process(
        ["toolkit", "train", "my.json", "--name", "killed", "--data-root", "data"], cwd=place
    )
    process.wait_until(has_steps(folder, 10, beyond=5))
    process.send(signal.SIGSTOP)
    chain.results["second writer"] = run("toolkit", "resume", folder, cwd=elsewhere)
    process.kill()
    chain.seen["after the first kill"] = committed(folder)
    with (folder / "metrics" / "train.jsonl").open("a") as file:
        file.write('{"step":999,"tokens":10')

    process = Process(["toolkit", "resume", folder], cwd=elsewhere)
    newest = chain.seen["after the first kill"][-1]
    chain.seen["unfinished"] = kill_while_saving(process, folder / "checkpoints", after=newest)
    chain.seen["after the second kill"] = committed(folder)

    process = Process(["toolkit", "resume", folder], cwd=elsewhere)
    process.wait_until(records_of(folder, 3))
    process.send(signal.SIGTERM)
    chain.results["stopped"] = process.wait()
    chain.seen["stopped"] = (committed(folder), status(folder))

    chain.results["finished"] = run("toolkit", "resume", folder, cwd=elsewhere)
    return chain


@pytest.fixture(scope="module")
def killed_fsdp(fsdp: Path, place: Path) -> Chain:
    """Two FSDP processes: SIGKILL for workers and launcher, SIGTERM for torchrun, the end without
    a launcher. A copy of the stopped run is kept."""
    folder = place / "runs" / "e2e" / "killed_fsdp"
    chain = Chain(folder)
    launcher = ("torchrun", "--nproc-per-node=2", "-m", "toolkit")
    process = Process(
        [
            *(*launcher, "train", "my.json", "--name", "killed_fsdp"),
            "--train_module.dp_config={name: fsdp, param_dtype: float32}",
        ],
        cwd=place,
    )
    process.wait_until(has_steps(folder, 10, beyond=5))
    process.kill()

    process = Process([*launcher, "resume", folder], cwd=place)
    process.wait_until(records_of(folder, 2))
    process.send(signal.SIGTERM)
    chain.results["stopped"] = process.wait()
    chain.seen["stopped"] = (committed(folder), status(folder))
    newest = folder / "checkpoints" / f"step{committed(folder)[-1]}" / "train"
    chain.seen["rank files"] = sorted(path.name for path in newest.iterdir())
    shutil.copytree(folder, place / "runs" / "e2e" / "other_engine")

    chain.results["finished"] = run("toolkit", "resume", folder, cwd=place)
    return chain


def assert_equal_metrics(found: Path, expected: Path) -> None:
    for stream, names in (("train", SAVED_EXACTLY), ("eval", ("step", "loss", "num_targets"))):
        pair = [read_lines(folder / "metrics" / f"{stream}.jsonl") for folder in (found, expected)]
        mine, theirs = [[{n: r[n] for n in names} for r in records] for records in pair]
        assert mine == theirs
    for stream in ("network", "system"):
        steps = [r["step"] for r in read_lines(found / "metrics" / f"{stream}.jsonl")]
        assert steps == sorted(steps)
    network = [r["step"] for r in read_lines(found / "metrics" / "network.jsonl")]
    assert network == [1, 20, 40, 60]


def test_a_live_writer_keeps_others_out(killed: Chain) -> None:
    result = killed.results["second writer"]
    assert result.code == 2
    assert len(result.errors) == 1
    assert f"{killed.folder}: another process is writing this run (pid " in result.errors[0]
    assert "Traceback" not in result.output


def test_a_checkpoint_that_was_being_written_does_not_count(killed: Chain) -> None:
    unfinished = killed.seen["unfinished"]
    assert killed.seen["after the second kill"][-1] == unfinished - 10
    assert killed.seen["after the first kill"][-1] <= unfinished - 10
    assert not list((killed.folder / "checkpoints").glob("*.tmp"))


def test_sigterm_saves_and_says_resumable(killed: Chain) -> None:
    result = killed.results["stopped"]
    steps, seen = killed.seen["stopped"]
    assert result.code == 75, result.output
    assert (seen["state"], seen["exit_reason"]) == ("stopped", "SIGTERM")
    assert steps[-1] == seen["step"] < STEPS
    assert f"continue with: toolkit resume {killed.folder}" in result.output


def test_a_stop_with_nothing_saved_does_not_promise_a_resume(
    single: tuple[Path, Result], place: Path
) -> None:
    folder = place / "runs" / "e2e" / "unsaved"
    command = ["toolkit", "train", "my.json", "--name", folder.name, "--trainer.no_checkpoints"]
    process = Process([*command, "--trainer.max_duration.value=5000"], cwd=place)
    process.wait_until(lambda: count_lines(folder / "metrics" / "train.jsonl") > 0)
    process.send(signal.SIGTERM)
    result = process.wait()
    assert result.code == 1, result.output
    assert "no checkpoint was saved (trainer.no_checkpoints or" in result.output
    assert "toolkit resume" not in result.output
    seen = status(folder)
    assert (seen["state"], seen["exit_reason"]) == ("failed", "SIGTERM")


def test_a_killed_run_ends_like_an_undisturbed_one(
    killed: Chain, single: tuple[Path, Result]
) -> None:
    assert killed.results["finished"].code == 0, killed.results["finished"].output
    assert_equal_metrics(killed.folder, single[0])
    seen = status(killed.folder)
    assert (seen["state"], seen["attempt"], seen["step"]) == ("finished", 4, STEPS)
    attempts = [r["attempt"] for r in read_lines(killed.folder / "metrics" / "train.jsonl")]
    assert attempts == sorted(attempts)
    assert set(attempts) == {1, 3, 4}  # all that the second one did was done again


def test_tensorboard_of_a_killed_run_has_each_step_once(killed: Chain) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(killed.folder / "tb" / "train"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == list(range(1, STEPS + 1))
    assert [event.value for event in scalars] == pytest.approx(losses(killed.folder), rel=1e-6)


def test_the_weights_of_a_killed_run_are_bit_equal(
    killed: Chain, single: tuple[Path, Result]
) -> None:
    weights = [
        (folder / "checkpoints" / f"step{STEPS}" / "hf" / "model.safetensors").read_bytes()
        for folder in (killed.folder, single[0])
    ]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_once_for_all_ranks(killed_fsdp: Chain) -> None:
    steps, seen = killed_fsdp.seen["stopped"]
    assert seen["state"] == "stopped"
    assert steps[-1] == seen["step"] < STEPS
    assert killed_fsdp.seen["rank files"] == ["rank0.pt", "rank1.pt"]


def test_resume_without_a_launcher_is_its_own(killed_fsdp: Chain) -> None:
    result = killed_fsdp.results["finished"]
    assert result.code == 0, result.output
    assert "relaunching with 2 processes" in result.output
    seen = status(killed_fsdp.folder)
    assert (seen["engine"], seen["world_size"]) == ("fsdp", 2)


def test_a_killed_run_of_two_processes_ends_like_an_undisturbed_one(
    killed_fsdp: Chain, fsdp: Path
) -> None:
    assert_equal_metrics(killed_fsdp.folder, fsdp)
    assert sorted(p.name for p in (killed_fsdp.folder / "logs").iterdir()) == [
        "rank0.log",
        "rank1.log",
    ]


@pytest.mark.slow
def test_another_engine_continues_with_equal_losses(
    killed_fsdp: Chain, fsdp: Path, place: Path
) -> None:
    copy = place / "runs" / "e2e" / "other_engine"
    step = status(copy)["step"]
    before = losses(copy)
    config = Path("accelerate_configs") / "single.yaml"
    result = run(
        *("accelerate", "launch", "--config_file", Path(__file__).parents[2] / config),
        *("-m", "toolkit", "resume", copy),
        cwd=place,
    )
    assert result.code == 0, result.output
    seen = status(copy)
    assert (seen["engine"], seen["world_size"], seen["step"]) == ("single", 1, STEPS)
    after, expected = losses(copy), losses(fsdp)
    assert after[:step] == before == expected[:step]
    assert after[step : step + 10] == pytest.approx(expected[step : step + 10], rel=1e-5)
    assert after[step:] == pytest.approx(expected[step:], rel=1e-3)


def test_a_finished_run_is_not_trained_again(killed: Chain, place: Path) -> None:
    before = content(killed.folder / "metrics"), content(killed.folder / "checkpoints")
    result = run("toolkit", "resume", killed.folder, cwd=place)
    assert result.code == 0, result.output
    after = content(killed.folder / "metrics"), content(killed.folder / "checkpoints")
    for name in ("train.jsonl", "eval.jsonl", "network.jsonl"):
        assert after[0][name] == before[0][name]
    assert after[1] == before[1]
    assert status(killed.folder)["state"] == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_a_lone_launcher_leaves_a_resumable_run(
    number: signal.Signals, single: tuple[Path, Result], place: Path
) -> None:
    folder = place / "runs" / "e2e" / f"launcher_{number.name}"
    process = Process(
        [
            *("torchrun", "--nproc-per-node=2", "-m", "toolkit", "train", "my.json"),
            *("--name", folder.name, "--trainer.max_duration.value=5000"),
        ],
        cwd=place,
    )
    process.wait_until(has_steps(folder, 10, beyond=1))
    process.send(number)
    process.wait()
    process.wait_for(lambda: status(folder)["state"] == "stopped", 30)
    assert committed(folder)[-1] == status(folder)["step"]

"""`--to slurm` against a fake Slurm, which runs the script with Slurm's variables."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.commands.launch.fakes import fake_slurm, run, stub_python, wait_for, write_status
from toolkit.commands.launch.slurm import Slurm, _seconds
from toolkit.commands.launch.target import LaunchError

SMOKE = ("launch", "smoke", "--to", "slurm")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return fake_slurm(tmp_path, monkeypatch)


def state(slurm: Path, job: str = "100") -> str:
    return (slurm / "jobs" / job / "state").read_text()


def calls(place: Path) -> list[tuple[list[str], dict[str, str]]]:
    return [tuple(json.loads(line)) for line in (place / "calls").read_text().splitlines()]


def test_a_job_that_is_preempted_is_queued_again_and_resumed(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = str(stub_python(tmp_path))
    words = ("--nodes", "2", "--processes", "2", "--name", "a", "--python", python, "--debug")
    assert run(*SMOKE, *words, "--env", "A=b c", "--setup", "export B=$A$NOT_SET") == 0
    folder = tmp_path / "runs" / "smoke" / "a"
    assert f"slurm 100: {folder}\n" in capsys.readouterr().out
    wait_for(lambda: all((tmp_path / f"ready{node}").exists() for node in "01"))
    assert run("jobs", "status", "a") == 0
    assert "slurm 100 on 2 machines: running (RUNNING node[0-9])" in capsys.readouterr().out
    (slurm / "jobs" / "100" / "usr1").touch()
    wait_for(lambda: state(slurm) == "COMPLETED")
    started = calls(tmp_path)
    assert sorted(words[0] for words, _ in started) == ["resume", "resume", "train", "train"]
    for what, environ in started:
        first = ["resume", str(folder)]
        if what[0] == "train":
            config = str(folder / "metadata" / "launch_config.json")
            first = ["train", config, "--save-folder", str(folder)]
        port = next(word for word in what if word.startswith("localhost:"))
        flags = ["--processes", "2", "--nodes", "2", "--head", port, "--debug", "--node-rank"]
        assert what == [*first, *flags, environ["SLURM_NODEID"]]
        assert "SLURM_STEP_NUM_TASKS" not in environ  # a task is no rank
        assert (environ["A"], environ["B"]) == ("b c", "b c")
    assert run("jobs", "logs", "a", "--follow") == 0  # what a finished job's log says
    lines = sorted(capsys.readouterr().out.split("\n"))
    assert lines == ["", *["resume 0", "resume 1"], *["saved on SIGUSR1"] * 2, "train 0", "train 1"]
    assert run("jobs") == 0
    assert "smoke/a  slurm   100  finished" in capsys.readouterr().out


def test_a_start_without_a_new_checkpoint_is_the_last_one(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = str(stub_python(tmp_path))
    assert run(*SMOKE, "--name", "a", "--python", python, "--env", "SAVES=0") == 0
    wait_for((tmp_path / "ready0").exists)
    (slurm / "jobs" / "100" / "usr1").touch()
    wait_for(lambda: state(slurm) == "FAILED")
    assert len(calls(tmp_path)) == 1
    assert run("jobs", "logs", "a", "--follow") == 75
    assert "no new checkpoint since the start: not queued again" in capsys.readouterr().out


def test_a_requeue_that_slurm_refuses_is_told_as_that(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "no_requeue").touch()
    assert run(*SMOKE, "--name", "a", "--python", str(stub_python(tmp_path))) == 0
    wait_for((tmp_path / "ready0").exists)
    (slurm / "jobs" / "100" / "usr1").touch()
    wait_for(lambda: state(slurm) == "FAILED")
    capsys.readouterr()
    assert run("jobs", "logs", "a") == 0
    said = capsys.readouterr().out
    assert "operation is presently disabled" in said
    assert f"does not queue the job again; toolkit launch --save-folder {tmp_path}/runs" in said
    assert "no new checkpoint" not in said


def test_stop_saves_and_does_not_queue_again(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = str(stub_python(tmp_path))
    assert run(*SMOKE, "--name", "a", "--python", python) == 0
    wait_for((tmp_path / "ready0").exists)
    assert run("jobs", "stop", "a") == 0
    assert "slurm 100: asked to save a checkpoint and end" in capsys.readouterr().out
    wait_for(lambda: state(slurm) == "FAILED")
    assert (tmp_path / "runs/smoke/a/checkpoints/step10").is_dir()
    assert len(calls(tmp_path)) == 1
    assert run("jobs", "status", "a") == 0
    assert "stopped (FAILED, exit code 75" in capsys.readouterr().out
    # Nothing runs any more: the same run may be launched again, with what this command says.
    assert run(*SMOKE, "--save-folder", "runs/smoke/a", "--python", python) == 0
    wait_for(lambda: len(calls(tmp_path)) == 2)
    assert calls(tmp_path)[1][0][0] == "train"
    assert run("jobs", "stop", "a", "--now") == 0


def test_a_pending_job_is_cancelled_and_keeps_others_out(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "hold").touch()
    assert run(*SMOKE, "--save-folder", "a") == 0
    assert run(*SMOKE, "--save-folder", "a") == 2
    error = capsys.readouterr().err
    assert "has a job already, slurm 100 (pending); `toolkit jobs stop" in error
    assert not (slurm / "jobs" / "101").exists()
    assert run("jobs", "stop", "a") == 0
    wait_for(lambda: state(slurm).startswith("CANCELLED"))
    capsys.readouterr()
    assert run("jobs", "status", "a") == 0
    assert ": stopped (CANCELLED by 0" in capsys.readouterr().out


@pytest.mark.parametrize("leave_out", ["", "sacct"])
def test_without_accounts_the_run_says_how_it_ended(
    leave_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    slurm = fake_slurm(tmp_path, monkeypatch, leave_out=leave_out)
    for name in ("no_accounts", "hold"):
        (slurm / name).touch()
    folder = tmp_path / "runs" / "smoke" / "a"

    def ends_in_the_queue(job: str) -> None:
        assert run(*SMOKE, "--save-folder", str(folder)) == 0
        assert run("jobs", "stop", "a") == 0
        wait_for(lambda: state(slurm, job).startswith("CANCELLED"))

    ends_in_the_queue("100")
    assert run("jobs", "logs", "a", "--follow") == 1
    write_status(folder, "stopped", attempt=1)
    assert run("jobs", "logs", "a", "--follow") == 75
    write_status(folder, "finished", attempt=2)
    assert run("jobs", "logs", "a", "--follow") == 0
    write_status(folder, "running", attempt=3)
    assert run("jobs", "logs", "a", "--follow") == 1
    write_status(folder, "stopped", attempt=3)
    ends_in_the_queue("101")
    assert run("jobs", "logs", "a", "--follow") == 1  # that end was of the job before


def test_a_job_whose_state_is_not_known_keeps_others_out(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "hold").touch()
    assert run(*SMOKE, "--save-folder", "a") == 0
    monkeypatch.setattr("toolkit.commands.launch.slurm._STATES", {})
    assert run(*SMOKE, "--save-folder", "a") == 2
    assert "has a job already, slurm 100 (unknown)" in capsys.readouterr().err
    assert run("jobs", "stop", "a", "--now") == 0


@pytest.mark.parametrize("is_reached", [True, False])
def test_a_job_that_is_queued_without_an_answer_is_cancelled(
    is_reached: bool,
    slurm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (slurm / "hold").touch()
    assert run(*SMOKE, "--name", "other") == 0
    capsys.readouterr()
    if not is_reached:
        (tmp_path / "bin" / "squeue").unlink()
    call = subprocess.run

    def call_without_answer(words: Any, **options: Any) -> Any:
        done = call(words, **options)
        if words[0] == "sbatch":
            raise subprocess.TimeoutExpired(words, 60)
        return done

    monkeypatch.setattr(subprocess, "run", call_without_answer)
    assert run(*SMOKE, "--name", "a") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: sbatch: no answer for 60 s; is the scheduler up?; ")
    assert not (tmp_path / "runs/smoke/a").exists()
    if is_reached:
        assert error.endswith("; job 101, which it had queued, is cancelled\n")
        wait_for(lambda: state(slurm, "101").startswith("CANCELLED"))
        assert state(slurm, "100") == "PENDING"
    else:
        assert "if it queued the job all the same, `squeue --me` shows it" in error
        (slurm / "jobs" / "101" / "cancel").touch()
    (slurm / "jobs" / "100" / "cancel").touch()


def test_runs_of_an_array_meet_at_ports_of_their_own(slurm: Path, tmp_path: Path) -> None:
    words = ("--nodes", "2", "--name", "a", "--seeds", "1,2")
    assert run(*SMOKE, *words, "--python", str(stub_python(tmp_path))) == 0
    folders = [tmp_path / "runs" / "smoke" / f"a-{number}" for number in (1, 2)]
    logs = [folders[i] / "logs" / f"slurm-100_{i + 1}.log" for i in (0, 1)]
    wait_for(lambda: all(x.exists() and x.read_text().count("train ") == 2 for x in logs))
    heads: dict[str, set[str]] = {}
    for called, _ in calls(tmp_path):
        run_folder = called[called.index("--save-folder") + 1]
        heads.setdefault(run_folder, set()).add(called[called.index("--head") + 1])
    (first,), (second,) = (heads[str(folder)] for folder in folders)
    assert int(second.partition(":")[2]) == int(first.partition(":")[2]) + 1
    assert run("jobs", "stop", "a-1", "a-2", "--now") == 0


def test_what_is_refused_leaves_the_folders_of_others(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "logs" / "b" / "metadata"

    def refuse(self: Slurm, job: object) -> None:
        other.mkdir(parents=True)  # as a second launch does meanwhile
        raise LaunchError("no")

    monkeypatch.setattr(Slurm, "submit", refuse)
    assert run(*SMOKE, "--save-folder", "logs/a") == 2
    assert other.is_dir()
    assert not (tmp_path / "logs" / "a").exists()


def test_a_damaged_record_hides_no_other_job(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "hold").touch()
    for name in ("a", "b"):
        assert run(*SMOKE, "--name", name) == 0
    record = tmp_path / "runs/smoke/a/metadata/launch.json"
    whole = record.read_text()
    record.write_text("{")
    capsys.readouterr()
    assert run("jobs") == 0
    said = capsys.readouterr().out
    assert re.search(r"smoke/a +- +- +unknown", said)
    assert re.search(r"smoke/b +slurm +101 +pending", said)
    record.write_text(whole)
    assert run("jobs", "stop", "a", "b") == 0


def test_an_array_is_several_runs(slurm: Path, tmp_path: Path) -> None:
    (slurm / "hold").touch()
    array = ("--array=--seed=3", "--array=--seed=4 --train_module.optim.lr=0.5")
    assert run(*SMOKE, "--name", "a", *array) == 0
    found = []
    for number in (1, 2):
        folder = tmp_path / "runs" / "smoke" / f"a-{number}"
        config = json.loads((folder / "metadata" / "launch_config.json").read_text())
        record = json.loads((folder / "metadata" / "launch.json").read_text())
        found.append((config["seed"], config["train_module"]["optim"]["lr"], record["id"]))
        assert config["run"]["name"] == f"a-{number}"
    assert found == [(3, 0.01, "100_1"), (4, 0.5, "100_2")]
    assert (slurm / "jobs" / "100_2" / "state").exists()
    assert run("jobs", "stop", "a-1", "a-2") == 0


def test_what_is_submitted_is_what_the_dry_run_prints(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "hold").touch()
    options = (
        *("--nodes", "4", "--gpus", "2", "--partition", "gpu", "--account=me", "--qos", "high"),
        *("--time", "2-00:00:00", "--constraint", "a100&ib", "--exclusive", "--mem", "500G"),
        *("--launch.num_nodes=2", "--stop-before", "120", "--sbatch=--nice=3", "--no-requeue"),
        *("--data_loader.global_batch_size=2048", "--name", "it's 100%", "--engine", "fsdp"),
    )
    assert run(*SMOKE, *options, "--dry-run") == 0
    script = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    head = script.partition("# What")[0].splitlines()
    assert head == [
        "#!/bin/bash",
        *(
            f"#SBATCH {line}"
            for line in (
                *("--job-name=it-s-100", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2"),
                *("--mem=500G", "--partition=gpu", "--account=me", "--qos=high"),
                *("--time=2-00:00:00", "--constraint=a100&ib", "--exclusive", "--no-requeue"),
                "--signal=B:USR1@120",
                f'--output="{tmp_path}/runs/smoke/it\'s 100%%/logs/slurm-%j.log"',
                *("--open-mode=append", "--nice=3"),
            )
        ),
    ]
    assert "scontrol requeue" not in script
    assert "--processes 2 --engine fsdp --nodes 2" in script
    assert run(*SMOKE, *options) == 0
    assert (slurm / "jobs" / "100" / "script").read_text() == script
    assert run("jobs", "stop", "it's 100%") == 0


def test_what_slurm_refuses_leaves_nothing(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (slurm / "refuse").write_text("Invalid account or account/partition combination specified")
    assert run(*SMOKE, "--name", "a") == 2
    reason = "sbatch: Invalid account or account/partition combination specified"
    assert capsys.readouterr().err == f"error: {reason}\n"
    assert not (tmp_path / "runs").exists()


def test_a_config_that_is_refused_never_reaches_slurm(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SMOKE, "--nodes", "3", "--name", "a") == 2
    assert "x 3 ranks" in capsys.readouterr().err
    assert run(*SMOKE, "--array=--seed=1", "--array=--trainer.max_duratoin.value=3") == 2
    assert "did you mean 'max_duration'?" in capsys.readouterr().err
    assert not (slurm / "jobs").exists()
    assert not (tmp_path / "runs").exists()


def test_without_slurm_it_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_slurm(tmp_path, monkeypatch, leave_out="sbatch")
    assert run(*SMOKE, "--name", "a") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no `sbatch` on this machine, so there is no Slurm here;")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("90", 5400), ("90:30", 5430), ("1:00:00", 3600), ("2-12", 216_000)),
        *(("1-02:30", 95_400), ("1-00:00:01", 86_401), ("UNLIMITED", None), ("1:2:3:4", None)),
    ],
)
def test_time_limits_as_slurm_writes_them(text: str, seconds: int | None) -> None:
    assert _seconds(text) == seconds


def preempt(job: Path, metrics: Path, restarts: int) -> None:
    """Warn the script once some steps more are done, and wait for its end."""
    before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > before + 5, 100)
    (job / "usr1").touch()
    ended = job / "restarts"
    wait_for(lambda: ended.exists() and ended.read_text() == str(restarts), 100)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_on_two_nodes_that_is_preempted_ends_bit_equal(
    slurm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Real training: the batch script, `toolkit` on each node, USR1, requeue, `toolkit resume`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    two = ("--nodes", "2", "--trainer.max_duration={value: 150, unit: steps}")
    assert run(*SMOKE, *two, "--name", "whole") == 0
    wait_for(lambda: state(slurm, "100") in ("COMPLETED", "FAILED"), 200)
    assert run(*SMOKE, *two, "--name", "preempted") == 0
    metrics = tmp_path / "runs/smoke/preempted/metrics/train.jsonl"
    for restarts in (1, 2):
        preempt(slurm / "jobs" / "101", metrics, restarts)
    wait_for(lambda: state(slurm, "101") in ("COMPLETED", "FAILED"), 200)
    assert run("jobs", "logs", "preempted", "--follow") == 0, capsys.readouterr().out
    assert (slurm / "jobs" / "101" / "restarts").read_text() == "3"
    ends = [tmp_path / "runs" / "smoke" / name for name in ("whole", "preempted")]
    lines = [
        [json.loads(line) for line in (end / "metrics" / "train.jsonl").read_text().splitlines()]
        for end in ends
    ]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert len(lines[0]) == 150
    for part in ("hf/model.safetensors", "model_and_optim/__0_0.distcp"):
        whole, other = ((end / "checkpoints" / "step150" / part).read_bytes() for end in ends)
        assert whole == other, part

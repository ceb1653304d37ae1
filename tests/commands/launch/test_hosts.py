"""`--to local`, and `--to ssh` with a fake `ssh` that runs everything here."""

import contextlib
import json
import os
import shutil
import signal
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.commands.launch.fakes import (
    fake_ssh,
    run,
    stub_python,
    wait_for,
    write_program,
    write_status,
)
from toolkit.commands.launch import local
from toolkit.commands.launch.hosts import (
    Host,
    Process,
    ask_to_end,
    is_running,
    start_script,
    started,
)
from toolkit.commands.launch.target import LaunchError
from toolkit.experiment.load import load_experiment
from toolkit.launch.capacity import Capacity

SSH = ("launch", "smoke", "--to", "ssh", "--save-folder", "a")
HERE = Host("")


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("toolkit.commands.launch.on_hosts.SECONDS_TO_FAIL", 0.0)
    fake_ssh(tmp_path, monkeypatch)
    return str(stub_python(tmp_path))


def test_each_machine_gets_its_command_and_all_are_stopped(
    python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = ("--hosts", "me@one,two", "--gpus", "2", "--python", python, "--env", "A=b c")
    assert run(*SSH, *hosts) == 0
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in "01"))
    capsys.readouterr()
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    folder = str(tmp_path / "a")
    for words, environ in calls:
        rank = ["one", "two"].index(environ["FAKE_HOST"])
        port = words[words.index("--head") + 1]
        assert port.startswith("one:")
        config = f"{folder}/metadata/launch_config.json"
        flags = ["--processes", "2", "--nodes", "2", "--head", port, "--node-rank", str(rank)]
        assert words == ["train", config, "--save-folder", folder, *flags]
        assert environ["A"] == "b c"
    assert run("jobs", "status", "a") == 0
    assert "on 2 machines: running (on one, two)" in capsys.readouterr().out
    assert run("jobs", "stop", "a") == 0
    assert run("jobs", "logs", "a", "--follow") == 1
    said = capsys.readouterr().out
    for rank, host in enumerate(("one", "two")):
        assert f"launch-{rank}-{host}.log: train {rank}\n" in said
        assert f"launch-{rank}-{host}.log: saved on SIGTERM\n" in said
    assert run("jobs", "status", "a") == 0
    assert "failed (the processes are gone)" in capsys.readouterr().out  # the stub has no status


@pytest.mark.parametrize(
    ("hosts", "line"),
    [
        ("one,down", "down: ssh: connect to host down port 22: No route; try `ssh down true`"),
        ("one,private", "private: does not see {folder} of this machine; choose a --save-folder"),
        (
            "one,other",
            "one has toolkit 0.1.0 and torch 2.0, other has toolkit 0.1.0 and torch 3.0; install "
            "the same on all",
        ),
    ],
)
def test_machines_that_do_not_fit_are_told_before_anything_starts(
    hosts: str, line: str, python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SSH, "--hosts", hosts, "--python", python) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line.format(folder=tmp_path / 'a')}")
    assert error.count("\n") == 1
    assert not (tmp_path / "calls").exists()
    assert not (tmp_path / "a").exists()


@pytest.fixture
def patience(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that fails is seen at once, however long it may take to fail."""
    monkeypatch.setattr("toolkit.commands.launch.on_hosts.SECONDS_TO_FAIL", 100.0)


@pytest.mark.usefixtures("patience")
def test_one_machine_that_fails_withdraws_the_others(
    python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SSH, "--hosts", "one,bad", "--python", python) == 2
    log = tmp_path / "a" / "logs" / "launch-1-bad.log"
    assert capsys.readouterr().err == f"error: bad: this machine has no GPU (from {log})\n"
    other = log.parent / "launch-0-one.log"
    wait_for(lambda: "saved on SIGTERM" in other.read_text())
    assert list(tmp_path.glob("a/metadata/launch*")) == []


@pytest.mark.parametrize(
    ("host", "more"),
    [("mute", ""), ("gone", "; what was started on gone cannot be ended from here: see there")],
)
def test_a_start_whose_answer_is_lost_is_ended_or_told(
    host: str, more: str, python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = []

    def ask(host: Host, process: Process, *, now: bool) -> bool:
        asked.append((host.label, process))
        return ask_to_end(host, process, now=now)

    monkeypatch.setattr("toolkit.commands.launch.on_hosts.ask_to_end", ask)
    try:
        assert run(*SSH, "--hosts", f"one,{host}", "--python", python) == 2
        error = capsys.readouterr().err
        assert error == f"error: {host}: ssh: exit code 255; try `ssh {host} true`{more}\n"
        assert [label for label, _ in asked] == ["one", host]
        assert list(tmp_path.glob("a/metadata/launch*")) == []
        wait_for(lambda: is_running(HERE, asked[1][1]) == (host == "gone"))
    finally:
        for _, process in asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def test_a_local_run_goes_on_alone_until_it_is_stopped(
    python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("launch", "smoke", "--to", "local", "--name", "a", "--python", python) == 0
    wait_for((tmp_path / "ready0").exists)
    capsys.readouterr()
    assert run("jobs") == 0
    assert "@local  running" in capsys.readouterr().out
    assert run("launch", "smoke", "--to=local", "--save-folder=runs/smoke/a") == 2
    assert "has a job already" in capsys.readouterr().err
    write_status(tmp_path / "runs/smoke/a", "finished")
    assert run("jobs", "status", "smoke/a") == 0
    assert "(on local; its run has finished, the rest ends soon)" in capsys.readouterr().out
    assert run("jobs", "stop", "smoke/a") == 0
    assert "its run has finished, there is nobody to ask (--now" in capsys.readouterr().out
    assert run("jobs", "stop", "smoke/a", "--now") == 0
    log = tmp_path / "runs/smoke/a/logs/launch-0-local.log"
    wait_for(lambda: "saved on SIGTERM" in log.read_text())
    assert not (tmp_path / "connections").exists()


def test_values_are_from_where_they_were_when_it_was_launched(
    python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is refused may depend on it: a recipe's warm-up may be longer than a trial run."""
    short = ("smoke", "--trainer.max_duration={value: 3, unit: steps}", "--seed=4")
    assert run("launch", *short, "--to", "local", "--name", "a", "--python", python) == 0
    config = str(tmp_path / "runs/smoke/a/metadata/launch_config.json")
    now = load_experiment(config, shorthands={"save_folder": str(tmp_path / "b")})
    before = load_experiment("smoke", short[1:], {"name": "a", "save_folder": str(tmp_path / "b")})
    assert now.config == before.config
    differing = {p: o for p, o in now.origins.items() if before.origins[p] != o}
    assert differing == {"run.name": "default"} or differing == {}
    assert now.origins["seed"] == "--seed=4"
    assert run("jobs", "stop", "a") == 0
    Path(config).write_text('{"$origins": 3}')
    assert run("train", config, "--dry-run") == 2
    assert "$origins: Expected `object`, got `int`" in capsys.readouterr().err


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("", "this machine has no GPU"),
        ("exit 3", "exit status 3 before the run began"),
        ("exec false", "it ended at once, without a word"),
        ("echo some; exit 3", "exit status 3 before the run began (from {log})"),
    ],
)
def test_a_local_run_that_ends_at_once_says_why_and_leaves_what_it_names(
    setup: str, message: str, python: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("FAKE_HOST", "bad")
    words = ("launch", "smoke", "--to", "local", "--name", "a", "--python", python)
    assert run(*words, *(("--setup", setup) if setup else ())) == 2
    log = tmp_path / "runs/smoke/a/logs/launch-0-local.log"
    assert capsys.readouterr().err == f"error: local: {message.format(log=log)}\n"
    assert (tmp_path / "runs").exists() == log.exists() == ("{log}" in message)


@pytest.mark.parametrize(("gpus", "has"), [(0, "no GPU"), (1, "1 GPU")])
def test_more_gpus_than_this_machine_has_are_refused_before_anything_starts(
    gpus: int, has: str, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(local, "capacity_here", lambda environ: Capacity(4, "", gpus))
    words = ("launch", "smoke", "--to", "local", "--name", "a", "--python", python)
    assert run(*words, "--gpus", "2") == 2
    assert f"--gpus: this machine has {has} to use, not 2; processes" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "calls").exists()


def test_without_ssh_it_is_one_line(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin" / "ssh").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert run(*SSH, "--hosts", "one,two", "--python", python) == 2
    assert capsys.readouterr().err == "error: one: no `ssh` on this machine\n"


def test_lines_of_setup_may_use_what_is_not_set(python: str, tmp_path: Path) -> None:
    """As `source ~/.bashrc` and `conda activate` do."""
    setup = ("--setup", "export SEEN=x$PS1_OF_NOBODY")
    assert run("launch", "smoke", "--to=local", "--name=a", "--python", python, *setup) == 0
    wait_for((tmp_path / "ready0").exists)
    assert json.loads((tmp_path / "calls").read_text())[1]["SEEN"] == "x"
    assert run("jobs", "stop", "a", "--now") == 0


def test_a_machine_that_is_down_keeps_no_other_from_its_order(
    python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SSH, "--hosts", "mine,one", "--python", python) == 0
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in "01"))
    record = tmp_path / "a" / "metadata" / "launch.json"
    record.write_text(record.read_text().replace("mine,one", "down,one"))
    capsys.readouterr()
    down = "down: ssh: connect to host down port 22: No route; try `ssh down true`"
    assert run("jobs", "status", "a") == 0
    assert f"running (on one; {down})" in capsys.readouterr().out
    assert run("jobs", "stop", "a") == 2
    done = "asked to save a checkpoint and end on one"
    assert capsys.readouterr().err == f"error: {down}; {done}\n"
    record.write_text(record.read_text().replace("down,one", "mine,one"))

    def is_told(verb: str, words: str) -> bool:
        return run("jobs", verb, "a") == 0 and words in capsys.readouterr().out

    wait_for(lambda: is_told("status", "running (on mine; 1 ended)"))
    assert is_told("stop", "asked to save a checkpoint and end on mine\n")
    wait_for(lambda: is_told("status", "the processes are gone"))
    assert is_told("stop", ": ended before\n")


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Process:
    """A process on a machine like a Mac: no `setsid`, and a `ps` that takes a name in each `-o`."""
    (tmp_path / "mac").mkdir()
    for name in ("bash", "cat", "kill", "nohup", "sleep", "tee"):
        if (found := shutil.which(name)) is not None:
            (tmp_path / "mac" / name).symlink_to(found)
    ps = '#!/bin/bash\n[[ "$*" != *=,* ]] || exit 1\nexec {} "$@"\n'
    write_program(tmp_path / "mac" / "ps", ps.format(shutil.which("ps")))
    monkeypatch.setenv("PATH", str(tmp_path / "mac"))
    note = tmp_path / "note"
    note.touch()
    said = HERE.run(start_script("sleep 100", f"{tmp_path}/log", str(note)))
    assert note.read_text() == said
    return started(said)


def test_a_clock_that_was_set_and_a_system_without_setsid(sleeper: Process) -> None:
    began = datetime.strptime(sleeper.began, "%a %b %d %H:%M:%S %Y")
    for seconds, expected in ((-1, True), (1, True), (9, False)):
        then = (began + timedelta(seconds=seconds)).strftime("%a %b %-d %H:%M:%S %Y")
        assert is_running(HERE, sleeper._replace(began=then)) == expected
    assert ask_to_end(HERE, sleeper, now=True)
    assert not ask_to_end(HERE, sleeper, now=True)


def test_who_comes_after_it_was_withdrawn_starts_nothing(tmp_path: Path) -> None:
    script = start_script(f"touch {tmp_path}/begun", f"{tmp_path}/log", f"{tmp_path}/note")
    with pytest.raises(LaunchError, match="too late: withdrawn"):
        HERE.run(script)
    assert os.listdir(tmp_path) == []

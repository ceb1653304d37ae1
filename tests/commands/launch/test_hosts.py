"""`--to local`, and `--to ssh` with a fake `ssh` that runs everything here."""

import json
from pathlib import Path

import pytest

from tests.commands.launch.fakes import fake_ssh, run, stub_python, wait_for
from toolkit.experiment.load import load_experiment

SSH = ("launch", "smoke", "--to", "ssh", "--save-folder", "a")


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("toolkit.commands.launch.on_hosts.SECONDS_TO_FAIL", 0.4)
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


def test_one_machine_that_fails_withdraws_the_others(
    python: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SSH, "--hosts", "one,bad", "--python", python) == 2
    log = tmp_path / "a" / "logs" / "launch-1-bad.log"
    assert capsys.readouterr().err == f"error: bad: this machine has no GPU (from {log})\n"
    assert "saved on SIGTERM" in (log.parent / "launch-0-one.log").read_text()
    assert not (tmp_path / "a" / "metadata" / "launch.json").exists()


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
    assert run("jobs", "stop", "smoke/a", "--now") == 0
    assert "saved on SIGTERM" in (tmp_path / "runs/smoke/a/logs/launch-0-local.log").read_text()
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


def test_a_local_run_that_ends_at_once_says_why(
    python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_HOST", "bad")
    assert run("launch", "smoke", "--to", "local", "--name", "a", "--python", python) == 2
    assert capsys.readouterr().err.startswith("error: local: this machine has no GPU (from ")


def test_without_ssh_it_is_one_line(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin" / "ssh").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert run(*SSH, "--hosts", "one,two", "--python", python) == 2
    assert capsys.readouterr().err == "error: one: no `ssh` on this machine\n"

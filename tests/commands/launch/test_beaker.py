"""`--to beaker`: its client stands in at its class, and without beaker-py its other classes too."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.commands.launch import fake_beaker
from tests.commands.launch.fakes import run, write_status

try:
    import beaker
except ImportError:
    beaker = fake_beaker.module()

WEKA = ("--weka", "training", "--save-folder", "/weka/training/first", "--image", "me/toolkit")
SMOKE = ("launch", "smoke", "--to", "beaker", *WEKA)


class Client:
    """As much of `beaker.Beaker` as is used: one workload, whose jobs are given."""

    def __init__(self) -> None:
        self.created: list[Any] = []
        self.cancelled: list[Any] = []
        self.jobs = [("j1", [b"step 1\n", b"step 2\n"], 0)]
        self.status = beaker.BeakerWorkloadStatus.succeeded
        self.error: BaseException | None = None
        self.is_made_all_the_same = False
        self.there = [("01OLD", "first"), ("01OTHER", "first-2")]
        """(id, name) of one's own experiments in the workspace."""
        self.experiment = self.workload = self.job = self
        self.user = SimpleNamespace(get=lambda: "me")
        self.workspace = SimpleNamespace(get=lambda: "ai2/mine")
        self.is_deaf = self.is_deaf_afterwards = False
        self.options: dict[str, Any] = {}
        self.is_interrupted = False
        self._seen = 0

    def create(self, *, spec: Any, name: str) -> Any:
        self.created.append((name, spec))
        if self.error is None or self.is_made_all_the_same:
            self.there.append(("01EX", name))
        if self.error is not None:
            self.is_deaf = self.is_deaf_afterwards
            raise self.error
        return self._workload(name)

    def _workload(self, name: str) -> Any:
        return SimpleNamespace(
            experiment=SimpleNamespace(id="01EX", name=name), status=self.status.value
        )

    def get(self, identity: str) -> Any:
        assert identity == "01EX"
        return self._workload("first")

    def list(
        self, *, author: str, workspace: str, created_after: datetime, name_or_description: str
    ) -> Iterator[Any]:
        assert (author, workspace) == ("me", "ai2/mine")
        assert created_after < datetime.now(UTC)
        if self.is_deaf:
            raise beaker.exceptions.RequestException("no route")
        for identity, name in self.there:
            if name_or_description in name:
                yield SimpleNamespace(experiment=SimpleNamespace(id=identity, name=name))

    def cancel(self, workload: Any) -> None:
        self.cancelled.append(workload.experiment.id)

    def url(self, workload: Any) -> str:
        return f"https://beaker.org/ex/{workload.experiment.id}"

    def get_latest_job(self, workload: Any) -> Any:
        name, lines, code = self.jobs[min(self._seen, len(self.jobs) - 1)]
        self._seen += 1
        status = SimpleNamespace(exit_code=code, HasField=lambda field: field == "exit_code")
        return SimpleNamespace(id=name, lines=lines, status=status)

    def logs(self, job: Any, *, follow: bool) -> Iterator[Any]:
        yield from (SimpleNamespace(message=line) for line in job.lines)
        if self.is_interrupted:
            raise KeyboardInterrupt


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    found = Client()

    @contextlib.contextmanager
    def from_env(check_for_upgrades: bool, **options: Any) -> Iterator[Client]:
        assert not check_for_upgrades
        found.options = options
        yield found

    monkeypatch.setitem(sys.modules, "beaker", beaker)
    monkeypatch.setitem(sys.modules, "beaker.exceptions", beaker.exceptions)
    monkeypatch.setattr(beaker.Beaker, "from_env", from_env)
    monkeypatch.chdir(tmp_path)
    return found


def test_the_link_is_printed_and_the_log_followed_until_the_end(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SMOKE, "--workspace", "ai2/mine") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("beaker 01EX: ")
    assert first.endswith("  https://beaker.org/ex/01EX")
    assert lines == ["step 1", "step 2"]
    assert client.options == {"default_workspace": "ai2/mine"}
    assert run("jobs", "status", "first") == 0
    assert "beaker 01EX: finished (succeeded, exit code 0)" in capsys.readouterr().out


def test_a_run_that_fails_is_the_exit_code_and_detach_does_not_wait(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    client.status = beaker.BeakerWorkloadStatus.failed
    assert run(*SMOKE) == 1
    client.status = beaker.BeakerWorkloadStatus.canceled
    assert run("jobs", "logs", "first", "--follow") == 75
    capsys.readouterr()
    assert run(*SMOKE, "--detach") == 0
    assert "step 1" not in capsys.readouterr().out


def test_ctrl_c_leaves_the_job_alone(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.is_interrupted = True
    assert run(*SMOKE) == 130
    assert "the job goes on; `toolkit jobs stop" in capsys.readouterr().err
    assert client.cancelled == []


def test_a_preempted_run_is_followed_into_its_next_job(
    client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("toolkit.commands.launch.beaker._SECONDS", 0.0)
    client.jobs = [("j1", [b"step 1"], 75), ("j1", [], 75), ("j2", [b"step 2"], 0)]
    running, done = beaker.BeakerWorkloadStatus.running, beaker.BeakerWorkloadStatus.succeeded
    statuses = iter([running] * 4)
    monkeypatch.setattr(
        client,
        "_workload",
        lambda name: SimpleNamespace(
            experiment=SimpleNamespace(id="01EX", name=name), status=next(statuses, done).value
        ),
    )
    assert run(*SMOKE) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["step 1", "step 2"]


def test_what_is_made_is_what_the_dry_run_prints(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        *("--launch.num_nodes=2", "--gpus", "8", "--budget", "ai2/oe", "--cluster=ai2/jupiter"),
        *("--cluster", "ai2/ceres", "--priority", "high", "--not-preemptible", "--retries", "2"),
        *("--secret", "HF_TOKEN", "--secret", "WANDB_API_KEY=MY_KEY", "--weka", "eval:/eval"),
        *("--data_loader.global_batch_size=8192", "--description=a test"),
    )
    assert run(*SMOKE, *options, "--dry-run", "--debug") == 0
    assert client.created == []
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert run(*SMOKE, *options, "--detach", "--debug") == 0
    ((name, spec),) = client.created
    assert name == "first"
    # The library says the same of what it was given, with its own defaults.
    sent = spec.to_json()
    defaults = {"hostNetworking": False, "leaderSelection": False}
    printed["tasks"] = [{**defaults, **printed["tasks"][0]}]
    assert sent == printed

    (task,) = printed["tasks"]
    assert task["image"] == {"beaker": "me/toolkit"}
    assert task["context"] == {"priority": "high", "preemptible": False}
    assert task["constraints"] == {"cluster": ["ai2/jupiter", "ai2/ceres"]}
    assert task["resources"] == {"sharedMemory": "10GiB", "gpuCount": 8}
    assert task["envVars"] == [
        {"name": "HF_TOKEN", "secret": "HF_TOKEN"},
        {"name": "WANDB_API_KEY", "secret": "MY_KEY"},
    ]
    assert [mount["mountPath"] for mount in task["datasets"]] == ["/weka/training", "/eval"]
    assert (task["replicas"], task["leaderSelection"], task["hostNetworking"]) == (2, True, True)
    assert (printed["budget"], printed["retry"]) == ("ai2/oe", {"allowedTaskRetries": 2})
    last = task["arguments"][0].splitlines()[-1]
    assert last.startswith(
        "exec python -m toolkit train /tmp/toolkit-config.json --save-folder /weka/training/first "
        '--processes 8 --nodes 2 --head "$BEAKER_LEADER_REPLICA_HOSTNAME":'
    )
    assert last.endswith(' --node-rank "$BEAKER_REPLICA_RANK" --debug')


REFUSED = beaker.exceptions.BeakerPermissionsError("no rights in ai2/other")
NOT_FOUND = beaker.exceptions.BeakerWorkloadNotFound("01EX")
LOST = beaker.exceptions.BeakerServerUnavailableError("connection lost")


@pytest.mark.parametrize(
    ("error", "is_made", "line"),
    [
        (
            beaker.exceptions.BeakerExperimentConflict("first"),
            False,
            "beaker: an experiment 'first' exists; choose another --name",
        ),
        (REFUSED, False, "beaker: BeakerPermissionsError: no rights in ai2/other"),
        (LOST, False, "beaker: BeakerServerUnavailableError: connection lost"),
        (LOST, True, "beaker: BeakerServerUnavailableError: connection lost"),
        (NOT_FOUND, True, "beaker: BeakerWorkloadNotFound: 01EX"),
        (
            beaker.exceptions.RequestException("read timed out"),
            True,
            "beaker: does not answer: read timed out",
        ),
    ],
)
def test_what_beaker_refuses_is_one_line_and_leaves_nothing(
    error: Exception,
    is_made: bool,
    line: str,
    client: Client,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Experiments of the same name that were there before are let alone."""
    client.error, client.is_made_all_the_same = error, is_made
    assert run(*SMOKE) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert client.cancelled == (["01EX"] if is_made else [])
    assert not (tmp_path / "runs").exists()


def test_a_refusal_cancels_nothing_even_where_another_terminal_was_faster(client: Client) -> None:
    client.error, client.is_made_all_the_same = REFUSED, True
    assert run(*SMOKE) == 2
    assert client.cancelled == []


def test_what_cannot_be_looked_for_is_told(
    client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    client.error, client.is_deaf_afterwards = LOST, True
    assert run(*SMOKE) == 2
    error = capsys.readouterr().err
    assert "beaker: no route; an experiment 'first' may have been made all the same" in error


def test_a_job_without_a_link_is_kept(
    client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(client, "url", lambda workload: 1 / 0)
    assert run(*SMOKE, "--detach") == 0
    assert (tmp_path / "runs/smoke/first/metadata/launch.json").is_file()
    assert client.cancelled == []


def test_a_run_of_this_machine_is_not_taken_for_the_jobs(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_status(tmp_path / "runs/smoke/first", "finished")
    assert run(*SMOKE) == 2
    assert "first: is a run of this machine; choose another --name" in capsys.readouterr().err
    assert client.created == []


def test_stop_cancels(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMOKE, "--detach") == 0
    assert run("jobs", "stop", "first") == 0
    assert client.cancelled == ["01EX"]


def git(*words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_code_of_a_repository_is_a_commit_that_others_can_fetch(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refused() -> str:
        assert run(*SMOKE, "--git", "--dry-run") == 2
        return capsys.readouterr().err

    assert refused() == "error: --git: this folder is in no git repository\n"
    git("init", "-q", "--bare", str(tmp_path / "remote"))
    git("clone", "-q", str(tmp_path / "remote"), str(tmp_path / "work"))
    monkeypatch.chdir(tmp_path / "work")
    Path("own.py").write_text("a = 1\n")
    git("add", "own.py")
    git("commit", "-qm", "own")
    assert "no remote has the commit" in refused()
    git("push", "-q", "origin", "HEAD")
    assert f"origin is {tmp_path}/remote, which no container reaches; push to a" in refused()
    git("remote", "set-url", "origin", "ssh://git@example.com:2222/me/own code.git")
    assert run(*SMOKE, "--git", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    found = [line.strip() for line in lines if "git " in line or line.strip().startswith("pip ")]
    assert found == [
        "git clone --quiet 'https://example.com/me/own code.git' /tmp/code",
        f"git checkout --quiet {git('rev-parse', 'HEAD')}",
        "pip install --no-deps -e .",
    ]
    Path("own.py").write_text("a = 2\n")
    assert "has uncommitted changes, which would not run" in refused()
    assert run(*SMOKE, "--git", "--allow-dirty", "--dry-run") == 0

"""A sender against a service that is down, slow to answer, or cut off in the middle."""

import pytest

from tests.train.trackers._runs import open_run, write_steps
from toolkit.config.secrets import mask_secrets
from toolkit.errors import ConfigError
from toolkit.metrics.streams import MetricStreams
from toolkit.train.callbacks.config import CallbacksConfig
from toolkit.train.progress import set_run_aside
from toolkit.train.trackers import sender as sender_module
from toolkit.train.trackers.config import (
    TRACKERS,
    ClearMLConfig,
    CometConfig,
    SwanLabConfig,
    TrackioConfig,
    WandBConfig,
    check_trackers,
)
from toolkit.train.trackers.sender import End, Sender
from toolkit.train.trackers.service import Opened, Service


class Remote:
    """What a service holds, and what goes wrong with it next."""

    def __init__(self):
        self.runs, self.rows, self.facts, self.outcomes, self.again = [], [], {}, [], []
        self.fail_open = self.fail_send = 0
        self.last_step = None

    def __call__(self, config, run, tell):
        remote = self

        class Fake(Service):
            def open(self, run_id):
                if remote.fail_open:
                    remote.fail_open -= 1
                    raise OSError("no route to host; token=hf_abcdefghijklmnopqrst")
                remote.runs.append(run_id)
                return Opened(
                    run_id or f"id-{self.run.key[:4]}", remote.last_step, "http://me:secret@host"
                )

            def describe(self, facts):
                remote.facts |= facts

            def send(self, rows, *, again):
                remote.again.append(again)
                for row in rows:
                    if remote.fail_send == 1:
                        remote.fail_send = 0
                        raise TimeoutError
                    remote.fail_send -= remote.fail_send > 0
                    remote.rows.append(row)

            def finish(self, outcome):
                remote.outcomes.append(outcome)

        return Fake(config, run, tell)

    @property
    def steps(self):
        return [row.step for row in self.rows]


@pytest.fixture
def remote(monkeypatch):
    remote = Remote()
    monkeypatch.setattr(sender_module, "open_service", remote)
    return remote


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "exp" / "first"


def sender_of(folder, attempt=1, warnings=None):
    config = WandBConfig(enabled=True, send_interval=0.01)
    say = (warnings if warnings is not None else []).append
    return Sender(folder, config, attempt=attempt, warn=say, tell=say)


def test_what_a_library_says_is_told_without_secrets(folder, remote):
    with open_run(folder), MetricStreams(folder, tensorboard=()) as streams:
        write_steps(streams, 1, 2)
    warnings = []
    made = sender_of(folder, warnings=warnings)
    made.path.parent.mkdir(exist_ok=True)
    session = made._open()
    session.service.tell("a sample is not stored: at s3://key:secret12@store/x?signature=secret45")
    assert warnings[-1] == "a sample is not stored: at s3://key:***@store/x?signature=***"


def run_sender(folder, outcome="finished", **options):
    end = End()
    end.come(outcome)
    return sender_of(folder, **options).run(end)


def test_every_step_once_over_a_crash_and_a_resume(folder, remote):
    with open_run(folder), MetricStreams(folder, tensorboard=()) as streams:
        write_steps(streams, 1, 12)
    assert run_sender(folder, "killed")
    assert remote.steps == list(range(1, 12))  # the last may not be complete
    assert remote.facts["model"] == {"d_model": 8}
    assert {"git", "environment", "command", "seed"} <= remote.facts.keys()
    with (
        open_run(folder, resume=True),
        MetricStreams(folder, tensorboard=(), resume_step=6) as streams,
    ):
        write_steps(streams, 7, 20, offset=100.0)
    assert run_sender(folder, attempt=2)
    assert remote.steps == list(range(1, 21))
    assert [row.values["train/loss"] for row in remote.rows][10:13] == [11.0, 112.0, 113.0]
    assert [row.step for row in remote.rows if "val/loss" in row.values] == [4, 8, 12, 16, 20]
    assert remote.runs[0] is None
    assert remote.runs[1].startswith("id-")
    assert remote.outcomes == ["killed", "finished"]
    assert '"http://me:***@host"' in (folder / "trackers" / "wandb.json").read_text()
    run_sender(folder, attempt=None)
    assert remote.steps == list(range(1, 21))


def test_steps_that_all_were_sent_are_not_said_to_be_missing(folder, remote):
    with open_run(folder), MetricStreams(folder, tensorboard=()) as streams:
        write_steps(streams, 1, 12)
    assert sender_of(folder).behind_message().startswith("W&B: 12 steps not sent; ")
    assert run_sender(folder)
    assert "every step is sent, but it took longer than flush" in sender_of(folder).behind_message()


@pytest.mark.parametrize(("says", "then"), [(None, range(1, 13)), (4, range(5, 13))])
def test_a_call_that_was_cut_off_is_made_again_from_what_is_there(folder, remote, says, then):
    with open_run(folder), MetricStreams(folder, tensorboard=()) as streams:
        write_steps(streams, 1, 12)
    remote.fail_send = 5
    assert not run_sender(folder)
    assert remote.steps == [1, 2, 3, 4]
    remote.rows.clear()
    remote.last_step = says
    assert run_sender(folder)
    assert remote.steps == list(then)
    assert remote.again == [False, says is None]


def test_what_a_library_lost_with_its_process_is_sent_again(folder, remote):
    with open_run(folder), MetricStreams(folder, tensorboard=()) as streams:
        write_steps(streams, 1, 12)
    run_sender(folder)
    remote.last_step = 8
    run_sender(folder)
    assert remote.steps == [*range(1, 13), *range(9, 13)]


def test_a_service_that_is_down_is_one_warning_and_gets_all_later(folder, remote):
    with open_run(folder), MetricStreams(folder, tensorboard=()) as streams:
        write_steps(streams, 1, 12)
    remote.fail_open, warnings = 3, []
    sender, end = sender_of(folder, warnings=warnings), End()
    calls = []

    def send(outcome):
        calls.append(outcome)
        if len(calls) == 4:
            end.come("finished")
        return Sender.send(sender, outcome)

    sender.send = send
    assert sender.run(end)
    assert remote.steps == list(range(1, 13))
    assert warnings == [
        "W&B: OSError: no route to host; token=***; training goes on",
        "W&B: http://me:***@host",
    ]
    remote.fail_open = 9
    assert not run_sender(folder)


def test_a_later_attempt_is_not_disturbed(folder, remote):
    with open_run(folder), MetricStreams(folder, tensorboard=()) as streams:
        write_steps(streams, 1, 12)
    with open_run(folder, resume=True):
        assert run_sender(folder, attempt=1)
    assert (remote.rows, remote.outcomes) == ([], [])
    set_run_aside(folder, 2)
    assert (folder / "trackers.attempt1" / "wandb.json").exists()


def test_valid_whatever_is_installed_and_never_needed_when_off(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(CallbacksConfig())
    with pytest.raises(ConfigError) as caught:
        check_trackers(
            CallbacksConfig(wandb=WandBConfig(enabled=True), comet=CometConfig(enabled=True))
        )
    assert [str(e) for e in caught.value.errors] == [
        f"trainer.callbacks.{name}: needs the library {module}: "
        f'pip install "toolkit[{name}]"; --trainer.callbacks.{name}.enabled=false trains without it'
        for name, module in (("wandb", "wandb"), ("comet", "comet_ml"))
    ]
    assert list(TRACKERS) == [n for n in CallbacksConfig.__struct_fields__ if n in TRACKERS]


@pytest.mark.parametrize(
    ("config", "environ", "said"),
    [
        (WandBConfig(), {}, "WANDB_API_KEY"),
        (WandBConfig(mode="online"), {"WANDB_MODE": "offline"}, "mode=offline"),
        (WandBConfig(), {"WANDB_MODE": "offline"}, None),
        (WandBConfig(mode="offline"), {}, None),
        (WandBConfig(), {"WANDB_API_KEY": "x"}, None),
        (TrackioConfig(), {}, None),
        (TrackioConfig(space_id="me/mine"), {}, "HF_TOKEN"),
        (TrackioConfig(space_id="me/mine"), {"HF_TOKEN": "x"}, None),
        (TRACKERS["mlflow"](), {}, None),
        (TRACKERS["mlflow"](), {"MLFLOW_TRACKING_URI": "databricks"}, "DATABRICKS_TOKEN"),
        (CometConfig(), {}, "COMET_API_KEY"),
        (CometConfig(mode="offline"), {}, None),
        (ClearMLConfig(), {"CLEARML_API_ACCESS_KEY": "x"}, "CLEARML_API_SECRET_KEY"),
        (ClearMLConfig(mode="offline"), {}, None),
        (SwanLabConfig(), {}, "SWANLAB_API_KEY"),
        (SwanLabConfig(mode="local"), {}, None),
        (TRACKERS["aim"](), {}, None),
    ],
)
def test_missing_credentials_are_said_with_the_variable(config, environ, said, monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    if said is None:
        config.check(environ)
    else:
        with pytest.raises(ConfigError, match=said) as caught:
            config.check(environ)
        assert mask_secrets(str(caught.value)) == str(caught.value)  # as it is printed


def test_a_login_in_a_file_is_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n login user\n password x\n")
    assert WandBConfig().missing_credentials({}) is None
    assert WandBConfig().missing_credentials({"WANDB_BASE_URL": "https://own.host"})

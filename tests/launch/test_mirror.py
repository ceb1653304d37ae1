"""The process beside training: what it brings to a store that fails, and what it says."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import psutil
import pytest
import s3fs

from tests.launch.test_pushing import save
from tests.s3 import BUCKET, S3Server, times
from toolkit import signals
from toolkit.checkpoint.folder import saved_steps
from toolkit.checkpoint.retention import Retention
from toolkit.distributed.ranks import LAUNCH_FOLDER
from toolkit.errors import RunError, StorageError
from toolkit.launch import mirror as module
from toolkit.launch.copying import Job, _Copying
from toolkit.launch.mirror import Mirror, push, seconds_left
from toolkit.launch.pushing import Pusher
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lease import LEASE_FILE, Lease
from toolkit.runs.lock import own_info
from toolkit.runs.manager import RunManager
from toolkit.runs.registry import start_run
from toolkit.storage.atomic import encode_json
from toolkit.storage.remote import RemoteFolder

METRICS = RUN_FILES.train_metrics


@pytest.fixture
def url(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "INTERVAL_SECONDS", 0.1)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunManager]:
    run = start_run("e", save_folder=tmp_path / "run", root=tmp_path)
    yield run
    run.close()


def opened(url: str, run: RunManager, seconds: float = 60.0, beat: float = 15.0) -> Mirror:
    mirror = Mirror(url, run.folder, Retention(), wait_seconds=seconds)
    mirror._lease.heartbeat_seconds = beat
    mirror.open()
    mirror.start(run)
    return mirror


def write(run: RunManager, text: str) -> None:
    with run.path(METRICS).open("a") as file:
        file.write(text)


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def has(url: str, text: str) -> Callable[[], bool]:
    folder = RemoteFolder(url)
    return lambda: folder.exists(METRICS) and folder.read(METRICS).decode() == text


def test_what_is_written_arrives_and_what_a_store_that_was_down_missed_comes_later(
    url: str, run: RunManager, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "toolkit")
    mirror = opened(url, run)
    write(run, "1")
    wait_for(has(url, "1"))
    assert RemoteFolder(url).exists(LEASE_FILE)
    with s3.failing(lambda method, path: "403" if method == "PUT" else None):
        write(run, "2")
        save(run.folder, 2)
        wait_for(lambda: "training goes on, and it is tried again" in caplog.text)
    process = mirror._process
    assert process is not None
    psutil.Process(process.pid).kill()
    write(run, "3")
    run.close("finished")
    mirror.close()
    assert has(url, "123")()
    assert saved_steps(f"{url}/checkpoints") == [2]
    assert not RemoteFolder(url).exists(LEASE_FILE)
    assert b'"finished"' in RemoteFolder(url).read(RUN_FILES.status)
    assert "mirrored to" in caplog.text
    assert "has all of the run" in caplog.text


def test_the_end_gives_up_in_time_and_says_how_to_go_on(
    url: str,
    run: RunManager,
    s3: S3Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror = opened(url, run, seconds=0.5)
    save(run.folder, 1)
    monkeypatch.setattr(module, "_SECONDS_TO_RELEASE", 0.2)
    with s3.failing(lambda method, path: "503"):
        started = time.monotonic()
        mirror.close()
        assert time.monotonic() - started < 10
    assert f"`toolkit runs push {run.folder}`" in caplog.text
    mirror._listener.join(10)
    assert not mirror._listener.is_alive()
    assert "started again" not in caplog.text
    run.close("finished")
    RemoteFolder(url).delete([LEASE_FILE])  # that the store did not take back
    lines: list[str] = []
    push(run.folder, url, Retention(), lines.append)
    assert lines == ["checkpoints: step1"]
    assert saved_steps(f"{url}/checkpoints") == [1]
    assert not RemoteFolder(url).exists(LEASE_FILE)


def test_who_was_asked_to_stop_gives_up_before_its_launcher_kills(
    url: str,
    run: RunManager,
    s3: S3Server,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mirror = opened(url, run, seconds=1e6)
    monkeypatch.setattr(module, "_SECONDS_TO_RELEASE", 0.2)
    asked = iter([None, 10.0, *[1e6] * 9])
    monkeypatch.setattr(signals, "seconds_since_asked", lambda: next(asked))
    with s3.failing(lambda method, path: "503"):
        mirror.close()
    assert next(asked) == 1e6
    assert f"`toolkit runs push {run.folder}`" in caplog.text


@pytest.mark.parametrize(
    ("variables", "left"),
    [
        ({}, 285.0),
        ({"TORCHELASTIC_RUN_ID": "x"}, 15.0),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100"}, 85.0),
        ({LAUNCH_FOLDER: "/tmp/x", "TORCHELASTIC_RUN_ID": "x"}, 285.0),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "4"}, 0.0),
    ],
)
def test_the_wait_is_shorter_than_what_the_launcher_gives(
    variables: dict[str, str], left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seconds_left(600, variables) == 600
    monkeypatch.setattr(signals, "seconds_since_asked", lambda: 5.0)
    assert seconds_left(600, variables) == left


def test_signals_for_a_whole_job_leave_the_process_alone(url: str, run: RunManager) -> None:
    mirror = opened(url, run)
    process = mirror._process
    assert process is not None
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    write(run, "1")
    run.close("finished")
    mirror.close()
    assert mirror._process is process
    assert has(url, "1")()


def test_a_push_keeps_its_lease_and_ends_where_it_loses_it(
    url: str, run: RunManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.close("finished")
    save(run.folder, 1)
    beat, begin = Lease.beat, Pusher.begin
    answers: list[bool] = []
    is_lost = threading.Event()

    def lost_at_the_second(self: Lease) -> bool:
        answers.append(beat(self) and not answers)
        if len(answers) == 2:
            is_lost.set()
        return answers[-1]

    def slow(self: Pusher) -> None:
        assert is_lost.wait(60)
        begin(self)

    monkeypatch.setattr(module, "Lease", partial(Lease, heartbeat_seconds=0.05))
    monkeypatch.setattr(Lease, "beat", lost_at_the_second)
    monkeypatch.setattr(Pusher, "begin", slow)
    with pytest.raises(RunError, match="another process took this run over"):
        push(run.folder, url, Retention(), lambda text: None)
    assert answers == [True, False]
    assert saved_steps(f"{url}/checkpoints") == []


def test_a_process_that_cannot_run_says_why(
    url: str, run: RunManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_START", "import no_such_library")
    monkeypatch.setattr(module, "_RESTART_SECONDS", 0.01)
    mirror = opened(url, run)
    wait_for(lambda: caplog.text.count("has ended (ModuleNotFoundError: No module named") >= 2)
    monkeypatch.setattr(module, "_START", "")
    mirror.close()


def test_the_newest_checkpoint_is_looked_for_after_each(run: RunManager, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    lease = Lease(RemoteFolder(url))
    lease.acquire()
    job = Job(str(run.folder), url, lease.info, tuple(Retention(None)), os.getpid(), 1.0, 15.0)
    copying = _Copying(job, BytesIO())
    there = []
    for step in (1, 2, 3, None, None):
        if step is not None:
            save(run.folder, step)
        if step == 1:
            continue
        copying._look(is_over=False)
        assert copying._sending is not None
        copying._sending.result(60)
        there.append(saved_steps(f"{url}/checkpoints"))
    assert there == [[2], [2, 3], [1, 2, 3], [1, 2, 3]]


def test_a_run_that_was_taken_over_must_end(url: str, run: RunManager) -> None:
    mirror = opened(url, run, beat=0.1)
    RemoteFolder(url).write(LEASE_FILE, encode_json(own_info()))
    wait_for(lambda: run.find_removal() is not None)
    assert "another process took this run over" in str(run.find_removal())
    mirror.close()
    assert RemoteFolder(url).exists(LEASE_FILE)


@pytest.mark.parametrize("problem", ["no rights", "no bucket", "no credentials"])
def test_what_the_store_refuses_is_one_line_before_anything_starts(
    problem: str, url: str, run: RunManager, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {
        "no rights": "not allowed: injected; check credentials and permissions; nothing was",
        "no bucket": "its bucket or folder does not exist; nothing was started",
        "no credentials": "not allowed: NoCredentialsError: Unable to locate credentials",
    }[problem]
    if problem == "no bucket":
        url = "s3://no-such-bucket/run"
    if problem == "no credentials":
        s3fs.S3FileSystem.clear_instance_cache()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    faults = times(99 if problem == "no rights" else 0, "403", "PUT")
    with s3.failing(faults), pytest.raises(RunError) as caught:
        opened(url, run)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    if problem == "no credentials":
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_out_of_reach_is_no_bad_input(
    url: str, run: RunManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise StorageError("failed 2 times") from TimeoutError()

    monkeypatch.setattr(RemoteFolder, "write", write)
    with pytest.raises(StorageError, match="failed 2 times"):
        opened(url, run)

"""The process beside training: what it brings to a store that fails, and what it says."""

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import s3fs

from tests.launch.test_pushing import save
from tests.s3 import BUCKET, S3Server, times
from toolkit.checkpoint.folder import saved_steps
from toolkit.checkpoint.retention import Retention
from toolkit.errors import RunError, StorageError
from toolkit.launch import mirror as module
from toolkit.launch.mirror import Mirror, push
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lease import LEASE_FILE
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

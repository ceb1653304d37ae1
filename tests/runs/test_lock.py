"""One writer per run folder; dead writers do not count."""

import os
import signal
import subprocess
import sys
import time

import pytest

from toolkit.errors import RunError
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lock import LockInfo, RunLock, is_locked, read_lock_info
from toolkit.storage.atomic import create_json, write_json_atomic

HOLDER = """
import sys, time
from pathlib import Path
from toolkit.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / RUN_FILES.metadata).mkdir()
    return tmp_path


@pytest.fixture
def holder(folder):
    """Another process that holds the lock of `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def leave_foreign_lock(folder, *, age_seconds):
    info = LockInfo(
        host="another-host",
        pid=4321,
        process_started=0.0,
        started="2026-01-01T00:00:00Z",
        heartbeat="2026-01-01T00:00:00Z",
        token="foreign",
    )
    write_json_atomic(folder / RUN_FILES.lock_info, info)
    then = time.time() - age_seconds
    os.utime(folder / RUN_FILES.lock_info, (then, then))


def test_second_writer_is_refused_with_host_pid_and_since_when(folder, holder):
    info = read_lock_info(folder)
    assert info.pid == holder.pid
    with pytest.raises(RunError) as error:
        RunLock(folder).acquire()
    message = str(error.value)
    assert f"pid {holder.pid} on {info.host} since {info.started}" in message
    assert str(folder) in message
    assert "\n" not in message
    assert is_locked(folder)


def test_second_writer_in_the_same_process_is_refused(folder):
    lock = RunLock(folder)
    lock.acquire()
    with pytest.raises(RunError, match=f"pid {os.getpid()} "):
        RunLock(folder).acquire()
    lock.release()
    lock.release()


def test_release_lets_the_next_one_in(folder):
    for _ in range(2):
        lock = RunLock(folder)
        lock.acquire()
        assert is_locked(folder)
        lock.release()
        assert not is_locked(folder)
        assert read_lock_info(folder) is None


def test_lock_of_a_killed_process_is_taken_over_at_once(folder, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert read_lock_info(folder).pid == holder.pid
    assert not is_locked(folder)
    lock = RunLock(folder)
    lock.acquire()
    assert read_lock_info(folder).pid == os.getpid()
    lock.release()


def test_a_process_that_ends_without_release_leaves_no_trace(folder):
    code = HOLDER.replace("time.sleep(60)", "")
    assert subprocess.run([sys.executable, "-c", code, folder], capture_output=True).returncode == 0
    assert read_lock_info(folder) is None


def test_a_later_process_with_the_same_pid_is_not_the_holder(folder):
    lock = RunLock(folder)
    lock.acquire()
    info = read_lock_info(folder)
    lock.release()
    info.process_started -= 1000.0
    write_json_atomic(folder / RUN_FILES.lock_info, info)
    os.utime(folder / RUN_FILES.lock_info, (0, 0))
    assert not is_locked(folder)


def test_lock_that_outlives_its_dead_holder_is_taken_over(folder, holder, monkeypatch):
    """A child may have inherited it; what counts is that the recorded holder is gone."""
    monkeypatch.setattr("toolkit.runs.lock._SETTLE_SECONDS", 0.2)
    info = read_lock_info(folder)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    info.pid = gone.pid
    write_json_atomic(folder / RUN_FILES.lock_info, info)
    lock = RunLock(folder)
    lock.acquire()
    assert read_lock_info(folder).pid == os.getpid()
    lock.release()


def test_old_lock_of_another_host_is_taken_over(folder, monkeypatch):
    monkeypatch.setattr("toolkit.runs.lock._SETTLE_SECONDS", 0.1)
    leave_foreign_lock(folder, age_seconds=100)
    assert not is_locked(folder)
    lock = RunLock(folder)
    lock.acquire()
    assert read_lock_info(folder).pid == os.getpid()
    lock.release()


def test_young_lock_of_another_host_is_watched_and_taken_over_when_it_stands_still(folder):
    leave_foreign_lock(folder, age_seconds=0.5)
    assert is_locked(folder)
    lock = RunLock(folder, heartbeat_seconds=0.05, stale_seconds=1.0)
    lock.acquire()
    lock.release()


def test_lock_of_another_host_that_beats_is_respected(folder, monkeypatch):
    leave_foreign_lock(folder, age_seconds=0)
    info = read_lock_info(folder)

    def sleep_while_the_other_beats(_seconds):
        info.heartbeat = "2026-01-01T00:00:15Z"
        write_json_atomic(folder / RUN_FILES.lock_info, info)

    monkeypatch.setattr("toolkit.runs.lock.time.sleep", sleep_while_the_other_beats)
    with pytest.raises(RunError, match="pid 4321 on another-host since 2026-01-01"):
        RunLock(folder).acquire()
    monkeypatch.undo()
    monkeypatch.setattr("toolkit.runs.lock._SETTLE_SECONDS", 0.1)
    write_json_atomic(folder / RUN_FILES.lock_info, {})
    RunLock(folder).acquire()  # the refusal left no lock of the system behind


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def test_heartbeat_moves_and_notices_a_takeover(folder):
    lock = RunLock(folder, heartbeat_seconds=0.02)
    lock.acquire()
    first = read_lock_info(folder).heartbeat
    wait_until(lambda: read_lock_info(folder).heartbeat != first)
    assert not lock.lost
    leave_foreign_lock(folder, age_seconds=0)
    # A beat under way may still put our own file back over it.
    wait_until(lambda: lock.lost or leave_foreign_lock(folder, age_seconds=0))
    lock.release()
    assert read_lock_info(folder).token == "foreign"


def test_a_holder_of_the_same_host_name_on_another_machine_is_watched(folder, monkeypatch):
    """A container with the host's name has its own process ids: none of ours is the holder."""
    leave_foreign_lock(folder, age_seconds=0)
    info = read_lock_info(folder)
    info.host, info.machine = os.uname().nodename, "another boot"
    write_json_atomic(folder / RUN_FILES.lock_info, info)
    assert is_locked(folder)

    def sleep_while_the_other_beats(_seconds):
        info.heartbeat = "2026-01-01T00:00:15Z"
        write_json_atomic(folder / RUN_FILES.lock_info, info)

    monkeypatch.setattr("toolkit.runs.lock.time.sleep", sleep_while_the_other_beats)
    with pytest.raises(RunError, match="pid 4321 on "):
        RunLock(folder).acquire()


def test_a_deleted_lock_file_does_not_let_a_second_writer_in(folder, holder):
    (folder / RUN_FILES.lock).unlink(missing_ok=True)
    with pytest.raises(RunError, match=f"pid {holder.pid} on "):
        RunLock(folder).acquire()
    assert read_lock_info(folder).pid == holder.pid


def test_of_two_machines_that_start_at_once_one_gets_through(folder, monkeypatch):
    """Without locks across machines: lock.json appears after it was seen to be absent."""
    lock = RunLock(folder)

    def other_one_is_quicker(path, info):
        leave_foreign_lock(folder, age_seconds=0)
        return create_json(path, info)

    monkeypatch.setattr("toolkit.runs.lock.create_json", other_one_is_quicker)
    with pytest.raises(RunError, match="pid 4321 on another-host"):
        lock.acquire()
    assert read_lock_info(folder).token == "foreign"


def test_of_two_machines_that_take_over_at_once_one_gets_through(folder, monkeypatch):
    leave_foreign_lock(folder, age_seconds=100)

    def other_one_writes_last(_seconds):
        leave_foreign_lock(folder, age_seconds=0)

    monkeypatch.setattr("toolkit.runs.lock.time.sleep", other_one_writes_last)
    with pytest.raises(RunError, match="pid 4321 on another-host"):
        RunLock(folder).acquire()


def test_of_many_processes_that_take_over_a_dead_one_only_one_gets_through(folder):
    """The dead holder's lock lives on in a child, as seen from all of them."""
    code = """
import sys, time
from pathlib import Path
import toolkit.runs.lock as lock
lock._SETTLE_SECONDS = 0.5
try:
    lock.RunLock(Path(sys.argv[1])).acquire()
    print("held", flush=True)
    time.sleep(2)
except lock.RunError as error:
    print("refused", flush=True)
"""
    import filelock

    inherited = filelock.FileLock(folder / RUN_FILES.lock)
    inherited.acquire()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave_foreign_lock(folder, age_seconds=0)
    info = read_lock_info(folder)
    info.host, info.pid = os.uname().nodename, gone.pid
    write_json_atomic(folder / RUN_FILES.lock_info, info)
    command = [sys.executable, "-c", code, str(folder)]
    takers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = sorted(taker.communicate(timeout=60)[0].strip() for taker in takers)
    inherited.release()
    assert answers == ["held", "refused", "refused"]


def test_a_writer_that_was_suspended_looks_before_it_writes(folder, monkeypatch):
    lock = RunLock(folder)
    lock.acquire()
    assert not lock.was_suspended
    now = time.time()
    monkeypatch.setattr("toolkit.runs.lock.time.time", lambda: now + 100)
    assert lock.was_suspended
    leave_foreign_lock(folder, age_seconds=0)
    assert lock.lost
    monkeypatch.undo()
    lock.release()


@pytest.mark.parametrize("name", ["lock", "lock.json"])
def test_a_folder_in_the_place_of_a_lock_is_one_line(folder, name):
    (folder / "metadata" / name).mkdir()
    with pytest.raises(RunError, match=rf"metadata/{name}: is a folder, so the run cannot be lock"):
        RunLock(folder).acquire()

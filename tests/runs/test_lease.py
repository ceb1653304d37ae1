"""One writer at a URL: of two one gets it, a dead one's is taken over, a suspended one learns."""

import threading
import uuid

import msgspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.s3 import BUCKET, S3Server
from toolkit.errors import RunError
from toolkit.runs import lease as module
from toolkit.runs.lease import LEASE_FILE, Lease, is_leased, read_lease
from toolkit.runs.lock import LockInfo, own_info
from toolkit.storage.remote import RemoteFolder, Retries

DEAD = 2**22 + 12345
"""No process has this number: it is above what Linux gives."""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return RemoteFolder("memory://bucket/run", retries=Retries(2, 0.0))


def lease(folder: RemoteFolder, info: LockInfo | None = None, **seconds: float) -> Lease:
    times = {"heartbeat_seconds": 0.02, "stale_seconds": 0.3, "settle_seconds": 0.01} | seconds
    return Lease(folder, info=info, **times)


def elsewhere() -> LockInfo:
    return msgspec.structs.replace(own_info(), host="other", machine="another boot")


@pytest.mark.parametrize("store", ["memory", "file", "s3"])
def test_the_first_gets_it_and_gives_it_back(
    store: str, folder: RemoteFolder, s3: S3Server, tmp_path: str
) -> None:
    urls = {"file": f"file://{tmp_path}/run", "s3": f"s3://{BUCKET}/{uuid.uuid4().hex}"}
    place = RemoteFolder(urls.get(store, folder.url))
    first = lease(place, elsewhere())
    first.probe()
    first.acquire()
    assert [*place.sizes()] == [LEASE_FILE]
    assert is_leased(place)
    with (
        first.kept(pytest.fail, pytest.fail),
        pytest.raises(RunError, match=r"another process .*on other since"),
    ):
        lease(place, stale_seconds=600.0).acquire()  # ends at the first beat
    assert first.beat()
    first.release()
    assert not is_leased(place)
    assert place.sizes() == {}


def test_of_two_on_s3_the_store_itself_refuses_one(s3: S3Server) -> None:
    place = RemoteFolder(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    assert [place.create("x", b"1"), place.create("x", b"2"), place.read("x")] == [
        True,
        False,
        b"1",
    ]


def test_a_holder_without_a_heartbeat_loses_it_and_learns_of_that(folder: RemoteFolder) -> None:
    first, second = lease(folder, elsewhere()), lease(folder)
    first.acquire()
    second.acquire()
    assert (first.beat(), second.beat()) == (False, True)
    assert "another process took this run over" in str(first.lost_error())
    first.release()
    assert read_lease(folder) is not None


def test_who_keeps_it_learns_that_it_is_lost_or_was_removed(folder: RemoteFolder) -> None:
    holder = lease(folder)
    holder.acquire()
    lost, gone = threading.Event(), threading.Event()
    with holder.kept(lost.set, gone.set):
        folder.delete([LEASE_FILE])
        assert gone.wait(60)
        folder.write(LEASE_FILE, msgspec.json.encode(elsewhere()))
        assert lost.wait(60)


def test_after_a_suspension_the_store_is_asked(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module, "now", lambda: clock[0])
    holder = lease(folder, heartbeat_seconds=15.0)
    holder.acquire()
    assert holder.check()
    folder.write(LEASE_FILE, msgspec.json.encode(elsewhere()))
    clock[0] = 30.0
    assert holder.check()
    clock[0] = 31.0
    assert not holder.check()


def test_a_dead_process_of_this_machine_is_not_waited_for(folder: RemoteFolder) -> None:
    lease(folder, msgspec.structs.replace(own_info(), pid=DEAD)).acquire()
    assert not is_leased(folder)
    lease(folder, stale_seconds=1e6).acquire()
    assert is_leased(folder)


def test_one_that_is_given_back_meanwhile_is_taken(folder: RemoteFolder) -> None:
    first = lease(folder, elsewhere())
    first.acquire()
    threading.Timer(0.1, first.release).start()
    second = lease(folder, stale_seconds=1e6)
    second.acquire()
    assert second.beat()


def test_of_two_that_take_over_the_last_to_write_has_it(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease(folder, elsewhere()).acquire()
    loser, winner = lease(folder), elsewhere()
    original = RemoteFolder.write

    def write(self: RemoteFolder, name: str, data: bytes) -> None:
        original(self, name, data)
        original(self, name, msgspec.json.encode(winner))

    monkeypatch.setattr(RemoteFolder, "write", write)
    with pytest.raises(RunError, match="on other since"):
        loser.acquire()


def test_a_folder_that_was_removed_is_told(folder: RemoteFolder) -> None:
    holder = lease(folder)
    holder.acquire()
    folder.delete([LEASE_FILE])
    with pytest.raises(FileNotFoundError):
        holder.beat()
    assert holder.beat()


def test_a_store_that_knows_no_condition_looks_first(
    folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MemoryFileSystem.pipe_file

    def pipe(self: MemoryFileSystem, path: str, value: bytes) -> None:
        original(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe)
    assert [folder.create("x", b"1"), folder.create("x", b"2"), folder.read("x")] == [
        True,
        False,
        b"1",
    ]


def test_what_is_no_lease_counts_as_one_that_does_not_live(folder: RemoteFolder) -> None:
    folder.write(LEASE_FILE, b"{")
    lease(folder).acquire()
    assert is_leased(folder)

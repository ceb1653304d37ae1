"""Remote folders: what arrives is what left, errors that pass are survived, others are one line."""

import os
import resource
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from fsspec.implementations.memory import MemoryFileSystem

from tests.s3 import BUCKET, S3Server, times
from tests.workers import WorkerPool
from toolkit.errors import ConfigError, StorageError
from toolkit.storage import dialects
from toolkit.storage.atomic import hash_file
from toolkit.storage.dialects import PART
from toolkit.storage.remote import CHUNK, ContentError, RemoteFolder, Retries, is_url
from toolkit.storage.remote_file import RemoteFile
from toolkit.storage.transient import is_transient, reason_of

MIB = 1 << 20


@pytest.fixture
def s3_folder(s3: S3Server) -> RemoteFolder:
    return RemoteFolder(f"s3://{BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture
def memory_folder(monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return RemoteFolder("memory://root/folder", retries=Retries(3, 0.0))


def random_file(path: Path, size: int) -> Path:
    path.write_bytes(os.urandom(size))
    return path


def fetch(folder: RemoteFolder, name: str, original: Path, to: Path) -> bytes:
    folder.download(name, to, size=original.stat().st_size, xxh3=hash_file(original))
    return to.read_bytes()


@pytest.mark.parametrize("size", [0, 10, CHUNK + 1, 3 * PART + 5])
def test_what_comes_back_from_s3_is_what_was_sent(
    s3: S3Server, s3_folder: RemoteFolder, tmp_path: Path, size: int
) -> None:
    original = random_file(tmp_path / "a", size)
    s3_folder.upload(original, "sub/a.bin")
    assert s3_folder.size("sub/a.bin") == size
    assert fetch(s3_folder, "sub/a.bin", original, tmp_path / "b") == original.read_bytes()
    assert s3_folder.hash("sub/a.bin", size) == hash_file(original)
    parts = [path for method, path, _ in s3.requests if method == "PUT" and "partNumber" in path]
    assert len(parts) == (4 if size > 2 * PART else 0)


@pytest.mark.parametrize("store", ["memory", "file", "s3"])
def test_names_sizes_and_removal(store: str, tmp_path: Path, request: Any) -> None:
    folder: RemoteFolder = (
        RemoteFolder(f"file://{tmp_path}/root")
        if store == "file"
        else request.getfixturevalue(f"{store}_folder")
    )
    assert (folder.sizes(), folder.folders(), folder.exists("x")) == ({}, [], False)
    folder.write("x", b"12")
    folder.upload(random_file(tmp_path / "a", 5), "deep/er/y")
    (folder / "deep").write("z", b"")
    assert folder.sizes() == {"x": 2, "deep/er/y": 5, "deep/z": 0}
    assert folder.folders() == ["deep"]
    assert (folder.exists("x"), folder.exists("deep"), folder.read("x")) == (True, False, b"12")
    folder.delete(["x", "never/was"])
    assert folder.sizes() == {"deep/er/y": 5, "deep/z": 0}
    with pytest.raises(FileNotFoundError):
        folder.read("x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "a has 99 bytes, expected 100"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "a has changed since it was saved"),
        (None, "a is missing"),
    ],
)
def test_a_cut_or_changed_object_is_detected(
    s3_folder: RemoteFolder, tmp_path: Path, damage: Callable | None, message: str
) -> None:
    original = random_file(tmp_path / "original", 100)
    s3_folder.upload(original, "a")
    s3_folder.delete(["a"]) if damage is None else s3_folder.write(
        "a", damage(original.read_bytes())
    )
    with pytest.raises(ContentError, match=message):
        fetch(s3_folder, "a", original, tmp_path / "b")


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_a_server_that_fails_for_a_while_is_survived(
    s3: S3Server, s3_folder: RemoteFolder, tmp_path: Path, fault: str
) -> None:
    original = random_file(tmp_path / "a", 2 * PART + 1)
    with s3.failing(times(2, fault, "PUT")):
        s3_folder.upload(original, "a")
    with s3.failing(times(2, fault, "GET")):
        assert fetch(s3_folder, "a", original, tmp_path / "b") == original.read_bytes()


def test_a_refusal_of_s3_is_one_line_at_once(
    s3: S3Server, s3_folder: RemoteFolder, tmp_path: Path
) -> None:
    with s3.failing(times(9, "403", "PUT")), pytest.raises(StorageError) as caught:
        s3_folder.upload(random_file(tmp_path / "a", 10), "a")
    assert str(caught.value) == (
        f"uploading {s3_folder}/a: not allowed: injected; check credentials and permissions"
    )
    assert len([method for method, _, _ in s3.requests if method == "PUT"]) == 1
    with pytest.raises(StorageError, match="its bucket or folder does not exist"):
        RemoteFolder("s3://no-such-bucket/x").upload(tmp_path / "a", "a")
    assert RemoteFolder("s3://no-such-bucket/x").sizes() == {}


def flaky(monkeypatch: pytest.MonkeyPatch, method: str, errors: list[Exception]) -> list[str]:
    """The first calls of a method of the memory store raise these; returns the calls."""
    original, calls = getattr(MemoryFileSystem, method), []

    def call(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(path)
        if errors:
            raise errors.pop(0)
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, method, call)
    return calls


def test_errors_that_pass_are_tried_again(
    memory_folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = flaky(monkeypatch, "pipe_file", [TimeoutError("slow"), ConnectionResetError("gone")])
    memory_folder.write("x", b"1")
    assert (memory_folder.read("x"), len(calls)) == (b"1", 3)


def test_an_upload_that_the_store_has_forgotten_is_sent_again(
    memory_folder: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = FileNotFoundError("the upload does not exist")
    forgotten.__cause__ = ClientError({"Error": {"Code": "NoSuchUpload"}}, "UploadPart")
    calls = flaky(monkeypatch, "put_file", [forgotten])
    memory_folder.upload(random_file(tmp_path / "a", 5), "a")
    assert (memory_folder.size("a"), len(calls)) == (5, 2)


def test_what_does_not_pass_is_given_up_with_one_line(
    memory_folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = flaky(monkeypatch, "pipe_file", [TimeoutError("slow\nvery")] * 9)
    with pytest.raises(StorageError) as caught:
        memory_folder.write("x", b"1")
    assert str(caught.value) == (
        "writing memory://root/folder/x failed 3 times, last: TimeoutError: slow very; "
        "check the network and the store, then try again"
    )
    assert len(calls) == 3


def test_a_refusal_is_not_tried_again(
    memory_folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = flaky(monkeypatch, "ls", [PermissionError("not yours")] * 9)
    with pytest.raises(StorageError, match="not allowed: not yours; check credentials"):
        memory_folder.folders()
    assert len(calls) == 1


def test_pauses_double_and_differ() -> None:
    retries = Retries(attempts=9, first_pause=0.5, longest_pause=4.0)
    for attempt, longest in enumerate([0.5, 1.0, 2.0, 4.0, 4.0]):
        pauses = {retries.pause(attempt) for _ in range(20)}
        assert longest / 2 <= min(pauses) < max(pauses) <= longest


def http_error(status: int) -> OSError:
    error = OSError(5, "translated")
    error.__cause__ = ClientError(
        {"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (http_error(500), True),
        (http_error(503), True),
        (http_error(429), True),
        (http_error(400), False),
        (EndpointConnectionError(endpoint_url="x"), True),
        (BrokenPipeError(), True),
        (OSError(28, "no space"), False),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ValueError(), False),
    ],
)
def test_which_errors_pass(error: Exception, expected: bool) -> None:
    assert is_transient(error) is expected


def test_what_an_error_quotes_is_cut() -> None:
    assert len(reason_of(ValueError("400, got: " + "x" * 9999))) < 350


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
    with pytest.raises(ConfigError, match=r"^gs://b/x: gs:// needs .*pip install 'toolkit\[gcs\]'"):
        RemoteFolder("gs://b/x")
    with pytest.raises(
        ConfigError, match=r"^nope://b: cannot be opened: no such.* s3://,.*file://"
    ):
        RemoteFolder("nope://b")


def test_a_server_that_is_asked_on_opening_and_is_not_there_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^ftp://127.0.0.1:9/y: cannot be opened: .*refused"):
        RemoteFolder("ftp://127.0.0.1:9/y")


@pytest.mark.parametrize("url", ["file://tmp/x", "file://x", "local://a/b"])
def test_a_relative_file_url_is_refused_and_told_the_right_form(url: str) -> None:
    with pytest.raises(ConfigError, match=r"three slashes, .* path: [a-z]+:///"):
        RemoteFolder(url)


def test_urls_and_paths_are_told_apart() -> None:
    assert [is_url(x) for x in ("s3://b/x", "file:///x", "gs://b")] == [True] * 3
    assert [is_url(x) for x in ("/a/b", "a/b", Path("s3:/b"), "C:\\x", "://x")] == [False] * 5


def test_seeking_and_reading_give_the_same_bytes(memory_folder: RemoteFolder) -> None:
    data = os.urandom(3 * CHUNK + 77)
    memory_folder.write("x", data)
    file = RemoteFile(memory_folder, "x")
    for start, count in ((0, 10), (CHUNK - 3, 9), (5, 2 * CHUNK + 1), (len(data) - 4, 100)):
        assert file.seek(start) == start
        assert file.read(count) == data[start : start + count]
    assert file.seek(-5, os.SEEK_END) == len(data) - 5
    assert file.read() == data[-5:]


def test_neighbours_cost_one_request(s3: S3Server, s3_folder: RemoteFolder) -> None:
    s3_folder.write("x", bytes(100_000))
    file = RemoteFile(s3_folder, "x")
    s3.requests.clear()
    for start in (90_000, 10, 50_000):
        file.seek(start)
        file.read(1000)
    assert [range_ for _, _, range_ in s3.requests] == ["bytes=0-99999"]


def move_there_and_back(url: str, folder: str, size: int) -> float:
    """Growth of this process's peak memory in MiB."""
    path = Path(folder) / "big"
    with path.open("wb") as file:
        file.truncate(size)
    store = RemoteFolder(url)
    Path("/proc/self/clear_refs").write_text("5")  # restarts the peak from here
    before = peak()
    store.upload(path, "big")
    store.download("big", Path(folder) / "back", size=size, xxh3=hash_file(path))
    return (peak() - before) / 1024


def peak() -> int:
    """KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("size", [64, pytest.param(200, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_file(
    s3: S3Server, s3_folder: RemoteFolder, tmp_path: Path, workers: WorkerPool, size: int
) -> None:
    job = (move_there_and_back, s3_folder.url, str(tmp_path))
    workers.run(1, *job, 2 * MIB, environ=s3.environ)  # imports, first connections
    assert workers.run(1, *job, size * MIB, environ=s3.environ)[0] < 50
    s3_folder.delete(["big"])


def test_the_largest_object_of_s3_fits_into_its_parts() -> None:
    s3 = type("Fake", (), {"protocol": ("s3", "s3a")})()
    options = dialects.upload_options(s3, 5 * 2**40)
    assert -(-5 * 2**40 // options["chunksize"]) <= 10_000
    assert dialects.upload_options(s3, 1) == {"chunksize": PART, "max_concurrency": 4}

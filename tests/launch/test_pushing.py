"""What a mirror sends: everything, in order, and of files that grow only their ends; cut anywhere,
the URL holds the beginning of what was."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.s3 import BUCKET, S3Server
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.folder import saved_steps
from toolkit.checkpoint.retention import Retention
from toolkit.errors import RunError, StorageError
from toolkit.launch import pushing, remote_run
from toolkit.launch.pushing import Pusher, piece_name, push_all, whole_name
from toolkit.runs.files import RUN_FILES
from toolkit.storage.remote import RemoteFolder, Retries

METRICS = "metrics/train.jsonl"
PIECE = 16


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    for module in (pushing, remote_run):
        monkeypatch.setattr(module, "PIECE", PIECE)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return RemoteFolder("memory://bucket/run", retries=Retries(1, 0.0))


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    (folder / "metadata").mkdir(exist_ok=True)
    (folder / RUN_FILES.status).touch()
    return path


def joined(remote: RemoteFolder, name: str = METRICS) -> bytes:
    pieces = [n for n in remote.sizes() if whole_name(n)[0] == name]
    return b"".join(remote.read(piece_name(name, number)) for number in range(len(pieces)))


def save(folder: Path, step: int) -> None:
    put(folder, RUN_FILES.status, b"")
    save_checkpoint(
        folder / "checkpoints",
        step=step,
        tokens=step,
        tensors={"model.a": torch.full((2,), float(step))},
        rank_state={},
        engine="single",
        rank=0,
        group=None,
    )


def writes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Names and bytes of all that is written from now on."""
    seen: list[tuple[str, int]] = []
    write, upload = RemoteFolder.write, RemoteFolder.upload

    def noted_write(self: RemoteFolder, name: str, data: bytes) -> None:
        seen.append((f"{self.url}/{name}".partition("/run/")[2], len(data)))
        write(self, name, data)

    def noted_upload(self: RemoteFolder, local: Path, name: str) -> None:
        seen.append((f"{self.url}/{name}".partition("/run/")[2], local.stat().st_size))
        upload(self, local, name)

    monkeypatch.setattr(RemoteFolder, "write", noted_write)
    monkeypatch.setattr(RemoteFolder, "upload", noted_upload)
    return seen


class Cut(Exception):
    """The process died here."""


@pytest.mark.parametrize("seed", range(6))
def test_a_growing_file_is_there_piece_by_piece_whatever_happens_to_it(
    remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Appended to, cut back, grown again between two looks, sent by a new process, and killed
    between any two requests: what is there is the file, or after a kill the beginning of a state
    that it had."""
    chance = random.Random(seed)
    path = put(tmp_path, METRICS, b"")
    pusher, states = Pusher(tmp_path, remote, Retention()), [b""]
    left = [10**9]

    def dying(original: Any) -> Any:
        def change(*args: Any, **how: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return original(*args, **how)

        return change

    for method in ("pipe_file", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, method, dying(getattr(MemoryFileSystem, method)))
    for _ in range(60):
        data = path.read_bytes()
        data = data[: chance.randrange(len(data) + 1)] if chance.random() < 0.3 else data
        data += chance.randbytes(chance.randrange(3 * PIECE))
        path.write_bytes(data)
        states.append(data)
        if chance.random() < 0.3:
            left[0] = chance.randrange(4)
        try:
            if chance.random() < 0.2:
                pusher = Pusher(tmp_path, remote, Retention())
                pusher.begin()
            pusher.push_files()
            assert joined(remote) == data
        except StorageError:
            left[0] = 10**9
            found = joined(remote)
            assert any(state.startswith(found) for state in states)
            pusher = Pusher(tmp_path, remote, Retention())
            pusher.begin()
        left[0] = 10**9


def test_a_look_sends_one_piece_and_what_is_new(
    remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path, METRICS, bytes(range(200)))
    put(tmp_path, "metadata/status.json", b"{}")
    pusher = Pusher(tmp_path, remote, Retention())
    pusher.push_files()
    seen = writes(monkeypatch)
    pusher.push_files()
    assert seen == []
    with path.open("ab") as file:
        file.write(b"new")
    pusher.push_files()
    assert seen == [(piece_name(METRICS, 12), 11)]
    path.write_bytes(path.read_bytes()[:20])
    pusher.push_files()
    assert joined(remote) == bytes(range(20))
    assert seen[1:] == [(piece_name(METRICS, 1), 4)]


def test_what_the_store_has_is_not_sent_again_by_the_next_attempt(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "PIECE", PIECE)
    remote = RemoteFolder(f"s3://{BUCKET}/{tmp_path.name}/run")
    path = put(tmp_path, METRICS, bytes(100))
    put(tmp_path, "tb/train/events", b"event")
    old = put(tmp_path, "tb/train/old", b"event")
    Pusher(tmp_path, remote, Retention()).push_files()
    old.unlink()
    path.write_bytes(bytes(70) + b"other")
    seen = writes(monkeypatch)
    pusher = Pusher(tmp_path, remote, Retention())
    pusher.begin()
    pusher.push_files()
    assert seen == [(piece_name(METRICS, 4), 11)]
    assert joined(remote) == path.read_bytes()
    found = {whole_name(name)[0] for name in remote.sizes()}
    assert found == {METRICS, "tb/train/events", RUN_FILES.status}


@pytest.mark.parametrize("size", [PIECE // 2, 3 * PIECE])
def test_a_file_that_grows_while_it_is_sent_is_there_as_it_was(
    remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path = put(tmp_path, "tb/train/events", bytes(size))
    pipe, put_file = MemoryFileSystem.pipe_file, MemoryFileSystem.put_file

    def growing(original: Any) -> Any:
        def send(*args: Any, **how: Any) -> Any:
            with path.open("ab") as file:
                file.write(b"more")
            return original(*args, **how)

        return send

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", growing(pipe))
        patch.setattr(MemoryFileSystem, "put_file", growing(put_file))
        pusher = Pusher(tmp_path, remote, Retention())
        assert pusher.push_files() is None
    assert remote.read("tb/train/events").startswith(bytes(size))
    pusher.push_files()
    assert remote.read("tb/train/events") == path.read_bytes()


def test_a_file_that_cannot_be_sent_keeps_nothing_else_back(
    remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a/refused", b"1")
    put(tmp_path, "z/sent", b"1")
    put(tmp_path, METRICS, b"1")
    save(tmp_path, 3)
    write = RemoteFolder.write

    def refuse(self: RemoteFolder, name: str, data: bytes) -> None:
        if name in refused:
            raise StorageError(f"{name}: not allowed")
        write(self, name, data)

    monkeypatch.setattr(RemoteFolder, "write", refuse)
    refused = {"a/refused"}
    pusher = Pusher(tmp_path, remote, Retention())
    with pytest.raises(StorageError, match="a/refused: not allowed"):
        push_all(pusher)
    assert remote.read("z/sent") == b"1"
    assert saved_steps(f"{remote}/checkpoints") == [3]
    refused = {METRICS}
    put(tmp_path, METRICS, b"12")
    save(tmp_path, 4)
    with pytest.raises(StorageError, match=METRICS):
        push_all(pusher)
    assert saved_steps(f"{remote}/checkpoints") == [3]


def test_metrics_do_not_wait_for_logs_of_many_ranks(
    remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("logs/rank0.log", "a/x", "trackers/x", METRICS, "tb/train/events"):
        put(tmp_path, name, b"1")
    seen = writes(monkeypatch)
    Pusher(tmp_path, remote, Retention()).push_files()
    assert [name for name, _ in seen][:2] == [METRICS, RUN_FILES.status]


def test_metrics_come_before_the_checkpoint_that_they_lead_to(
    remote: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, METRICS, b"1 2 3")
    put(tmp_path, "merged/step3/.metadata.json", b"{}")
    put(tmp_path, "merged/step3/weights", b"w")
    put(tmp_path, "metadata/lock.json", b"{}")
    put(tmp_path, "metadata/.x.tmp", b"{}")
    put(tmp_path, "stop", b"")
    save(tmp_path, 3)
    seen = writes(monkeypatch)
    push_all(Pusher(tmp_path, remote, Retention()))
    names = [name for name, _ in seen]
    assert names.index(METRICS) < names.index("checkpoints/step3/train/rank0.pt")
    assert names[-3:] == [
        "checkpoints/step3/.metadata.json", "merged/step3/weights", "merged/step3/.metadata.json",
    ]  # fmt: skip
    assert not {"metadata/lock.json", "metadata/.x.tmp", "stop"} & set(names)


def test_the_rule_holds_there_and_what_was_pruned_here_is_passed_over(
    remote: RemoteFolder, tmp_path: Path
) -> None:
    pusher = Pusher(tmp_path, remote, Retention(keep_last=2))
    for step in (1, 2, 3):
        save(tmp_path, step)
        if step == 2:
            continue
        pusher.push_checkpoints([*pusher.committed(), 7])
    assert saved_steps(f"{remote}/checkpoints") == [2, 3]


def test_steps_of_an_attempt_that_was_set_aside_count_no_more(
    remote: RemoteFolder, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for step in (2, 4):
        save(old, step)
    push_all(Pusher(old, remote, Retention()))
    save(new, 2)
    Pusher(new, remote, Retention()).begin()
    assert saved_steps(f"{remote}/checkpoints") == [2]
    assert (remote / "checkpoints").folders() == ["step2", "step4.invalid"]


def test_what_is_removed_here_is_removed_there(remote: RemoteFolder, tmp_path: Path) -> None:
    path = put(tmp_path, METRICS, bytes(40))
    note = put(tmp_path, "metadata/note.json", b"{}")
    pusher = Pusher(tmp_path, remote, Retention())
    pusher.push_files()
    path.unlink()
    note.unlink()
    pusher.push_files()
    assert remote.sizes() == {RUN_FILES.status: 0}


def test_the_copy_of_a_folder_that_was_removed_stays(remote: RemoteFolder, tmp_path: Path) -> None:
    put(tmp_path / "run", METRICS, b"1")
    pusher = Pusher(tmp_path / "run", remote, Retention())
    pusher.push_files()
    shutil.rmtree(tmp_path / "run")
    for push in (pusher.push_files, pusher.begin):
        with pytest.raises(RunError, match="its copy stays as it is"):
            push()
    assert joined(remote) == b"1"


def test_a_checkpoint_damaged_here_is_told_once_and_not_waited_for(
    remote: RemoteFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    put(tmp_path, "checkpoints/step1/train/rank0.pt", b"other")
    pusher = Pusher(tmp_path, remote, Retention())
    push_all(pusher)
    assert "rank0.pt" in caplog.text
    assert pusher.committed() == saved_steps(f"{remote}/checkpoints") == []

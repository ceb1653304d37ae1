"""Checkpoints on object stores: the metadata comes last and goes first, and runs no code."""

import os
import pickle
import shutil
import uuid
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.s3 import BUCKET, S3Server
from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.find import Found, find_checkpoint, find_remote_checkpoint, share_of
from toolkit.checkpoint.folder import (
    METADATA_FILE,
    CheckpointMetadata,
    FileEntry,
    encode_metadata,
    read_metadata,
    saved_steps,
)
from toolkit.checkpoint.load import load_checkpoint
from toolkit.checkpoint.remote import (
    download_checkpoint,
    download_newest,
    upload_checkpoint,
)
from toolkit.checkpoint.retention import Retention, prune_checkpoints
from toolkit.errors import CheckpointError, TrainingError
from toolkit.storage.remote import RemoteFolder

ROOT = "memory://run/checkpoints"


def tensors(value: float = 1.0, rows: int = 3) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((rows, 4), value), "optim.a.step": torch.tensor(value)}


def save(root: Path, step: int, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "step": step,
        "tokens": step * 10,
        "tensors": tensors(float(step)),
        "rank_state": {"step": step},
        "engine": "single",
        "rank": 0,
        "group": None,
    }
    return save_checkpoint(root, **(settings | changes))


@pytest.fixture(autouse=True)
def empty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])


@pytest.fixture
def s3_root(s3: S3Server) -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/checkpoints"


def read_in_place(url: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    into = tensors(0.0)
    _, state = load_checkpoint(url, tensors=into, rank=0, group=None)
    return into, state


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_checkpoint_comes_back_from_s3_as_it_was(
    s3: S3Server, s3_root: str, tmp_path: Path
) -> None:
    local = save(tmp_path / "here", 7)
    url = upload_checkpoint(local, s3_root)
    assert url == f"{s3_root}/step7"
    written = [path.rpartition("step7/")[2] for method, path, _ in s3.requests if method == "PUT"]
    assert (len(written), written[-1]) == (4, METADATA_FILE)
    for place in (url, s3_root, s3_root.removesuffix("/checkpoints")):
        assert find_remote_checkpoint(place, hashes=True) == Found(url)
    assert saved_steps(s3_root) == [7]

    copy = download_checkpoint(url, tmp_path / "there")
    assert content(copy) == content(local)
    into, state = read_in_place(url)
    assert torch.equal(into["model.a"], torch.full((3, 4), 7.0))
    assert state == {"step": 7}


def upload_and_load(root: str, url: str) -> dict[str, Any]:
    """On each rank; DTensors would do the same, a different value on each rank shows who wrote."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    env = open_environment(module_config("ddp"))
    try:
        rank, group = env.rank, env.cpu_group
        mesh = init_device_mesh("cpu", (env.world_size,))
        own = torch.randn(2, 3, generator=torch.Generator().manual_seed(rank))

        def sharded(part: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"model.a": DTensor.from_local(part, mesh, [Shard(0)])}

        local = save(Path(root) / "here", 1, tensors=sharded(own), rank_state={"rank": rank},
                     rank=rank, group=group)  # fmt: skip
        step = upload_checkpoint(local, url, rank=rank, group=group)
        copy = download_newest(url, Path(root) / "there", rank=rank, group=group)
        assert copy is not None
        first, second = torch.zeros(2, 3), torch.zeros(2, 3)
        _, in_place = load_checkpoint(step, tensors=sharded(first), rank=rank, group=group)
        _, downloaded = load_checkpoint(copy, tensors=sharded(second), rank=rank, group=group)
        return {
            "equal": torch.equal(first, own) and torch.equal(second, own),
            "ranks": (in_place["rank"], downloaded["rank"]),
            "files": sorted(read_metadata(copy).files),
        }
    finally:
        env.close()


@pytest.mark.slow
def test_two_ranks_share_the_work(
    s3: S3Server, s3_root: str, tmp_path: Path, workers: WorkerPool
) -> None:
    results = workers.run(2, upload_and_load, str(tmp_path), s3_root, environ=s3.environ)
    assert [result["equal"] for result in results] == [True, True]
    assert [result["ranks"] for result in results] == [(0, 0), (1, 1)]
    assert "model_and_optim/__1_0.distcp" in results[0]["files"]
    assert content(tmp_path / "here") == content(tmp_path / "there")
    writes = [path for method, path, _ in s3.requests if method == "PUT"]
    assert writes[-1].endswith(f"step1/{METADATA_FILE}")


def upload_with_failure(root: str, url: str) -> tuple[str, Found]:
    env = open_environment(module_config("ddp"))
    try:
        local = save(Path(root), 1, rank=env.rank, group=env.cpu_group)
        fail = mock.patch.object(
            RemoteFolder,
            "upload",
            **({"side_effect": OSError("no route")} if env.rank == 1 else {"return_value": None}),
        )
        with fail, pytest.raises(TrainingError) as caught:
            upload_checkpoint(local, url, rank=env.rank, group=env.cpu_group)
        return str(caught.value), find_remote_checkpoint(url, rank=env.rank, group=env.cpu_group)
    finally:
        env.close()


def test_one_ranks_failure_is_every_ranks_and_commits_nothing(
    s3: S3Server, s3_root: str, tmp_path: Path, workers: WorkerPool
) -> None:
    for message, found in workers.run(
        2, upload_with_failure, str(tmp_path), s3_root, environ=s3.environ
    ):
        assert "step1: not uploaded" in message
        assert "rank 1 on" in message
        assert "no route" in message
        assert found == Found(None)


class Cut(Exception):
    """The process died here."""


def cut_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory store dies with change number `count` (from 0) and stays dead."""
    left = [count]

    def dying(original: Any) -> Any:
        def change(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return original(*args, **kwargs)

        return change

    for method in ("put_file", "pipe_file", "rm_file"):
        monkeypatch.setattr(MemoryFileSystem, method, dying(getattr(MemoryFileSystem, method)))


def test_an_upload_cut_anywhere_leaves_nothing_to_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    first = upload_checkpoint(older, ROOT)
    for count in range(4):
        with monkeypatch.context() as patch:
            cut_after(count, patch)
            with pytest.raises(TrainingError, match=r"step2: not uploaded.*Cut"):
                upload_checkpoint(newer, ROOT)
        assert saved_steps(ROOT) == [1]
        assert find_remote_checkpoint(ROOT) == Found(first)
    upload_checkpoint(newer, ROOT)
    assert saved_steps(ROOT) == [1, 2]


def test_replacing_a_checkpoint_takes_its_metadata_away_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_checkpoint(save(tmp_path / "a", 1), ROOT)
    other = save(tmp_path / "b", 1, tensors=tensors(5.0))
    for count in (1, 2, 3):
        with monkeypatch.context() as patch:
            cut_after(count, patch)
            with pytest.raises(TrainingError, match=r"step1: not uploaded"):
                upload_checkpoint(other, ROOT)
        assert find_remote_checkpoint(ROOT) == Found(None)
    url = upload_checkpoint(other, ROOT)
    assert read_in_place(url)[0]["model.a"][0, 0] == 5.0


def test_what_is_there_already_is_not_uploaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = save(tmp_path, 1)
    url = upload_checkpoint(local, ROOT)
    cut_after(0, monkeypatch)
    assert upload_checkpoint(local, ROOT) == url


def test_a_damaged_local_checkpoint_is_not_uploaded(tmp_path: Path) -> None:
    local = save(tmp_path, 1)
    data = (local / "train" / "rank0.pt").read_bytes()
    (local / "train" / "rank0.pt").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(TrainingError, match=r"rank0\.pt has changed since it was saved"):
        upload_checkpoint(local, ROOT)
    assert find_remote_checkpoint(ROOT) == Found(None)


def test_what_is_not_committed_is_not_uploaded(tmp_path: Path) -> None:
    (tmp_path / "step1").mkdir()
    with pytest.raises(TrainingError, match=r"not a committed checkpoint \(no \.metadata\.json\)"):
        upload_checkpoint(tmp_path / "step1", ROOT)
    assert RemoteFolder(ROOT).sizes() == {}


FILES = ["model_and_optim/.metadata", "model_and_optim/__0_0.distcp", "train/rank0.pt"]


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
@pytest.mark.parametrize("file", [*FILES, METADATA_FILE])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = (upload_checkpoint(save(tmp_path, step), ROOT) for step in (1, 2))
    folder = RemoteFolder(newer)
    data = folder.read(file)
    if damage == "delete":
        folder.delete([file])
    else:
        folder.write(file, data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    uncommitted = (file, damage) == (METADATA_FILE, "delete")
    with caplog.at_level("WARNING", logger="toolkit"):
        copy = download_newest(ROOT, tmp_path / "there")
    assert copy == tmp_path / "there" / "step1"
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["step1"]
    assert ("step2" in caplog.text) is not uncommitted
    rejected = () if uncommitted else (newer,)
    assert find_remote_checkpoint(ROOT, hashes=True) == Found(older, rejected)
    if not uncommitted:
        with pytest.raises(CheckpointError, match="step2"):
            download_newest(newer, tmp_path / "there")


def test_out_of_reach_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older checkpoint must not be used because the store refused for a moment."""
    for step in (1, 2):
        upload_checkpoint(save(tmp_path, step), ROOT)
    original = MemoryFileSystem.cat_file

    def refuse(self: Any, path: str, *args: Any, **kwargs: Any) -> bytes:
        if "step2/.metadata.json" in path:
            raise PermissionError("expired")
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    with pytest.raises(TrainingError, match=r"cannot look for checkpoints.* not allowed: expired"):
        find_remote_checkpoint(ROOT)


def test_a_download_cut_short_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload_checkpoint(save(tmp_path, 1), ROOT)
    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "download", mock.Mock(side_effect=OSError("disk full")))
        with pytest.raises(TrainingError, match=r"step1: not downloaded.*disk full"):
            download_checkpoint(url, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_whole_local_copy_is_used_and_a_damaged_one_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload_checkpoint(save(tmp_path / "here", 1), ROOT)
    copy = download_checkpoint(url, tmp_path / "there")
    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "download", mock.Mock(side_effect=Cut))
        assert download_checkpoint(url, tmp_path / "there") == copy
    (copy / FILES[1]).write_bytes(b"damaged")
    assert find_checkpoint(download_checkpoint(url, tmp_path / "there")).checkpoint == copy

    shutil.rmtree(copy)
    save(tmp_path / "there", 1, tensors=tensors(9.0))
    with pytest.raises(CheckpointError, match="there is another checkpoint of this step; remove"):
        download_checkpoint(url, tmp_path / "there")


def put(url: str, metadata: CheckpointMetadata, **files: bytes) -> None:
    """A checkpoint that no one of ours wrote, with a fitting manifest."""
    import xxhash

    folder = RemoteFolder(url)
    entries = dict(metadata.files)
    for key, data in files.items():
        name = {"tensors": FILES[0], "state": FILES[2]}[key]
        folder.write(name, data)
        entries[name] = FileEntry(len(data), xxhash.xxh3_64_hexdigest(data))
    changed = CheckpointMetadata(
        version=metadata.version, step=metadata.step, tokens=0, engine="single", world_size=1,
        files=entries,
    )  # fmt: skip
    folder.write(METADATA_FILE, encode_metadata(changed))


@pytest.mark.parametrize(
    "name", ["../../escaped", "/etc/escaped", "train/../../x", ".", "a\\..\\b", METADATA_FILE]
)
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    local = save(tmp_path / "here", 1)
    url = upload_checkpoint(local, ROOT)
    metadata = read_metadata(local)
    metadata.files[name] = FileEntry(1, "0" * 16)
    put(url, metadata)
    with pytest.raises(CheckpointError, match="manifest names a path outside it"):
        download_checkpoint(url, tmp_path / "there")
    with pytest.raises(CheckpointError, match="manifest names a path outside it"):
        read_in_place(url)
    assert find_remote_checkpoint(ROOT) == Found(None, (url,))
    assert not (tmp_path / "there").exists()


class Bomb:
    """Unpickled by an ordinary reader, it would make a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sentinel),)


def test_crafted_pickles_on_s3_run_no_code(s3: S3Server, s3_root: str, tmp_path: Path) -> None:
    local = save(tmp_path, 1)
    url = upload_checkpoint(local, s3_root)
    bomb = Bomb(tmp_path / "sentinel")
    put(url, read_metadata(local), tensors=pickle.dumps(bomb))
    with pytest.raises(CheckpointError, match=r"refused: it names \w+\.mkdir"):
        read_in_place(url)

    torch.save({"x": bomb}, tmp_path / "evil.pt")
    put(
        url, read_metadata(local), tensors=(local / FILES[0]).read_bytes(),
        state=(tmp_path / "evil.pt").read_bytes(),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"rank0\.pt: cannot be read: refused"):
        read_in_place(url)

    torch.save(bomb, tmp_path / "tensor.pt")
    size = (local / FILES[1]).stat().st_size
    RemoteFolder(url).write(FILES[1], (tmp_path / "tensor.pt").read_bytes().ljust(size, b"\0"))
    put(url, read_metadata(local), tensors=(local / FILES[0]).read_bytes())
    with pytest.raises(CheckpointError):
        read_in_place(url)
    assert not (tmp_path / "sentinel").exists()


def test_reading_in_place_moves_only_what_is_asked_for(
    s3: S3Server, s3_root: str, tmp_path: Path
) -> None:
    """Of 24 MB in three tensors, one is read; ranges of whole chunks around it."""
    stored = {f"model.{name}": torch.randn(1000, 2000) for name in "abc"}
    url = upload_checkpoint(save(tmp_path, 1, tensors=stored), s3_root)
    s3.requests.clear()
    into = {"model.b": torch.zeros(1000, 2000)}
    load_checkpoint(url, tensors=into, rank=0, group=None)
    assert torch.equal(into["model.b"], stored["model.b"])
    ranges = [r.removeprefix("bytes=").split("-") for _, path, r in s3.requests if "distcp" in path]
    moved = sum(int(end) - int(start) + 1 for start, end in filter(lambda r: len(r) == 2, ranges))
    assert 8e6 < moved < 18e6


def test_missing_tensors_and_other_shapes_are_named(tmp_path: Path) -> None:
    url = upload_checkpoint(save(tmp_path, 1), ROOT)
    with pytest.raises(CheckpointError, match=r"model\.a has shape \(3, 4\), the model wants"):
        load_checkpoint(url, tensors=tensors(rows=5), rank=0, group=None)
    with pytest.raises(CheckpointError, match=r"has no tensor model\.b"):
        load_checkpoint(url, tensors={"model.b": torch.ones(1)}, rank=0, group=None)


def test_pruning_keeps_the_rule_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 12):
        upload_checkpoint(save(tmp_path, step), ROOT)
    RemoteFolder(f"{ROOT}/step9").delete([METADATA_FILE])  # an upload that was cut
    prune_checkpoints(ROOT, Retention(keep_last=2), newest=10)
    assert RemoteFolder(ROOT).folders() == ["step10", "step12", "step2"]
    assert saved_steps(ROOT) == [2, 10, 12]


def test_a_removal_cut_anywhere_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    urls = [upload_checkpoint(save(tmp_path, step), ROOT) for step in (1, 2)]
    for count in range(4):
        with monkeypatch.context() as patch:
            cut_after(count, patch)
            prune_checkpoints(ROOT, Retention(keep_last=1), newest=2)
        assert "old checkpoints cannot be removed: deleting" in caplog.text
        assert saved_steps(ROOT) == ([1, 2] if count == 0 else [2])
        assert find_remote_checkpoint(ROOT) == Found(urls[1])
    prune_checkpoints(ROOT, Retention(keep_last=1), newest=2)
    assert RemoteFolder(ROOT).folders() == ["step2"]


def test_shares_are_even_and_complete() -> None:
    sizes = [7, 100, 60, 40, 1, 3]
    files = {str(i): FileEntry(size, "") for i, size in enumerate(sizes)}
    metadata = CheckpointMetadata(
        version=1, step=1, tokens=0, engine="ddp", world_size=2, files=files
    )
    shares = [share_of(metadata, rank, 2) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(files)
    assert [sum(files[name].size for name in share) for share in shares] == [107, 104]

"""The run at a URL on this machine: what is fetched, what is left alone, and what is replaced."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.folder import saved_steps
from toolkit.checkpoint.retention import Retention
from toolkit.cli import main as cli
from toolkit.errors import CheckpointError, RunError
from toolkit.launch import remote_run
from toolkit.launch.pushing import Pusher, push_all
from toolkit.launch.remote_run import (
    bring_up_to_date,
    check_not_ahead,
    local_copy,
    run_and_step,
    runs_at,
    take_over,
)
from toolkit.runs.config import RunConfig, folder_of_url
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lock import RunLock
from toolkit.runs.status import RunStatus, read_status
from toolkit.storage.remote import RemoteFolder

COPY = RUN_FILES.copy_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def status(attempt: int, host: str = "a", **more: Any) -> RunStatus:
    now = f"2026-01-01T00:00:0{attempt}Z"
    fields = {"experiment": "e", "name": "n", "state": "running", "created": now[:-2] + "0Z"}
    return RunStatus(
        **fields | more, attempt=attempt, started=now, updated=now, host=host, pid=attempt
    )


def write_run(folder: Path, attempt: int, *steps: int, host: str = "a", metrics: int = 0) -> Path:
    """A run at the last of `steps`."""
    for name, data in {
        RUN_FILES.status: msgspec.json.encode(status(attempt, host)),
        RUN_FILES.config: b"{}",
        RUN_FILES.train_metrics: b'{"step": 1}\n' * metrics,
        "tb/train/events": b"e",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for step in steps:
        save(folder, step, attempt)
    return folder


def save(folder: Path, step: int, attempt: int) -> None:
    save_checkpoint(
        folder / "checkpoints", step=step, tokens=step, rank_state={}, engine="single",
        tensors={"model.a": torch.full((2,), float(step * 10 + attempt))}, rank=0, group=None,
    )  # fmt: skip


def push(folder: Path, url: str) -> None:
    pusher = Pusher(folder, RemoteFolder(url), Retention(keep_last=None))
    pusher.begin()
    push_all(pusher)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of attempt 2 with steps 2 and 4."""
    url = f"file://{tmp_path}/store/run"
    push(write_run(tmp_path / "writer", 2, 2, 4, metrics=100_000), url)
    return url


def test_an_empty_machine_gets_the_run_with_its_newest_checkpoint(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    take_over(url, folder)
    writer = tmp_path / "writer"
    for name in (RUN_FILES.status, RUN_FILES.train_metrics, "tb/train/events"):
        assert (folder / name).read_bytes() == (writer / name).read_bytes()
    assert RemoteFolder(url).exists("metrics/train.jsonl.part1")
    assert saved_steps(folder / "checkpoints") == [4]
    assert not (folder / COPY).exists()


@pytest.mark.parametrize(
    ("attempt", "host", "stays"),
    [(2, "a", True), (3, "a", True), (1, "a", False), (2, "b", False)],
    ids=["the writer's own", "not pushed yet", "gone on elsewhere", "two from one"],
)
def test_who_is_ahead_is_kept(
    url: str, tmp_path: Path, attempt: int, host: str, stays: bool
) -> None:
    folder = write_run(tmp_path / "here", attempt, 4, 5, host=host)
    (folder / "metrics" / "eval.jsonl").write_text("later")
    take_over(url, folder)
    there = read_status(folder)
    assert there is not None
    assert (there.attempt, there.host) == ((attempt, host) if stays else (2, "a"))
    assert saved_steps(folder / "checkpoints") == ([4, 5] if stays else [4])
    assert (folder / "metrics" / "eval.jsonl").exists() is stays
    aside = tmp_path / "here.replaced"
    if stays:
        check_not_ahead(url, folder)
        assert not aside.exists()
        return
    assert (aside / "metrics" / "eval.jsonl").read_text() == "later"
    assert saved_steps(aside / "checkpoints") == [4, 5]
    saved = json.loads((folder / "checkpoints" / "step4" / ".metadata.json").read_text())
    own = json.loads((tmp_path / "writer" / "checkpoints/step4/.metadata.json").read_text())
    assert saved["xxh3"] == own["xxh3"]


def test_what_was_only_fetched_follows_the_url(url: str, tmp_path: Path) -> None:
    folder = local_copy(url)
    assert folder == folder_of_url(url)
    assert (folder / COPY).exists()
    assert not (folder / "tb").exists()
    with pytest.raises(RunError, match="nobody has trained it here"):
        check_not_ahead(url, folder)
    push(write_run(tmp_path / "writer", 2, 6), url)  # the same attempt goes on
    assert saved_steps(local_copy(url) / "checkpoints") == [4, 6]  # 4 is there too
    step = local_copy(f"{url}/checkpoints/step2/")
    assert (step.name, step.parent.parent) == ("step2", folder)
    with pytest.raises(CheckpointError, match=r"step5.*not a committed checkpoint"):
        local_copy(f"{url}/checkpoints/step5")


def test_a_folder_that_is_still_trained_in_is_not_set_aside(url: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "here", 1, 4)
    lock = RunLock(folder)
    lock.acquire()
    with pytest.raises(RunError, match=r"another process still trains it in .*--work-dir"):
        take_over(url, folder)
    assert saved_steps(folder / "checkpoints") == [4]
    lock.release()


def test_nothing_is_removed_that_was_not_fetched(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    mine = [folder / name for name in ("logs/mine.txt", "metrics/mine.txt", "tb/x", "notes.md")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    save(folder, 1, attempt=1)
    RemoteFolder(url).write("metrics/more.jsonl", b"{}")
    for fetch in (False, True):
        bring_up_to_date(url, folder, is_writer=fetch)
        RemoteFolder(url).delete(["metrics/more.jsonl"])
        assert (folder / "metrics/more.jsonl").exists() is not fetch
    assert all(path.exists() for path in mine)
    assert saved_steps(folder / "checkpoints") == [4]
    assert (folder / "checkpoints" / "step1.invalid").is_dir()


@pytest.mark.parametrize("name", ["../other/x", "metrics/../../x", "/x", "metrics//x", "./x"])
def test_names_that_are_none_of_a_run_are_refused_before_anything_is_touched(
    name: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = RemoteFolder.versions

    def more(self: RemoteFolder) -> dict[str, tuple[int, str]]:
        return versions(self) | {name: (1, "v"), "metadata/": (0, "v"), "": (0, "v")}

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    monkeypatch.setattr(RemoteFolder, "versions", more)
    with pytest.raises(RunError, match=f"'{name}' is no name of a file of a run"):
        take_over(url, tmp_path / "here")
    assert not (tmp_path / "here").exists()
    assert (tmp_path / "other" / "mine").exists()


def test_what_is_here_already_is_not_fetched_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = local_copy(url)
    with monkeypatch.context() as patch:
        patch.setattr(remote_run, "_fetch_file", None)
        patch.setattr(remote_run, "download_newest", None)
        assert local_copy(url) == folder
    (folder / RUN_FILES.train_metrics).unlink()
    shutil.rmtree(local_copy(url) / "checkpoints")
    assert (folder / RUN_FILES.train_metrics).exists()
    assert saved_steps(local_copy(url) / "checkpoints") == [4]


def test_a_url_of_something_else_is_left_alone(url: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_run(other, 1)
    (other / RUN_FILES.status).write_bytes(msgspec.json.encode(status(1, name="another")))
    with pytest.raises(RunError, match=r"holds another run \(e/n of .*\) than .*e/another of"):
        take_over(url, other)
    with pytest.raises(RunError, match="holds another run"):
        check_not_ahead(url, other)
    above = url.rpartition("/")[0]
    with pytest.raises(RunError, match=r"holds other files \(run\) and no run; choose another URL"):
        take_over(above, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_fetch_cut_short_is_done_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, left = tmp_path / "here", [3]
    read = RemoteFolder.read

    def dying(self: RemoteFolder, *args: Any) -> bytes:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return read(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "read", dying)
        with pytest.raises(KeyboardInterrupt):
            take_over(url, folder)
    assert read_status(folder) is None
    take_over(url, folder)
    assert saved_steps(folder / "checkpoints") == [4]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    RemoteFolder(url).write("checkpoints/step4/train/rank0.pt", b"")
    take_over(url, tmp_path / "here")
    assert saved_steps(tmp_path / "here" / "checkpoints") == [2]
    assert "step4" in caplog.text


def test_a_full_disk_is_one_line(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["resume", url, "--work-dir", str(tmp_path / "here")]
    with monkeypatch.context() as patch:
        full = SimpleNamespace(free=0)
        patch.setattr(shutil, "disk_usage", lambda _: full)
        assert cli.run(words) == 1
    assert capsys.readouterr().err.count("GB are needed on the disk of") == 1

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(remote_run, "write_atomic", refuse)
    assert cli.run(words) != 0
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("No space left on device: free some space there")


def test_a_work_dir_that_is_a_file_is_one_line(url: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write there .*name another folder with --work-dir"):
        local_copy(url, str(tmp_path / "file"))


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/run"
    write_run(tmp_path / "store" / "run", 1)
    out = tmp_path / "here"
    (out / "metadata").mkdir(parents=True)
    (out / "tb").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="'tb/train/events' would be written outside"):
        take_over(url, out)
    assert set(before) <= {*tmp_path.rglob("*")}
    assert not (tmp_path / "train" / "events").exists()


def test_runs_at_a_url_are_listed(url: str, tmp_path: Path) -> None:
    push(write_run(tmp_path / "other", 1), f"file://{tmp_path}/store/more/second")
    for place in (url, url.rpartition("/")[0]):
        found = runs_at(place)
        assert url in [record.folder for record in found]
        assert {record.state for record in found} == {"dead"}
    assert len(found) == 2
    with pytest.raises(RunError, match=r"no run there \(no metadata/status.json\)"):
        local_copy(f"{url}/nothing")


def test_names_of_urls_and_folders() -> None:
    assert run_and_step("s3://b/run/checkpoints/step7/") == ("s3://b/run", 7)
    assert run_and_step("s3://b/run/step7") == ("s3://b/run/step7", None)
    config = RunConfig(save_folder="s3://b/a run/", work_dir="/scratch")
    local = config.on_this_machine()
    assert local["mirror"] == "s3://b/a run"
    assert local["name"] == "a-run"
    assert local["save_folder"] == config.folder == str(folder_of_url("s3://b/a run", "/scratch"))
    assert Path(local["save_folder"]).name.startswith("b-a-run-")
    assert RunConfig(save_folder="runs/x").on_this_machine() == {}
    with pytest.raises(ValueError, match="is no URL; a folder is file:///its/path"):
        RunConfig(mirror="/mnt/x")
    with pytest.raises(ValueError, match="save_folder is a URL already"):
        RunConfig(mirror="s3://b/x", save_folder="s3://b/y")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/run", "file://tmp/run"])
def test_where_no_run_can_be_is_refused_before_anything_is_asked(url: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"three slashes|http:// is for reading token files"):
        local_copy(url, str(tmp_path))

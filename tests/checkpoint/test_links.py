"""Checkpoints, or the folder of them, behind symbolic links; and what is set aside."""

from pathlib import Path

import pytest
import torch

from tests.s3 import BUCKET
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.find import find_checkpoint, find_remote_checkpoint
from toolkit.checkpoint.folder import saved_steps
from toolkit.checkpoint.remote import upload_checkpoint
from toolkit.checkpoint.retention import Retention, prune_checkpoints
from toolkit.commands.verify import check_checkpoint, verify_checkpoints
from toolkit.hf.source import find_source
from toolkit.runs.manager import RunManager
from toolkit.runs.registry import run_of_checkpoint
from toolkit.storage.atomic import remove_tree
from toolkit.storage.remote import RemoteFolder


def save(root: Path, step: int) -> Path:
    return save_checkpoint(
        root, step=step, tokens=0, tensors={"model.a": torch.ones(9)}, rank_state={"step": step},
        engine="single", rank=0, group=None,
    )  # fmt: skip


def move_behind_link(folder: Path, elsewhere: Path) -> Path:
    target = folder.rename(elsewhere / folder.name)
    folder.symlink_to(target, target_is_directory=True)
    return target


def test_pruning_removes_the_link_and_leaves_what_it_leads_to(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "disk"
    elsewhere.mkdir()
    for step in (1, 2, 3, 4):
        save(root, step)
    targets = [move_behind_link(root / f"step{step}", elsewhere) for step in (1, 3)]
    before = sorted(p.name for p in targets[0].rglob("*"))
    (root / "step0").symlink_to(tmp_path / "not mounted", target_is_directory=True)
    assert find_checkpoint(root).checkpoint == root / "step4"
    prune_checkpoints(root, Retention(keep_last=2), newest=4)
    assert sorted(p.name for p in root.iterdir()) == ["step0", "step3", "step4"]
    assert sorted(p.name for p in targets[0].rglob("*")) == before
    assert (root / "step0").is_symlink()
    assert "a link to" in str(check_checkpoint(root / "step0").problem)
    assert check_checkpoint(root / "step3").problem is None


def test_one_that_cannot_be_removed_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from toolkit.checkpoint import retention

    def refuse_first(folder: Path) -> None:
        if folder.name == "step1":
            raise PermissionError("not yours")
        remove_tree(folder)

    for step in (1, 2, 3):
        save(tmp_path, step)
    monkeypatch.setattr(retention, "remove_tree", refuse_first)
    prune_checkpoints(tmp_path, Retention(keep_last=1), newest=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step1", "step3"]
    assert "old checkpoints cannot be removed: not yours" in caplog.text


def test_damaged_ones_neither_count_nor_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step3" / "train" / "rank0.pt").write_bytes(b"")
    (tmp_path / "step1" / ".metadata.json").write_bytes(b"{")
    prune_checkpoints(tmp_path, Retention(keep_last=2), newest=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step1.invalid", "step2", "step3.invalid", "step4",
    ]  # fmt: skip


def test_saving_a_damaged_step_again_keeps_the_damaged_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    data = (folder / "model_and_optim" / "__0_0.distcp").read_bytes()
    (folder / "model_and_optim" / "__0_0.distcp").write_bytes(data[:-1] + b"?")
    save(tmp_path, 2)
    kept = tmp_path / "step2.invalid" / "model_and_optim" / "__0_0.distcp"
    assert kept.read_bytes() == data[:-1] + b"?"
    save(tmp_path, 2)  # whole, so equal: replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step2", "step2.invalid"]


@pytest.mark.parametrize("what", ["step", "checkpoints"])
def test_the_run_of_a_checkpoint_behind_a_link_is_found(tmp_path: Path, what: str) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "disk"
    (run / "metadata").mkdir(parents=True)
    elsewhere.mkdir()
    RunManager(run, experiment="a", name="b").close("finished")
    step = save(run / "checkpoints", 5)
    move_behind_link(step if what == "step" else step.parent, elsewhere)
    assert run_of_checkpoint(step) == run
    assert find_checkpoint(run).checkpoint == step
    assert [report.problem for report in verify_checkpoints(run)] == [None]
    with pytest.raises(Exception, match="does not say which model it is of"):
        find_source(run)


def test_a_kill_between_the_rename_and_the_commit_is_unfinished_not_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / ".metadata.json").unlink()
    report = check_checkpoint(folder)
    assert report.is_leftover
    assert str(report.problem).startswith("unfinished: a crash came between its files")


@pytest.mark.parametrize("store", ["file", "s3"])
def test_damaged_remote_ones_are_kept(
    tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    if store == "s3":
        request.getfixturevalue("s3")
    url = f"file://{tmp_path}/store" if store == "file" else f"s3://{BUCKET}/{tmp_path.name}"
    folders = [save(tmp_path / "own", step) for step in (1, 2, 3)]
    for folder in folders:
        upload_checkpoint(folder, url)
    damaged = RemoteFolder(f"{url}/step1")
    damaged.write("train/rank0.pt", b"cut")
    prune_checkpoints(url, Retention(keep_last=1), newest=3)
    assert RemoteFolder(url).folders() == ["step1", "step3"]
    assert saved_steps(url) == [1, 3]
    upload_checkpoint(folders[0], url)
    assert RemoteFolder(url).folders() == ["step1", "step1.invalid", "step3"]
    assert RemoteFolder(f"{url}/step1.invalid").read("train/rank0.pt") == b"cut"
    assert find_remote_checkpoint(f"{url}/step1").checkpoint == f"{url}/step1"
    prune_checkpoints(url, Retention(keep_last=1), newest=3)
    assert RemoteFolder(url).folders() == ["step1.invalid", "step3"]

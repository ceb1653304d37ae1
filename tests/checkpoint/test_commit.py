"""A checkpoint exists whole or not at all, and runs no code."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec import structs
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from toolkit.checkpoint import retention
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.find import find_checkpoint, set_aside
from toolkit.checkpoint.folder import METADATA_FILE, encode_metadata, read_metadata
from toolkit.checkpoint.load import load_checkpoint
from toolkit.checkpoint.retention import Retention, prune_checkpoints
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.checkpoint.tensors import SafeReader, load_tensors
from toolkit.errors import CheckpointError, TrainingError


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((3, 4), value), "optim.a.step": torch.tensor(value)}


def save(root: Path, step: int, **changes: object) -> Path:
    settings: dict = {
        "step": step,
        "tokens": step * 10,
        "tensors": tensors(float(step)),
        "rank_state": {"step": step},
        "engine": "single",
        "rank": 0,
        "group": None,
    }
    return save_checkpoint(root, **(settings | changes))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    into = tensors(0.0)
    metadata, state = load_checkpoint(folder, tensors=into, rank=0, group=None)
    assert (metadata.step, metadata.tokens, metadata.engine) == (7, 70, "single")
    assert state == {"step": 7}
    assert torch.equal(into["model.a"], torch.full((3, 4), 7.0))
    assert sorted(metadata.files) == [
        "model_and_optim/.metadata",
        "model_and_optim/__0_0.distcp",
        "train/rank0.pt",
    ]


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flip": lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]),
    "cut": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "delete": lambda p: p.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "file",
    ["model_and_optim/.metadata", "model_and_optim/__0_0.distcp", "train/rank0.pt", METADATA_FILE],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    DAMAGE[damage](newer / file)
    with caplog.at_level("WARNING", logger="toolkit"):
        assert find_checkpoint(tmp_path).checkpoint == older
    if (file, damage) != (METADATA_FILE, "delete"):  # then it was never committed
        assert "step2" in caplog.text


def test_an_error_in_the_middle_leaves_nothing_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", fail)
        with pytest.raises(TrainingError, match=r"step2: not saved.* rank 0 on .*disk full"):
            save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step1"]
    assert find_checkpoint(tmp_path).checkpoint == tmp_path / "step1"
    assert save(tmp_path, 2) == find_checkpoint(tmp_path).checkpoint


def test_a_failed_export_costs_only_the_export(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(folder: Path) -> None:
        (folder / "hf").mkdir()
        (folder / "hf" / "half").write_text("x")
        raise OSError("disk full")

    with caplog.at_level("WARNING", logger="toolkit"):
        folder = save(tmp_path, 1, export=fail)
    assert "the checkpoint has no hf/: OSError: disk full" in caplog.text
    assert find_checkpoint(tmp_path).checkpoint == folder
    assert not (folder / "hf").exists()


def test_an_export_is_in_the_manifest(tmp_path: Path) -> None:
    def export(folder: Path) -> None:
        (folder / "hf").mkdir()
        (folder / "hf" / "config.json").write_text("{}")

    folder = save(tmp_path, 1, export=export)
    assert read_metadata(folder).files["hf/config.json"].size == 2


def test_prune_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10):
        save(tmp_path, step)
    (tmp_path / "step9" / METADATA_FILE).unlink()  # a crash before it was written
    for name in ("step11.tmp", ".step1.1-ab.tmp", "step1.invalid"):
        (tmp_path / name).mkdir()
    prune_checkpoints(tmp_path, Retention(keep_last=2), newest=10)
    # What was set aside is the user's to remove.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step1.invalid", "step10", "step2"]


def test_prune_keeps_what_was_just_saved_before_a_damaged_one(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step)
    (tmp_path / "step300" / "train" / "rank0.pt").unlink()
    found = find_checkpoint(tmp_path)
    assert found == (tmp_path / "step200", (tmp_path / "step300",))
    save(tmp_path, 250)
    prune_checkpoints(tmp_path, Retention(keep_last=1), newest=250)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step250", "step300"]
    set_aside(found.rejected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step250", "step300.invalid"]
    assert find_checkpoint(tmp_path) == (tmp_path / "step250", ())


def test_what_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(f"not yours: {folder.name}")

    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(retention, "remove_tree", refuse)
    with caplog.at_level("WARNING", logger="toolkit"):
        prune_checkpoints(tmp_path, Retention(keep_last=1), newest=2)
    assert "old checkpoints cannot be removed: not yours: step1" in caplog.text


def test_a_damaged_step_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "train" / "rank0.pt").unlink()
    with pytest.raises(CheckpointError, match=r"train/rank0\.pt is missing"):
        find_checkpoint(folder)


def test_the_quick_look_sees_sizes_and_the_state_of_rank_0(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    DAMAGE["flip"](tmp_path / "step3" / "train" / "rank0.pt")
    DAMAGE["cut"](tmp_path / "step2" / "model_and_optim" / "__0_0.distcp")
    DAMAGE["flip"](tmp_path / "step1" / "model_and_optim" / "__0_0.distcp")
    assert find_checkpoint(tmp_path, quick=True).checkpoint == tmp_path / "step1"
    assert find_checkpoint(tmp_path).checkpoint is None


def test_a_path_may_be_a_step_a_folder_of_steps_or_a_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 3)
    for path in (folder, tmp_path / "checkpoints", tmp_path):
        assert find_checkpoint(path).checkpoint == folder
    assert find_checkpoint(tmp_path / "nothing").checkpoint is None


def test_missing_tensor_and_other_shape_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1) / "model_and_optim"
    with pytest.raises(CheckpointError, match=r"has no tensor model\.b"):
        load_tensors(folder, {"model.b": torch.zeros(2)}, None)
    with pytest.raises(
        CheckpointError, match=r"model\.a has shape \(3, 4\), the model wants \(3, 5\)"
    ):
        load_tensors(folder, {"model.a": torch.zeros(3, 5)}, None)


class Bomb:
    """Unpickled by an ordinary reader, it would make a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sentinel),)


def test_crafted_metadata_runs_no_code(tmp_path: Path) -> None:
    folder = save(tmp_path, 1) / "model_and_optim"
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "sentinel")))
    with pytest.raises(CheckpointError, match=r"refused: it names \w+\.mkdir"):
        SafeReader(folder).read_metadata()
    assert not (tmp_path / "sentinel").exists()


class Call:
    """Pickled, it calls a function that DCP's own modules define."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def test_metadata_cannot_call_functions_of_dcp_itself(tmp_path: Path) -> None:
    folder = save(tmp_path, 1) / "model_and_optim"
    torch.save(Bomb(tmp_path / "sentinel"), tmp_path / "evil.pt")
    attack = Call(torch_save_to_dcp, tmp_path / "evil.pt", tmp_path / "out")
    (folder / ".metadata").write_bytes(pickle.dumps(attack))
    with pytest.raises(CheckpointError, match=r"refused: it names [\w.]+\.torch_save_to_dcp"):
        SafeReader(folder).read_metadata()
    assert not (tmp_path / "sentinel").exists()


def test_metadata_cannot_turn_a_tensor_into_a_pickle(tmp_path: Path) -> None:
    folder = save(tmp_path, 1) / "model_and_optim"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.a"] = BytesStorageMetadata()
    torch.save(Bomb(tmp_path / "sentinel"), folder / "__0_0.distcp")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"refused: it names [\w.]+\.BytesStorageMetadata"):
        load_tensors(folder, tensors(), None)
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("path", ["../other/__0_0.distcp", "/etc/passwd"])
def test_metadata_cannot_name_files_elsewhere(tmp_path: Path, path: str) -> None:
    folder = save(tmp_path, 1) / "model_and_optim"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        load_tensors(folder, tensors(), None)


def test_crafted_rank_state_runs_no_code(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    torch.save({"x": Bomb(tmp_path / "sentinel")}, folder / "train" / "rank0.pt")
    with pytest.raises(CheckpointError, match=r"rank0\.pt: cannot be read"):
        load_checkpoint(folder, tensors=tensors(), rank=0, group=None)
    assert not (tmp_path / "sentinel").exists()


def test_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    metadata = read_metadata(folder)
    files = {name.replace("train/rank0.pt", "../../../x"): e for name, e in metadata.files.items()}
    (folder / METADATA_FILE).write_bytes(encode_metadata(structs.replace(metadata, files=files)))
    with pytest.raises(CheckpointError, match=r"manifest names a path outside it: '\.\./\.\."):
        find_checkpoint(folder)

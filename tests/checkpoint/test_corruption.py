"""Any damage to any file of a committed checkpoint is found and named; the one before is used."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from msgspec import structs

from tests.tiny import build, module_config, open_environment, tiny_model, train_steps
from tests.workers import WorkerPool
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.find import find_checkpoint
from toolkit.checkpoint.folder import METADATA_FILE, encode_metadata, read_metadata
from toolkit.checkpoint.load import load_checkpoint
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.errors import CheckpointError
from toolkit.hf.export import export_hf

LLAMA = {"num_key_value_heads": 4, "vocab_multiple": 1}
ENGINES = ("fsdp", "zero3")


def save_twice(engine: str, root: str) -> None:
    """Steps 1 and 2, each with weights for transformers."""
    config = module_config(engine)
    env = open_environment(config)

    def export(unfinished: Path) -> None:
        weights = iterate_tensors(unfinished / "model_and_optim", "model.")
        export_hf(tiny_model(**LLAMA), weights, unfinished / "hf", tokenizer_folder=None)

    try:
        module = build(config, env, **LLAMA)
        for step in (1, 2):
            train_steps(module, step - 1, step)
            save_checkpoint(
                Path(root), step=step, tokens=0, tensors=module.state_tensors(),
                rank_state={"rank": env.rank}, engine=engine, rank=env.rank, group=env.cpu_group,
                export=export,
            )  # fmt: skip
    finally:
        env.close()


@pytest.fixture(scope="module")
def saved(workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    roots = {engine: tmp_path_factory.mktemp(engine) for engine in ENGINES}
    for engine, root in roots.items():
        workers.run(2, save_twice, engine, str(root))
    return roots


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder with step1 and step2 that may be damaged."""

    def make(engine: str) -> Path:
        return Path(shutil.copytree(saved[engine], tmp_path / engine))

    return make


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def damages(path: Path) -> dict[str, Callable[[], None]]:
    """The ways to damage a file: one bit at the start, in the middle, at the end; cut; gone."""
    size = path.stat().st_size
    places = {"start": 0, "middle": size // 2, "end": size - 1}
    ways: dict[str, Callable[[], None]] = {
        f"flip at the {name}": lambda position=position: flip(path, position)  # type: ignore[misc]
        for name, position in places.items()
    }
    return ways | {
        "cut by one byte": lambda: os.truncate(path, size - 1),
        "cut to nothing": lambda: os.truncate(path, 0),
        "grown": lambda: os.truncate(path, size + 1),
        "delete": path.unlink,
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_any_damage_to_any_file_is_found(
    copy: Callable[[str], Path], engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = copy(engine)
    newest = root / "step2"
    names = sorted(read_metadata(newest).files)
    assert {"model_and_optim/__0_0.distcp", "model_and_optim/__1_0.distcp"} < set(names)
    assert {"train/rank1.pt", "hf/model.safetensors", "hf/config.json"} < set(names)
    missed = []
    for name in names:
        content = (newest / name).read_bytes()
        for way, damage in damages(newest / name).items():
            caplog.clear()
            damage()
            if find_checkpoint(root).checkpoint != root / "step1":
                missed.append(f"{name}: {way}")
            assert name in caplog.text, f"{name}: {way}: the warning names the file"
            (newest / name).write_bytes(content)
    assert missed == []
    assert find_checkpoint(root).checkpoint == newest


def test_every_byte_of_the_manifest_counts(copy: Callable[[str], Path]) -> None:
    root = copy("fsdp")
    path = root / "step2" / METADATA_FILE
    content = path.read_bytes()
    for position in range(len(content)):
        flip(path, position)
        found = find_checkpoint(root, quick=True).checkpoint
        assert found == root / "step1", content[max(0, position - 20) : position + 20]
        path.write_bytes(content)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        assert find_checkpoint(root, quick=True).checkpoint == root / "step1", size
    path.write_bytes(content)
    assert find_checkpoint(root).checkpoint == root / "step2"


def test_checkpoints_whose_manifest_has_no_hash_yet_are_read(copy: Callable[[str], Path]) -> None:
    checkpoint = copy("fsdp") / "step2"
    before = structs.replace(read_metadata(checkpoint), version=1, xxh3="")
    (checkpoint / METADATA_FILE).write_bytes(msgspec.json.encode(before))
    assert find_checkpoint(checkpoint).checkpoint == checkpoint
    (checkpoint / METADATA_FILE).write_bytes(
        msgspec.json.encode(structs.replace(before, version=2))
    )
    with pytest.raises(CheckpointError, match=r"\.metadata\.json has changed since it was saved"):
        find_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["../step1/train/rank0.pt", "/etc/hostname", "hf/../../x"])
def test_a_manifest_may_not_leave_its_folder(copy: Callable[[str], Path], name: str) -> None:
    checkpoint = copy("fsdp") / "step2"
    metadata = read_metadata(checkpoint)
    files = {name if k == "train/rank1.pt" else k: entry for k, entry in metadata.files.items()}
    crafted = encode_metadata(structs.replace(metadata, files=files))
    (checkpoint / METADATA_FILE).write_bytes(crafted)
    with pytest.raises(CheckpointError, match=f"manifest names a path outside it: '{name}'"):
        find_checkpoint(checkpoint)


def test_a_link_that_leaves_the_folder_is_refused(
    copy: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = copy("fsdp")
    inside, outside = root / "step2" / "train" / "rank1.pt", root / "elsewhere.pt"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert find_checkpoint(root).checkpoint == root / "step1"
    assert "outside" in caplog.text


class Bomb:
    """Unpickled by an ordinary reader, it would make a folder."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sentinel),)


def test_tensor_files_that_would_run_code_are_refused(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("fsdp") / "step2"
    sentinel = tmp_path / "sentinel"
    metadata = pickle.loads((folder / "model_and_optim" / ".metadata").read_bytes())
    (index, info), *_ = (
        item
        for item in metadata.storage_data.items()
        if item[1].relative_path == "__0_0.distcp" and item[0].fqn.startswith("model.")
    )
    torch.save([Bomb(sentinel), torch.zeros(4096)], tmp_path / "bomb.pt")
    bomb = (tmp_path / "bomb.pt").read_bytes()
    path = folder / "model_and_optim" / info.relative_path
    info.offset, info.length = path.stat().st_size, len(bomb)
    with path.open("ab") as file:
        file.write(bomb)
    (folder / "model_and_optim" / ".metadata").write_bytes(pickle.dumps(metadata))
    entry = metadata.state_dict_metadata[index.fqn]
    tensors = {index.fqn: torch.zeros(entry.size)}
    with pytest.raises(CheckpointError, match=r"cannot be loaded: refused: it names posix\.mkdir,"):
        load_checkpoint(folder, tensors=tensors, rank=0, group=None)
    assert not sentinel.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_state_that_would_run_code_is_refused_by_name(
    copy: Callable[[str], Path], tmp_path: Path, rank: int
) -> None:
    folder = copy("zero3") / "step2"
    torch.save({"trainer": Bomb(tmp_path / "sentinel")}, folder / "train" / f"rank{rank}.pt")
    with pytest.raises(
        CheckpointError, match=rf"rank{rank}\.pt: cannot be read: refused: it names posix\.mkdir,"
    ):
        load_checkpoint(folder, tensors={}, rank=rank, group=None)
    assert not (tmp_path / "sentinel").exists()

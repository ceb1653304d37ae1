"""The shards of a state that a rank writes: copied, live, and planned once."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.serialization import get_crc32_options, set_crc32_options

from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool
from toolkit.checkpoint import tensors as tensors_module
from toolkit.checkpoint.folder import FileEntry
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.checkpoint.shard_file import Frame, ShardFile, framed_bytes
from toolkit.checkpoint.tensors import iterate_tensors
from toolkit.checkpoint.untrusted import Archive
from toolkit.storage.atomic import hash_file


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((30, 4), value), "model.b": torch.full((7,), value)}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return dict(iterate_tensors(folder, ""))


def write(shards: ShardWriter, folder: Path, resolve: object) -> dict[str, FileEntry]:
    written = shards.write(folder, resolve)  # type: ignore[arg-type]
    shards.write_metadata(folder, [written.results])
    return written.files


def test_a_copy_holds_what_was_there_when_it_was_made(tmp_path: Path) -> None:
    shards, tensors = ShardWriter(None), state(1.0)
    resolve = shards.copy(tensors)
    tensors["model.a"].fill_(2.0)
    write(shards, tmp_path, resolve)
    assert stored(tmp_path)["model.a"].unique().tolist() == [1.0]


def test_live_pieces_are_what_is_there_when_they_are_written(tmp_path: Path) -> None:
    shards, tensors = ShardWriter(None), state(1.0)
    resolve = shards.live(tensors)
    tensors["model.a"].fill_(2.0)
    write(shards, tmp_path, resolve)
    assert stored(tmp_path)["model.a"].unique().tolist() == [2.0]


def test_the_next_copy_uses_the_same_memory(tmp_path: Path) -> None:
    shards = ShardWriter(None)
    where = []
    for value in (1.0, 2.0):
        resolve = shards.copy(state(value))
        write(shards, tmp_path / str(value), resolve)
        where.append([resolve(item).data_ptr() for item in shards._plan.items])
    assert where[0] == where[1]
    assert stored(tmp_path / "2.0")["model.b"].tolist() == [2.0] * 7


def test_another_layout_is_planned_anew(tmp_path: Path) -> None:
    shards = ShardWriter(None)
    shards.copy(state(1.0))
    assert shards.nbytes == 4 * (30 * 4 + 7)
    more = state(1.0) | {"model.c": torch.zeros(3, dtype=torch.int64)}
    write(shards, tmp_path, shards.copy(more))
    assert shards.nbytes == 4 * (30 * 4 + 7) + 8 * 3
    assert stored(tmp_path)["model.c"].tolist() == [0, 0, 0]


def test_hashes_taken_while_writing_are_the_files(tmp_path: Path) -> None:
    shards = ShardWriter(None)
    entries = write(shards, tmp_path, shards.copy(state(3.0)))
    assert list(entries) == ["__0_0.distcp"]
    for name, entry in entries.items():
        path = tmp_path / name
        assert entry == FileEntry(path.stat().st_size, hash_file(path))


def replicated(folder: str) -> tuple[int, list[str]]:
    env = open_environment(module_config("ddp"))
    try:
        shards = ShardWriter(env.checkpoint_group)
        shards.copy(state(1.0))
        return shards.nbytes, [item.index.fqn for item in shards._plan.items]
    finally:
        env.close()


def test_what_all_ranks_hold_is_written_and_copied_once(
    workers: WorkerPool, tmp_path: Path
) -> None:
    shares = workers.run(2, replicated, str(tmp_path))
    assert sorted(name for _, names in shares for name in names) == ["model.a", "model.b"]
    assert sum(size for size, _ in shares) == 4 * (30 * 4 + 7)


def saved_by_torch(tensor: torch.Tensor) -> bytes:
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        stream = io.BytesIO()
        torch.save(tensor, stream)
    finally:
        set_crc32_options(before)
    return stream.getvalue()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4),
        torch.arange(12.0).view(3, 4).T.contiguous(),
        torch.tensor(5, dtype=torch.int64),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.ones(100_000, dtype=torch.bfloat16),
    ],
)
def test_a_shard_lies_in_its_file_as_torch_saves_it(tmp_path: Path, tensor: torch.Tensor) -> None:
    size = framed_bytes(tensor.dtype, tensor.shape)
    with ShardFile.open(tmp_path / "a", 2 * size) as file:
        assert [file.add(tensor), file.add(tensor)] == [(0, size), (size, size)]
        file.sync()
    assert (tmp_path / "a").read_bytes() == 2 * saved_by_torch(tensor)


def test_views_are_written_by_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(20.0).view(4, 5)
    some = {"model.rows": whole[1:3], "model.columns": whole[:, 1:3], "model.turned": whole.T}
    shards = ShardWriter(None)
    write(shards, tmp_path, shards.live(some))
    assert {k: t.tolist() for k, t in stored(tmp_path).items()} == {
        k: t.tolist() for k, t in some.items()
    }


def test_only_shards_in_another_frame_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardWriter(None)
    write(shards, tmp_path, shards.live(state(1.0)))
    parsed: list[int] = []

    class Counted(Archive):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            parsed.append(1)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(tensors_module, "Archive", Counted)
    assert stored(tmp_path)["model.b"].tolist() == [1.0] * 7
    assert not parsed
    # As another version of torch may write them.
    monkeypatch.setattr(tensors_module, "frame_of", lambda dtype, shape: Frame(b"other", b""))
    assert stored(tmp_path)["model.b"].tolist() == [1.0] * 7
    assert len(parsed) == 2

"""What a load reads, and where it puts it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.tensors import load_tensors
from toolkit.distributed.shards import Box, LocalShard
from toolkit.errors import CheckpointError

BIG = torch.arange(1_000_000.0).view(1000, 1000)


def save(root: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder = save_checkpoint(
        root, step=1, tokens=0, tensors=tensors, rank_state={}, engine="single", rank=0, group=None
    )
    return folder / "model_and_optim"


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read took, `.metadata` included."""
    counts: list[int] = []
    create = FileSystem.create_stream

    @contextmanager
    def counting(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        with create(self, path, mode) as file:
            yield _Counting(file, counts)

    monkeypatch.setattr(FileSystem, "create_stream", counting)
    return counts


class _Counting:
    def __init__(self, file: Any, counts: list[int]) -> None:
        self._file, self._counts = file, counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, *size: int) -> bytes:
        data = self._file.read(*size)
        self._counts.append(len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._counts.append(count)
        return count


def test_a_rank_reads_little_more_than_its_own_slice(tmp_path: Path, bytes_read: list[int]) -> None:
    folder = save(tmp_path, {"big": BIG})
    part = torch.zeros(50_000)
    bytes_read.clear()
    load_tensors(folder, {"big": LocalShard.flat(part, shape=BIG.shape, start=333_333)}, None)
    assert torch.equal(part, BIG.view(-1)[333_333:383_333])
    assert sum(bytes_read) < part.nbytes + 50_000


@pytest.mark.parametrize(
    ("shape", "box", "most"),
    [
        # Columns: their rows are read, some at a time.
        ((1000, 1000), Box((500, 100), (250, 300), 0), 250 * 1000),
        # Rows of stacked matrices, which are stretches of each.
        ((10, 100, 1000), Box((2, 50, 0), (5, 25, 1000), 0), 5 * 25 * 1000),
        # Columns of stacked matrices: of the rows that are wanted.
        ((10, 100, 1000), Box((2, 50, 10), (5, 25, 3), 0), 5 * 25 * 1000),
    ],
)
def test_a_rectangle_takes_little_memory_and_no_rows_besides_its_own(
    tmp_path: Path,
    bytes_read: list[int],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    box: Box,
    most: int,
) -> None:
    monkeypatch.setattr("toolkit.checkpoint.tensors._PART_BYTES", 100_000)
    whole = BIG.view(shape)
    folder = save(tmp_path, {"big": whole})
    part = torch.zeros(math.prod(box.sizes))
    bytes_read.clear()
    load_tensors(folder, {"big": LocalShard(part, shape=whole.shape, boxes=[box])}, None)
    place = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
    assert torch.equal(part.view(box.sizes), whole[place])
    assert sum(bytes_read) < 4 * most + 50_000
    assert max(bytes_read) <= 100_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 2)])
def test_every_type_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (torch.arange(torch.Size(shape).numel()) % 3).to(dtype).view(shape)
    folder = save(tmp_path, {"x": value})
    into = torch.ones(shape, dtype=dtype)
    load_tensors(folder, {"x": into}, None)
    assert torch.equal(into, value)


def test_other_type_other_layout_and_stored_transposed(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(3, 4)
    folder = save(tmp_path, {"x": value, "y": value.t()})
    half, turned, back = torch.zeros(3, 4).half(), torch.zeros(4, 3).t(), torch.zeros(4, 3)
    load_tensors(folder, {"x": half}, None)
    load_tensors(folder, {"x": turned, "y": back}, None)
    assert torch.equal(half, value.half())
    assert torch.equal(turned, value)
    assert torch.equal(back, value.t())


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    folder = save(tmp_path, {"big": BIG})
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:2_000_000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tensors(folder, {"big": torch.zeros_like(BIG)}, None)

import mmap
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from toolkit.data.instances import rows
from toolkit.data.instances.rows import Pages


class Recorded:
    """A memory map that remembers what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def madvise(self, how: int, start: int, size: int) -> None:
        assert how == mmap.MADV_WILLNEED
        self.asked.append((start, size))


def pages(array: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Recorded]:
    found, recorded = Pages(array), Recorded()
    assert isinstance(found._map, mmap.mmap)
    monkeypatch.setattr(found, "_map", recorded)
    return found, recorded


def test_whole_pages_of_each_row_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.bin"
    np.zeros(100_000, dtype=np.uint16).tofile(path)
    array = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))
    found, recorded = pages(array, monkeypatch)
    found.request(np.array([0, 2048, 3000]), 1024)
    size = mmap.PAGESIZE
    inside = 6000 - 6000 // size * size
    assert recorded.asked == [
        (0, 2048),
        (4096 // size * size, 2048 + 4096 % size),
        (6000 - inside, 2048 + inside),
    ]


def test_an_offset_into_the_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.bin"
    np.zeros(100_000, dtype=np.uint16).tofile(path)
    array = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))[2048:]
    found, recorded = pages(array, monkeypatch)
    found.request(np.array([0, 10]), np.array([1024, 20]))
    assert recorded.asked == [(4096 // mmap.PAGESIZE * mmap.PAGESIZE, 2048)]  # 20 are too few


def test_rows_in_memory_are_not_asked_for() -> None:
    Pages(np.zeros(10_000)).request(np.array([0]), 5000)


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_THREAD"), reason="only Linux counts by thread")
def test_tokens_in_memory_are_soon_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.bin"
    np.zeros(100_000, dtype=np.uint16).tofile(path)
    found, recorded = pages(np.asarray(np.memmap(path, dtype=np.uint16, mode="r")), monkeypatch)
    blocks = [0]
    usage = lambda who: SimpleNamespace(ru_inblock=blocks[0], ru_majflt=0)  # noqa: E731
    monkeypatch.setattr(rows.resource, "getrusage", usage)

    def asked(reads: int) -> int:
        before = len(recorded.asked)
        for _ in range(reads):
            found.request(np.array([0]), 1024)
        return len(recorded.asked) - before

    assert asked(100) == rows.CACHED_READS
    blocks[0] += 8  # A read had to wait: asked for again, and for longer.
    assert asked(100) == 2 * rows.CACHED_READS
    for _ in range(5):  # From a disk all the time.
        blocks[0] += 8
        assert asked(1) == 1

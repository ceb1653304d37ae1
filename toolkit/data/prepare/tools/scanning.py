"""Reading whole token files, block by block: memory stays the same whatever their size."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

BLOCK_TOKENS = 4 << 20
"""Numbers held at once; 16 MiB of uint32."""

Advance = Callable[[int], None]
"""Called with the bytes that were read since the last time."""


def token_blocks(
    path: Path, dtype: str, *, first_byte: int = 0, num_tokens: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """The numbers of a file in order, as `(position of the first, block)`.

    A block is valid until the next one. What is no whole number at the end is left out.
    """
    item = np.dtype(dtype)
    buffer = np.empty(BLOCK_TOKENS, dtype=item)
    view = buffer.data.cast("B")
    position, left = 0, num_tokens
    with path.open("rb", buffering=0) as file:
        file.seek(first_byte)
        while left is None or left > 0:
            wanted = view[
                : (BLOCK_TOKENS if left is None else min(left, BLOCK_TOKENS)) * item.itemsize
            ]
            filled = 0
            while filled < len(wanted) and (read := file.readinto(wanted[filled:])):
                filled += read
            block = buffer[: filled // item.itemsize]
            if len(block):
                yield position, block
            position += len(block)
            if filled < len(wanted):
                return
            if left is not None:
                left -= len(block)


def memory_map(path: Path, dtype: str) -> np.ndarray:
    """The whole numbers of a file as a read-only memory map; an empty array for an empty file."""
    count = path.stat().st_size // np.dtype(dtype).itemsize
    if count == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


@contextlib.contextmanager
def scan_progress(what: str, num_bytes: int, *, enabled: bool = True) -> Iterator[Advance]:
    """A bar on a terminal (standard error), nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield lambda count: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=num_bytes)
        yield lambda count: bar.advance(task, count)

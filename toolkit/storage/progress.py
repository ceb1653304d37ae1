"""A bar for work that is measured in bytes."""

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]
"""Called with the bytes that were done since the last time."""


@contextlib.contextmanager
def byte_progress(
    what: str, num_bytes: int, *, done: int = 0, enabled: bool = True
) -> Iterator[Advance]:
    """A bar on a terminal (standard error), nothing elsewhere. `done` bytes were done before."""
    from rich.console import Console

    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield lambda count: None
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=num_bytes or None, completed=done)
        yield lambda count: bar.advance(task, count)

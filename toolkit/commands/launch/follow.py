"""Log files that grow, line by line."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_SECONDS = 0.5
"""Between two looks at the files."""
_SECONDS_STATUS = 5.0
"""Between two questions whether the job is over."""


def follow_files(
    files: Callable[[], Sequence[Path]], is_over: Callable[[], bool] | None
) -> Iterator[str]:
    """The lines of log files, of several with the name of each before it. `files` is asked again
    and again: a job that is started anew may write another one. Without `is_over` what there is;
    with it until it says so, and what is written then."""
    read: dict[Path, int] = {}
    asked_at, over = float("-inf"), is_over is None
    while True:
        for file in files():
            with contextlib.suppress(FileNotFoundError), file.open("rb") as stream:
                stream.seek(read.get(file, 0))
                whole, sign, rest = stream.read().rpartition(b"\n")
                if over and rest:
                    whole, sign, rest = whole + sign + rest, b"", b""
                read[file] = read.get(file, 0) + len(whole) + len(sign)
                name = f"{file.name}: " if len(files()) > 1 else ""
                for line in whole.decode(errors="replace").splitlines():
                    yield f"{name}{line}"
        if over or is_over is None:
            return
        if time.monotonic() - asked_at >= _SECONDS_STATUS:
            asked_at, over = time.monotonic(), is_over()
        if not over:
            time.sleep(_SECONDS)

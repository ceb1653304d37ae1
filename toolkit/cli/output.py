"""Standard output and error that may go away: a closed pipe, terminal or descriptor ends nothing.

`toolkit train x 2>&1 | head` has a reader for three lines, and a run has hours. What the console
loses is in the run's log and metrics.
"""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN)
"""The other end will not come back. Others (a full disk) may pass: the next line is tried."""


def open_missing_streams() -> None:
    """Give /dev/null to standard streams that this process was started without (`>&-`).

    A file opened later would get their numbers, and every library's messages.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            mode = os.O_RDONLY if descriptor == 0 else os.O_WRONLY
            opened = os.open(os.devnull, mode)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def outlive_readers() -> None:
    """Let writing to standard output and error never fail from here on."""
    sys.stdout = cast(TextIO, LastingStream(sys.stdout))
    sys.stderr = cast(TextIO, LastingStream(sys.stderr))


def has_lost_reader(stream: TextIO) -> bool:
    """Whether nobody reads the pipe that `stream` writes to."""
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return True


class LastingStream(io.TextIOBase):
    """A text stream whose writing side never fails; all else is the wrapped stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def close(self) -> None:
        """Nothing: it stands for the process's own stream."""

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def __getattribute__(self, name: str) -> Any:
        # `encoding`, `buffer` and others exist in the base class, without values.
        if name in ("encoding", "errors", "newlines", "buffer", "name", "mode", "reconfigure"):
            return getattr(object.__getattribute__(self, "_stream"), name)
        return super().__getattribute__(name)

    def _lose(self, error: OSError | ValueError) -> None:
        """Buffers and other libraries that write to the descriptor must not fail either."""
        if isinstance(error, OSError) and error.errno in _GONE:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

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
from typing import Any, TextIO

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
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def outlive_readers() -> None:
    """Let writing to standard output and error never fail from here on."""
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)


def has_lost_reader(stream: TextIO) -> bool:
    """Whether nobody reads the pipe that `stream` writes to."""
    with contextlib.suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return True


def lasting(stream: TextIO) -> TextIO:
    """A stream to the same file, whose writing side never fails."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    file: Any = _LastingFile(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),  # of PYTHONUNBUFFERED, as it was
        stream.encoding,
        "backslashreplace",  # letters that a terminal lacks
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _LastingFile(io.FileIO):
    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        try:
            return super().write(data) or size
        except OSError as error:
            if error.errno in _GONE:  # nor must other libraries that write there fail
                with contextlib.suppress(OSError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self.fileno())
                    os.close(nowhere)
            return size

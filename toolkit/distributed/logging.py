"""Rank-aware logging: some ranks speak on the console, every rank writes its own file.

Errors that end a run are shown by the command line, with one line on the console; their tracebacks
are in the files.
"""

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from rich import get_console

from toolkit import signals
from toolkit.config.secrets import mask_secrets
from toolkit.distributed.config import LogRanks

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LOGGER = logging.getLogger("toolkit")


class _ConsoleHandler(logging.Handler):
    """Through rich's shared console, so that lines do not tear a progress bar."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.INFO)
        self._prefix = f"[rank {rank}] " if rank else ""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_only_in_files", False):
            return
        text = mask_secrets(record.getMessage())
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        text = f"{self._prefix}{text}"
        # A console that is gone takes nothing with it; SystemExit is how rich tells of a pipe.
        # rich prints again what it could not finish printing.
        with signals.holding_back(), contextlib.suppress(OSError, ValueError, SystemExit):
            console = get_console()
            if console.is_terminal:
                console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                sys.stderr.write(text + "\n")


class _LogFile(logging.FileHandler):
    """Loses lines that cannot be written, and says so once."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._has_failed:
            self._has_failed = True
            _LOGGER.warning("%s: lines are lost: %s", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _MaskingFormatter(logging.Formatter):
    """Log files stay with the run: no secrets in lines or tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return str(mask_secrets(super().format(record)))


def setup_logging(rank: int, *, local_rank: int = 0, log_ranks: LogRanks = "rank0") -> None:
    """Console output of the toolkit's own loggers on the ranks that `log_ranks` names (see
    `trainer.log_ranks`); the others write their files only."""
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False
    for handler in list(_LOGGER.handlers):
        _LOGGER.removeHandler(handler)
    speaks = {"rank0": rank == 0, "local_rank0": local_rank == 0, "all": True}[log_ranks]
    # Without any handler, Python would print warnings itself.
    _LOGGER.addHandler(_ConsoleHandler(rank) if speaks else logging.NullHandler())


def add_log_file(folder: Path, rank: int) -> logging.Handler:
    """Append everything from INFO on to `folder/rank{rank}.log`; returns the handler to remove.

    Where no file can be opened the handler does nothing, and a warning says so.
    """
    try:
        folder.mkdir(exist_ok=True)
        handler: logging.Handler = _LogFile(folder / f"rank{rank}.log")
    except OSError as error:
        _LOGGER.warning("no log file: %s", error)
        handler = logging.NullHandler()
    handler.setFormatter(_MaskingFormatter(_FORMAT))
    # First of all: a request to stop may come in the middle of a line on the console.
    _LOGGER.handlers.insert(0, handler)
    return handler


def has_log_file() -> bool:
    """Whether this process writes a log file of a run."""
    return any(isinstance(handler, _LogFile) for handler in _LOGGER.handlers)


def is_set_up() -> bool:
    """Whether somebody has said where lines go: `setup_logging`, or a script by `logging`."""
    return _LOGGER.hasHandlers()


def log_failure(file: logging.Handler, error: BaseException, *, rank: int, step: int) -> None:
    """Write the traceback of `error`, which ends the run, to the log file of this rank only."""
    what = f"rank {rank} on {socket.gethostname()} failed at step {step}"
    name, caught = "toolkit.failure", (type(error), error, error.__traceback__)
    file.handle(logging.LogRecord(name, logging.ERROR, __file__, 0, what, None, caught))


@contextlib.contextmanager
def quieter(level: int, *names: str) -> Iterator[None]:
    """Only lines from `level` on of the loggers called `names`, until the block is left."""
    before = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in before:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in before.items():
            logger.setLevel(old)

"""The one family of errors a user sees, and the exit codes of our process.

Every message says where (a config key, a file, a flag), what is wrong, and what to do next, in one
line. `cli` prints a `ToolkitError` as that line on rank 0 and exits with the code of its class; any
other exception is a defect of ours and keeps its traceback.
"""

import contextlib
import errno
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from toolkit.wording import shortened

T = TypeVar("T")

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75
"""Stopped on request with a committed checkpoint: `toolkit resume` continues (EX_TEMPFAIL)."""


class ToolkitError(Exception):
    """Base of the family: something failed in a way we can explain in one line.

    The line is `key: problem`. A caller whose user knows the key by another name (an option of a
    command) sets `key` to that name; nobody edits the text.

    Args:
        problem: what is wrong, and what to do.
        key: dotted path of the config value that it is about; empty where there is none.
        about: path of the value that is refused, or of each that `problem` speaks of; default:
            `key`.
    """

    exit_code = EXIT_FAILED
    only_here = False
    """Set on a rank that has an error which rank 0 does not report: this rank shows it itself."""

    def __init__(
        self, problem: str = "", *, key: str = "", about: str | tuple[str, ...] = ()
    ) -> None:
        super().__init__(problem)
        self.key = key
        about = about or key
        self.about = ((about,) if about else ()) if isinstance(about, str) else about

    def is_about(self, *paths: str) -> bool:
        """Whether it speaks of one of `paths`, or of a value inside or around it."""
        pairs = [(f"{path}.", f"{about}.") for path in paths for about in self.about]
        return any(a.startswith(b) or b.startswith(a) for a, b in pairs)

    @property
    def problem(self) -> str:
        """The line without its key."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{shortened(self.key)}: {self.problem}" if self.key else self.problem


class BadInputError(ToolkitError):
    """The user's input cannot work as given; nothing was changed on disk."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(BadInputError):
    """A config value, name or combination is wrong."""


class SeveralErrors(ConfigError):
    """What is wrong with one input, all of it; `cli` prints each of `errors` on its own line."""

    def __init__(self, errors: Sequence[ToolkitError]) -> None:
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = tuple(errors)

    @property
    def problem(self) -> str:
        """A line for each of `errors`, as it is now."""
        return "\n".join(str(error) for error in self.errors)


class DataError(BadInputError):
    """The text, tokenizer or token files cannot be used."""


class RunError(BadInputError):
    """The run folder cannot be used as asked (exists, locked, not writable, not a run)."""


class CheckpointError(BadInputError):
    """A checkpoint is missing, damaged or does not fit."""


class TrainingError(ToolkitError):
    """Training itself cannot go on (for example: too many non-finite steps in a row)."""


class StorageError(ToolkitError):
    """A remote folder cannot be reached, or refuses what is asked of it."""


class UnfitServerError(StorageError):
    """A server answers, and can never give what is asked of it: another one is needed."""

    exit_code = EXIT_BAD_INPUT


_MACHINE = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EROFS: "its file system is read-only (look in the system's log), or choose another",
    errno.EIO: "the disk or its server has errors (look in the system's log)",
    errno.ESTALE: "its server lost it; mount it again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.ENOMEM: "the machine has no memory left",
}


def reason_of_machine(error: BaseException) -> str | None:
    """One line for an error of disk or machine that a user can mend: where, what, and what to do;
    None for any other."""
    if not isinstance(error, OSError) or error.errno not in _MACHINE:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}: {_MACHINE[error.errno]}"


@contextlib.contextmanager
def renaming(before: str, after: str) -> Iterator[None]:
    """Bad input of the block names settings by where the user gave them: what matches the pattern
    `before` in a message or a key becomes `after`, as `re.sub` has it."""
    try:
        yield
    except BadInputError as error:
        for one in error.errors if isinstance(error, SeveralErrors) else (error,):
            one.args = (re.sub(before, after, one.problem),)
            one.key = re.sub(before, after, one.key)
            one.about = tuple(re.sub(before, after, path) for path in one.about)
        raise


class ErrorList:
    """Errors found so far, so that checks which do not depend on each other all run."""

    def __init__(self, errors: Iterable[ToolkitError] = ()) -> None:
        self.errors: list[ToolkitError] = []
        for error in errors:
            self.add(error)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep the bad input that the block raises, and go on behind it."""
        try:
            yield
        except BadInputError as error:
            self.add(error)

    def ask(self, check: Callable[..., T], *arguments: Any, **options: Any) -> T | None:
        """The answer of `check`; None where it raises bad input, which is kept."""
        with self.collecting():
            return check(*arguments, **options)
        return None

    def add(self, error: ToolkitError) -> None:
        """Keep `error`, or each one that it stands for; the same message once."""
        parts = error.errors if isinstance(error, SeveralErrors) else (error,)
        known = {str(other) for other in self.errors}
        self.errors += [part for part in parts if str(part) not in known]

    def raise_any(self) -> None:
        """Raise what was kept: the error itself where it is one, else `SeveralErrors`."""
        if len(self.errors) == 1:
            raise self.errors[0] from None
        if self.errors:
            raise SeveralErrors(self.errors) from None

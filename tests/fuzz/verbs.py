"""The command line as a user has it, and what it must never do whatever it is given."""

import contextlib
import io
import os
import signal
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from toolkit.cli import main as cli

SECONDS = 250
"""A verb on a tiny input takes one or two; a hang takes for ever."""
CODES = (0, 1, 2, 75)


class HangError(BaseException):
    """Not an `Exception`: no handler of the code under test takes it for its own."""


def run(args: Sequence[str | Path], canary: Path) -> str | None:
    """What is wrong with the answer of a verb; None: it is one."""
    output = io.StringIO()

    def ring(signum: int, frame: FrameType | None) -> None:
        raise HangError("".join(traceback.format_stack(frame)[-6:]))

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = cli.run([str(arg) for arg in args])
    except HangError as error:
        return f"hangs at {error}"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    text = output.getvalue()
    if canary.exists():
        return "the payload was executed"
    if code not in CODES:
        return f"exit code {code}: {text}"
    if "Traceback" in text:
        return text
    errors = [line for line in text.splitlines() if "error:" in line.partition(" ")[0]]
    if code == 2 and "--explain" not in args and (len(errors) != 1 or len(errors[0]) > 2000):
        return f"not one line: {text[:4000]}"
    return None


def canary_of(folder: Path) -> Path:
    """A file that a payload would make."""
    return Path(os.path.abspath(folder)) / "executed"

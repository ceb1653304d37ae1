"""`toolkit` in a process of its own, forked where everything is imported already: what the command
does, without the seconds of a start of Python."""

import atexit
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.workers import SERVER


class Forked:
    """As `subprocess.Popen(["toolkit", *words])`, or `["python", file, *words]`, both streams in
    a file."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        output: Path,
        file: Path | None = None,
    ) -> None:
        arguments = (list(words), str(cwd), dict(env), str(output), file)
        self._process = SERVER.Process(target=_in_place, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Exit code (negative: a signal); a `TimeoutError` where there is none in time."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _in_place(
    words: list[str], cwd: str, env: dict[str, str], output: str, script: Path | None
) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    run_to_the_end(words, output, script)


def run_to_the_end(words: list[str], output: str, script: Path | None = None) -> None:
    """In the forked process: what `toolkit` or `script` does, to the end of an interpreter."""
    from toolkit.cli.main import main

    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [str(script or "toolkit"), *words]
    code: object = 1
    try:
        if script is None:
            main()
        else:
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1)

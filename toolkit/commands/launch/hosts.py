"""Processes on machines without a scheduler: starting, finding and ending them, here or by `ssh`.

All of it is one bash script per call, read from standard input, so nothing is quoted twice.
"""

import subprocess
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from toolkit.commands.launch.target import LaunchError

SECONDS = 60.0
"""How long one call may take."""
_SSH_FAILED = 255
_BEGAN = "%a %b %d %H:%M:%S %Y"
"""How `ps` writes when a process began."""
_SECONDS_CLOCK = 2.0
"""How far apart two readings of one start may be."""


class Host(NamedTuple):
    """A machine: this one, or as `ssh` knows it."""

    name: str
    """Empty: this machine."""
    options: tuple[str, ...] = ()
    """Of `ssh`."""

    @property
    def command(self) -> list[str]:
        """What runs a script that it reads from standard input."""
        if not self.name:
            return ["bash", "-s"]
        common = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        return ["ssh", *common, *self.options, "--", self.name, "bash -s"]

    @property
    def label(self) -> str:
        """Its name in messages and names of files."""
        return self.name.rpartition("@")[2] or "local"

    def run(self, script: str, *, seconds: float = SECONDS) -> str:
        """What `script` prints. Raises LaunchError: the machine cannot be reached, or the script
        fails, with its last line."""
        try:
            done = subprocess.run(
                self.command, input=script, capture_output=True, text=True, timeout=seconds,
                check=False, start_new_session=True, errors="replace",
            )  # fmt: skip
        except FileNotFoundError:
            raise LaunchError(f"{self.label}: no `{self.command[0]}` on this machine") from None
        except subprocess.TimeoutExpired:
            raise LaunchError(f"{self.label}: no answer for {seconds:.0f} s") from None
        if done.returncode == 0:
            return done.stdout
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        reason = said[-1] if said else f"exit code {done.returncode}"
        if self.name and done.returncode == _SSH_FAILED:
            reason = f"ssh: {reason.removeprefix('ssh: ')}; try `ssh {self.name} true`"
        raise LaunchError(f"{self.label}: {reason}")


class Process(NamedTuple):
    """A process that `start` began, by number and by when it began: a later one may have the same
    number."""

    pid: int
    began: str


def start_script(words: str, log: str, note: str) -> str:
    """A script that starts the command `words` (shell) in a session of its own, its output added to
    the file `log`, and prints pid and start. The process outlives the connection.

    The file `note` is there already, and gets pid and start too, for who does not hear what is
    printed. Without it nothing starts: whoever asked has given up.
    """
    return (
        f'[ -e {note} ] || {{ echo "too late: withdrawn" >&2; exit 1; }}\n'
        # Some systems have no `setsid`, and start the command without it.
        f"$(command -v setsid) nohup {words} >> {log} 2>&1 < /dev/null &\n"
        "pid=$!\n"
        "sleep 0.1\n"
        f'echo "$pid $(LC_ALL=C ps -o lstart= -p "$pid")" | tee {note}\n'
    )


def started(said: str) -> Process:
    """What the script of `start_script` prints."""
    pid, _, began = said.strip().splitlines()[-1].partition(" ")
    return Process(int(pid), " ".join(began.split()))


def is_running(host: Host, process: Process) -> bool:
    """Whether the process, and no later one, runs. Raises LaunchError: nobody can say."""
    said = host.run(f"LC_ALL=C ps -o stat= -o lstart= -p {process.pid} || true")
    state, _, began = said.strip().partition(" ")
    return bool(state) and state[0] != "Z" and _is_same(" ".join(began.split()), process.began)


def _is_same(began: str, before: str) -> bool:
    """Whether two starts that `ps` told are one. It counts from when the machine booted, and that
    moves with the clock when the clock is set."""
    try:
        one, other = (datetime.strptime(text, _BEGAN) for text in (began, before))
    except ValueError:
        return began == before
    return abs((one - other).total_seconds()) <= _SECONDS_CLOCK


def ask_to_end(host: Host, process: Process, *, now: bool) -> bool:
    """SIGTERM, by which a run saves and ends; `now`: a second one, by which it ends at once.
    Whether there was somebody to ask."""
    pid = process.pid
    again = f"for i in {{1..30}}; do kill -0 {pid} || exit 0; sleep 0.1; done; kill -TERM {pid}"
    if not is_running(host, process):
        return False
    host.run(f"exec 2> /dev/null; kill -TERM {pid}; {again if now else 'true'}; true")
    return True


def first_words(names: Sequence[str]) -> str:
    """`a, b and 3 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

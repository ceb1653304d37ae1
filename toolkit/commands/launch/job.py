"""What is sent to a target: pure data, and the lines of shell that start it on each machine."""

import re
import shlex
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from toolkit.runs.files import RUN_FILES

_FIRST_PORT, _PORTS = 20_000, 10_000
_UNUSUAL = re.compile(r"[^\w.-]+", re.ASCII)
_CONFIG_FILE = "/tmp/toolkit-config.json"
"""In a container."""


class Member(NamedTuple):
    """One run of a job; a job array has several."""

    folder: str
    """The run folder as the machines of the job see it: an absolute path or a URL."""
    config: str
    """The resolved config, JSON; without secrets."""

    @property
    def config_file(self) -> str:
        """Where the config lies, on targets that share this machine's files."""
        return f"{self.folder}/{RUN_FILES.launch_config}"


class Job(NamedTuple):
    """Runs, and how each of them is started."""

    name: str
    description: str
    """What the runs are for, in a line."""
    members: tuple[Member, ...]
    nodes: int
    """Machines of one run."""
    processes: int
    """Processes on each of them."""
    engine: str | None
    interface: str | None
    environment: Mapping[str, str]
    setup: tuple[str, ...]
    """Lines of shell that come before the command."""
    python: str
    workdir: str | None
    """The folder that the command runs in; None: the container's own."""
    port: int
    debug: bool

    @property
    def run(self) -> Member:
        """The only member."""
        (member,) = self.members
        return member

    @property
    def start(self) -> str:
        """The words of shell that begin every command: Python and the package."""
        return f"{shlex.quote(self.python)} -m toolkit"

    def flags(self, *, rank: str | None = None, head: str = "", port: str | None = None) -> str:
        """The flags that make `toolkit train` and `toolkit resume` the launcher of the processes of
        one machine. `rank` (None: left out), `head` and `port` are words of shell: the number of
        the machine, the address of machine 0, and its port if that is not the job's."""
        words = []
        if self.processes > 1 or self.nodes > 1 or self.engine is not None:
            words.append(f"--processes {self.processes}")
        if self.engine is not None:
            words.append(f"--engine {shlex.quote(self.engine)}")
        if self.nodes > 1:
            words.append(f"--nodes {self.nodes} --head {head}:{port or self.port}")
            if self.interface is not None:
                words.append(f"--interface {shlex.quote(self.interface)}")
            if rank is not None:
                words.append(f"--node-rank {rank}")
        return " ".join([*words, *(["--debug"] if self.debug else [])])

    def preamble(self) -> list[str]:
        """The lines before the command: where it runs, and with what."""
        lines = [] if self.workdir is None else [f"cd {shlex.quote(self.workdir)} || exit 2"]
        lines += [f"export {name}={shlex.quote(v)}" for name, v in self.environment.items()]
        return [*lines, *self.setup]


def plain_name(name: str) -> str:
    """`name` in letters that every scheduler takes."""
    return _UNUSUAL.sub("-", name).strip("-.") or "run"


def port_of(folder: str) -> int:
    """The port of machine 0 where the machines of the run in `folder` meet: always the same for
    one run, and most likely another one for another run."""
    return _FIRST_PORT + zlib.crc32(folder.encode()) % _PORTS


def script_with_config(job: Job, *, rank: str, head: str) -> str:
    """What a container without this machine's files runs: the config, and the command in the
    shell's place, so that signals reach it. A run folder that holds a run is continued."""
    flags, folder = job.flags(rank=rank, head=head), shlex.quote(job.run.folder)
    lines = [
        "set -e",
        *job.preamble(),
        f"cat > {_CONFIG_FILE} <<'END_OF_CONFIG'",
        job.run.config,
        "END_OF_CONFIG",
        f"exec {job.start} train {_CONFIG_FILE} --save-folder {folder} {flags}",
    ]
    return "\n".join(lines).rstrip() + "\n"

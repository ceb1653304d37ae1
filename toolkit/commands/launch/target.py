"""`Target`: where `toolkit launch` sends a run, as its options and what it must be able to do."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from toolkit.commands.launch import TARGETS
from toolkit.commands.launch.job import Job
from toolkit.config import Config
from toolkit.config.named import is_name, named, users_class
from toolkit.config.secrets import is_secret_name, mask_secrets
from toolkit.config.types import nearest
from toolkit.distributed.engines import EngineName
from toolkit.errors import ConfigError, ErrorList, ToolkitError

State = Literal["pending", "running", "finished", "failed", "stopped", "unknown"]
OVER = ("finished", "failed", "stopped")

_VARIABLE = re.compile(r"[A-Za-z_]\w*\Z", re.ASCII)


class LaunchError(ToolkitError):
    """A target refuses a job, or cannot be reached; nothing of the job is left there."""

    exit_code = 2


class JobStatus(NamedTuple):
    """What a target says of a job."""

    state: State
    detail: str = ""
    """Its own words: a reason, machines, an exit code."""


class Submission(NamedTuple):
    """What a target answers."""

    ids: tuple[str, ...]
    """The name of the job there, for each member."""
    details: dict[str, Any]
    """What `status`, `logs` and `stop` need besides; plain JSON types."""
    link: str = ""
    """Where a browser shows it."""


class Record(Config, kw_only=True):
    """Content of `metadata/launch.json`: where the newest job of a run is."""

    target: str
    """Name of the target, or "module:Class"."""
    options: dict[str, Any]
    """Of the target, as given."""
    id: str
    link: str = ""
    folder: str
    """The run folder as the machines of the job see it."""
    submitted: str
    """ISO 8601, UTC."""
    nodes: int = 1
    details: dict[str, Any]
    """What the target keeps of it."""


class Target(Config, kw_only=True):
    """Options that every target has, and what a target must answer.

    A target of your own derives from this class, adds fields (which become options: `--field
    VALUE`, dashes for underscores) and the methods below; `toolkit launch --to module:Class`.
    """

    nodes: int = 1
    """Machines of the run."""
    gpus: int | None = None
    """GPUs of each machine."""
    processes: int | None = None
    """Processes on each machine; default: one for each of `--gpus`, else one."""
    engine: EngineName | None = None
    """How weights are shared, as in `toolkit train --engine`."""
    env: tuple[str, ...] = ()
    """NAME=VALUE, a variable of all processes; again for more. No secrets: they go by `--secret`.
    """
    secret: tuple[str, ...] = ()
    """NAME of a secret variable; again for more. Only the name is written anywhere."""
    setup: tuple[str, ...] = ()
    """A line of shell before the command, such as `module load cuda`; again for more."""
    python: str | None = None
    """The Python on those machines that has the toolkit; default: this one, in containers
    `python`."""
    interface: str | None = None
    """Network interface that the machines listen on and talk over, such as ib0; default: the one
    that has, or reaches, machine 0's address."""
    port: int | None = None
    """Port of machine 0 where the machines meet; default: one that follows from the run folder."""

    is_elsewhere: ClassVar[bool] = False
    """Whether its machines do not see this machine's files, as containers."""
    follows: ClassVar[bool] = False
    """Whether `toolkit launch` shows the log until the end, unless told to `--detach`."""

    @property
    def num_processes(self) -> int:
        """On each machine."""
        return self.processes if self.processes is not None else self.gpus or 1

    @property
    def num_nodes(self) -> int:
        """Machines of the run."""
        return self.nodes

    @property
    def environment(self) -> dict[str, str]:
        """`env` by name."""
        return dict(pair.split("=", 1) for pair in self.env)

    def problems(self) -> Iterator[tuple[str, str]]:
        """(option, what is wrong with it); nothing is asked of a scheduler or network. The option
        is empty for `--secret`: a message that says `--secret: WORD` would hide the word."""
        for name in ("nodes", "gpus", "processes"):
            value = getattr(self, name)
            if value is not None and value < (0 if name == "gpus" else 1):
                yield name, f"must be {0 if name == 'gpus' else 1} or more, not {value}"
        if self.python == "":
            yield "python", "is empty; name a Python, or leave it out"
        if self.port is not None and not 0 < self.port < 65536:
            yield "port", f"ports are 1 to 65535, not {self.port}"
        for pair in self.env:
            name, sign, value = pair.partition("=")
            if not sign or not _VARIABLE.match(name):
                yield "env", f"write NAME=VALUE, not {mask_secrets(pair)!r}"
            elif is_secret_name(name) or mask_secrets(value) != value:
                yield "env", f"{name!r} looks like a secret; leave it out, and name it by --secret"
        for given in self.secret:
            if not _VARIABLE.match(given.partition("=")[0]):
                yield "", "after --secret, write the NAME of a variable"
        for line in self.setup:
            if (shown := mask_secrets(line)) != line:
                yield "setup", f"name secrets by --secret, not in a line of shell: {shown}"

    def check(self) -> None:
        """Raise ConfigError for options that cannot work, all of them at once."""
        found = ErrorList()
        for name, problem in self.problems():
            found.add(ConfigError(problem, key=name and f"--{name.replace('_', '-')}"))
        found.raise_any()

    def check_folder(self, folder: str, work_dir: str | None) -> None:
        """Raise ConfigError where what is written to the run folder would be lost, or not seen by
        all machines."""

    def code_lines(self) -> tuple[str, ...]:
        """Lines of shell that fetch the code, for targets that can. Raises ToolkitError."""
        return ()

    def members(self) -> Sequence[Sequence[str]]:
        """Overrides of the config for each run of a job; one run without any, unless it is an
        array."""
        return [[]]

    def render(self, job: Job) -> str:
        """Exactly what `submit` would submit, as text. Needs no library and no scheduler."""
        raise NotImplementedError

    def submit(self, job: Job) -> Submission:
        """Submit the job, whole or not at all. Raises ToolkitError."""
        raise NotImplementedError

    def status(self, record: Record) -> JobStatus:
        """How the job is. Raises ToolkitError: nobody answers."""
        raise NotImplementedError

    def logs(self, record: Record, *, follow: bool) -> Iterator[str]:
        """The newest log, line by line; with `follow` until the job ends."""
        raise NotImplementedError

    def stop(self, record: Record, *, now: bool) -> str:
        """End the job, after a checkpoint unless `now`; what was done, as a line."""
        raise NotImplementedError


def target_class(name: str) -> type[Target]:
    """The class of a target: one of `TARGETS`, or a user's "module:Class". Raises ConfigError:
    there is none, or it is not derived from `Target`."""
    if name in TARGETS:
        return named(TARGETS[name])
    if not is_name(name):
        hint = nearest(name, TARGETS)
        known = f"did you mean {hint}?" if hint else f"there are {', '.join(TARGETS)}"
        raise ConfigError(f"no such target: {name!r}; {known}", key="--to")
    found = users_class(name, key="--to")
    if not (isinstance(found, type) and issubclass(found, Target)):
        raise ConfigError(f"{name}: derive it from {__name__}.Target", key="--to")
    return found


def check_secrets_here(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Problems of secrets that travel in the environment of the process that submits."""
    for name in names:
        if "=" in name:
            yield "", "after --secret, write only the name of the variable"
        elif _VARIABLE.match(name) and name not in os.environ:
            yield "", f"{name} of --secret is not set here; export it first"


def quote_problems(name: str, words: str) -> Iterator[tuple[str, str]]:
    """Problems of an option that holds words of shell."""
    try:
        shlex.split(words)
    except ValueError as error:
        yield name, f"{words!r}: {str(error).lower()}"


def no_library(package: str, extra: str) -> ConfigError:
    """The error of a target whose client is not installed."""
    return ConfigError(
        f'--to {extra} needs the package {package}: pip install "toolkit[{extra}]" '
        "(--dry-run works without it)"
    )

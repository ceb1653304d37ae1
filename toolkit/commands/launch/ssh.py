"""`--to ssh`: a few machines that share a folder, by the `ssh` of the system."""

import contextlib
import secrets
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import toolkit
from toolkit.commands.launch.hosts import Host
from toolkit.commands.launch.job import Job
from toolkit.commands.launch.on_hosts import OnHosts
from toolkit.commands.launch.target import LaunchError, quote_problems
from toolkit.runs.files import RUN_FILES

_VERSIONS = (
    "import importlib.metadata as m, toolkit; print(toolkit.__version__, m.version('torch'))"
)


class SSH(OnHosts, kw_only=True):
    """Machines without a scheduler: one `ssh` to each, and a shared run folder."""

    hosts: str = ""
    """The machines as `ssh` knows them, A,B,...; the first is machine 0."""
    head_address: str | None = None
    """Name or address of machine 0 for the others; default: the first of `--hosts`."""
    ssh_option: tuple[str, ...] = ()
    """An option of `ssh`, such as `-p 2222`; again for more."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if quotes := [
            found for text in self.ssh_option for found in quote_problems("ssh_option", text)
        ]:
            yield from quotes
            return
        names = [host.name for host in self.hosts_used()]
        if not names:
            yield "hosts", "name the machines: --hosts A,B"
        if len(set(names)) < len(names):
            yield "hosts", f"a machine stands there twice: {self.hosts}"
        if any(name.startswith("-") or name.split() != [name] for name in names):
            yield "hosts", f"no name of a machine: {self.hosts!r}"
        if names and self.nodes not in (1, len(names)):
            yield "nodes", f"{self.nodes}, and --hosts names {len(names)}; leave --nodes out"
        if self.secret:
            keep = "keep them in a file of each machine that `--setup 'source FILE'` reads"
            yield "", f"ssh carries no secrets; leave out --secret, and {keep}"

    def hosts_used(self) -> list[Host]:
        options = tuple(word for text in self.ssh_option for word in shlex.split(text))
        return [Host(name, options) for name in self.hosts.split(",") if name]

    @property
    def num_nodes(self) -> int:
        return len(self.hosts_used())

    def head(self) -> str:
        return self.head_address or self.hosts_used()[0].label

    def probe(self, job: Job, hosts: Sequence[Host]) -> None:
        """Raise LaunchError where a machine does not see the run folder, or has other versions of
        toolkit or torch than machine 0."""
        token = secrets.token_hex(8)
        file = Path(job.run.folder) / RUN_FILES.metadata / f"launch-{token}"
        file.write_text(token)
        try:
            found = {host.label: self._look(job, host, file, token) for host in hosts}
        finally:
            with contextlib.suppress(OSError):
                file.unlink()
        first, *others = found.items()
        for name, versions in others:
            if versions != first[1]:
                has = "{} has toolkit {} and torch {}".format
                raise LaunchError(
                    f"{has(first[0], *first[1])}, {has(name, *versions)}; install the same on all"
                )
        if first[1][0] != toolkit.__version__:
            raise LaunchError(
                f"{first[0]} has toolkit {first[1][0]}, and this machine {toolkit.__version__}, "
                "which checked the config; install the same on all"
            )

    def _look(self, job: Job, host: Host, file: Path, token: str) -> tuple[str, str]:
        place = shlex.quote(str(file))
        lines = [
            f'[ "$(cat {place} 2>/dev/null)" = {token} ] || {{ echo no-folder; exit 0; }}',
            *job.preamble(),
            f'{shlex.quote(job.python)} -c "{_VERSIONS}"',
        ]
        said = host.run("\n".join(lines) + "\n").strip().splitlines()
        if said and said[-1] == "no-folder":
            raise LaunchError(
                f"{host.label}: does not see {job.run.folder} of this machine; choose a "
                "--save-folder on a file system that all machines share"
            )
        version, _, torch = (said[-1] if said else "").partition(" ")
        return version, torch

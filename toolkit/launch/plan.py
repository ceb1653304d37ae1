"""Which processes a command line asks for: `--processes`, `--nodes` and what belongs to them."""

from collections.abc import Mapping
from typing import NamedTuple

from toolkit.config.base import in_seconds
from toolkit.distributed.launcher import has_launcher
from toolkit.distributed.ranks import LAUNCH_FOLDER
from toolkit.errors import ConfigError
from toolkit.launch.nodes import DEFAULT_PORT, JOIN_SECONDS, Nodes


class LaunchPlan(NamedTuple):
    """The processes that this machine starts for a run."""

    processes: int
    nodes: Nodes | None = None
    """None: this machine alone."""

    @property
    def starts_workers(self) -> bool:
        """False: this process is the only one."""
        return self.processes > 1 or self.nodes is not None

    @property
    def world_size(self) -> int:
        return self.processes * (self.nodes.number if self.nodes is not None else 1)

    def environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ` as far as layouts look at what a launcher says."""
        sizes = {"WORLD_SIZE": self.world_size, "LOCAL_WORLD_SIZE": self.processes}
        return {**environ, **{name: str(size) for name, size in sizes.items()}}


def plan_launch(
    environ: Mapping[str, str],
    *,
    processes: int | None = None,
    nodes: int | None = None,
    node_rank: int | None = None,
    head: str | None = None,
    interface: str | None = None,
    join_timeout: str | None = None,
) -> LaunchPlan | None:
    """What the options ask for; None where they ask for nothing, or this is a process that was
    started by them. Raises ConfigError: they do not fit each other, or another launcher started
    this process."""
    if LAUNCH_FOLDER in environ:
        return None
    given = {
        "--node-rank": node_rank,
        "--head": head,
        "--interface": interface,
        "--join-timeout": join_timeout,
    }
    if nodes is None and (odd := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"{odd[0]} belongs to --nodes M; add --nodes, or leave it out")
    if processes is None:
        if nodes is not None:
            raise ConfigError("--nodes needs --processes N: how many each machine starts")
        return None
    if has_launcher(environ):
        name = "WORLD_SIZE" if "WORLD_SIZE" in environ else "ACCELERATE_MIXED_PRECISION"
        raise ConfigError(
            f"--processes {processes}: another launcher started this process ({name}="
            f"{environ[name]} in the environment); leave out --processes, or start without it"
        )
    if nodes is None or nodes == 1:
        return LaunchPlan(processes)
    for name, value in (("--node-rank R", node_rank), ("--head HOST", head)):
        if value is None:
            what = "the number of this machine" if "rank" in name else "where node 0 listens"
            raise ConfigError(f"--nodes {nodes} needs {name}: {what}")
    if not 0 <= (node_rank or 0) < nodes:
        raise ConfigError(f"--node-rank {node_rank} with --nodes {nodes}: give 0 to {nodes - 1}")
    host, port = _host_and_port(head or "")
    try:
        seconds = JOIN_SECONDS if join_timeout is None else in_seconds(join_timeout)
    except ValueError as error:
        raise ConfigError(f"--join-timeout: {error}") from None
    return LaunchPlan(processes, Nodes(nodes, node_rank or 0, host, port, interface, seconds))


def _host_and_port(text: str) -> tuple[str, int]:
    """HOST, HOST:PORT, or with an address of IPv6 [HOST]:PORT."""
    host, separator, port = text, "", ""
    if text.startswith("[") or text.count(":") == 1:
        host, separator, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    host = host.removeprefix("[").removesuffix("]")
    number = int(port) if port.isascii() and port.isdecimal() else 0
    if not host or (separator and not 0 < number < 65536):
        raise ConfigError(f"--head {text}: give HOST or HOST:PORT, with a port of 1 to 65535")
    try:
        host.encode("idna")  # as every lookup does
    except UnicodeError:
        raise ConfigError(f"--head {text}: {host} is no name or address of a machine") from None
    return host, number or DEFAULT_PORT

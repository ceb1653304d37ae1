"""`--to local`: this machine, detached, with a log."""

from collections.abc import Iterator

from toolkit.commands.launch.hosts import Host
from toolkit.commands.launch.on_hosts import OnHosts
from toolkit.commands.launch.target import check_secrets_here


class Local(OnHosts, kw_only=True):
    """This machine: the run goes on when you log out."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from check_secrets_here(self.secret)
        if self.nodes > 1:
            yield "nodes", f"--to local is one machine, not {self.nodes}; use --to ssh --hosts A,B"

    def hosts_used(self) -> list[Host]:
        return [Host("")]

"""`--to local`: this machine, detached, with a log."""

import os
from collections.abc import Iterator, Sequence

from toolkit.commands.launch.hosts import Host
from toolkit.commands.launch.job import Job
from toolkit.commands.launch.on_hosts import OnHosts
from toolkit.commands.launch.target import check_secrets_here
from toolkit.errors import ConfigError
from toolkit.launch.capacity import capacity_here
from toolkit.wording import count


class Local(OnHosts, kw_only=True):
    """This machine: the run goes on when you log out."""

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        yield from check_secrets_here(self.secret)
        if self.nodes > 1:
            yield "nodes", f"--to local is one machine, not {self.nodes}; use --to ssh --hosts A,B"

    def probe(self, job: Job, hosts: Sequence[Host]) -> None:
        if not self.gpus:
            return
        here = capacity_here(os.environ | self.environment).gpus
        if here < self.gpus:
            raise ConfigError(
                f"this machine has {count(here, 'GPU') if here else 'no GPU'} to use, not "
                f"{self.gpus}; processes without one are asked for by --processes",
                key="--gpus",
            )

    def hosts_used(self) -> list[Host]:
        return [Host("")]

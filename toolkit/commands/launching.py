"""The options by which a verb starts processes: `--processes`, `--engine`, `--nodes` and theirs."""

import os

from toolkit.distributed.engines import EngineName
from toolkit.distributed.ranks import ENGINE
from toolkit.launch.plan import LaunchPlan, plan_launch


def planned(
    engine: EngineName | None,
    processes: int | None,
    nodes: int | None,
    node_rank: int | None,
    head: str | None,
    interface: str | None,
    join_timeout: str | None,
) -> LaunchPlan | None:
    """What the options ask for; the engine goes into the environment, for this process and those
    that it starts."""
    if engine is not None:
        os.environ[ENGINE] = engine
    return plan_launch(
        os.environ,
        processes=processes,
        nodes=nodes,
        node_rank=node_rank,
        head=head,
        interface=interface,
        join_timeout=join_timeout,
    )

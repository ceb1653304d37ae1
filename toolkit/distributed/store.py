"""The store through which workers of an elastic launcher find each other.

The agent's TCPStore outlives the workers, and torch (2.13) hands it to their successors as it is:
they may read the addresses of the dead, and connect to nobody or wait for ever. So every round of
workers gets keys of its own. The restart count cannot name them: it stays when a node joins.
"""

import datetime
import os
import time
from collections.abc import Mapping

import torch.distributed as dist


def elastic_store(
    rank: int, world_size: int, timeout: datetime.timedelta, environ: Mapping[str, str] = os.environ
) -> dist.Store | None:
    """A store for this round of workers, the same on all ranks; None where no agent keeps one."""
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(
        host_name=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
        world_size=world_size,
        is_master=False,
        timeout=timeout,
    )
    return dist.PrefixStore(f"toolkit/{agree_on_round(store, rank, world_size, timeout)}", store)


def agree_on_round(
    store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta
) -> int:
    """A number that no earlier round had, the same on all ranks of this one.

    Rank 0 counts rounds. The others come with numbers of their own, which are never used again, so
    an answer cannot be one left for a predecessor. Rank 0 answers all that ever came, until
    all of this round have heard it.

    Raises:
        RuntimeError: a rank did not come in time.
    """
    if rank > 0:
        mine = store.add("toolkit/arrivals", 1)
        store.wait([f"toolkit/answer/{mine}"], timeout)
        current = int(store.get(f"toolkit/answer/{mine}"))
        store.add(f"toolkit/heard/{current}", 1)
        return current
    current = store.add("toolkit/rounds", 1)
    answered = 0
    deadline = time.monotonic() + timeout.total_seconds()
    while store.add(f"toolkit/heard/{current}", 0) < world_size - 1:
        arrived = store.add("toolkit/arrivals", 0)
        for number in range(answered + 1, arrived + 1):
            store.set(f"toolkit/answer/{number}", str(current))
        answered = arrived
        if time.monotonic() > deadline:
            raise RuntimeError(f"of {world_size} ranks, not all came within {timeout}")
        time.sleep(0.01)
    return current

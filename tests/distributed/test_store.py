"""Workers that are started again meet each other, not what their predecessors left in the store."""

import datetime
import threading

import torch.distributed as dist

from toolkit.distributed.rendezvous import agree_on_round, elastic_store

TIMEOUT = datetime.timedelta(seconds=20)


def rounds_of(store: dist.Store, world_size: int) -> list[int]:
    """The answers of all ranks, each in a thread."""
    answers: dict[int, int] = {}

    def work(rank: int) -> None:
        answers[rank] = agree_on_round(store, rank, world_size, TIMEOUT)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(30)
    return [answers[rank] for rank in range(world_size)]


def test_every_round_of_workers_has_its_own_number() -> None:
    store = dist.HashStore()
    assert rounds_of(store, 3) == [1, 1, 1]
    assert rounds_of(store, 2) == [2, 2]
    # Workers that died before they met: one had come, rank 0 had counted.
    store.add("toolkit/arrivals", 1)
    store.add("toolkit/rounds", 1)
    assert rounds_of(store, 4) == [4, 4, 4, 4]


def test_without_an_agent_there_is_no_store_of_its() -> None:
    assert elastic_store(0, 2, TIMEOUT, {}) is None
    assert elastic_store(0, 2, TIMEOUT, {"TORCHELASTIC_USE_AGENT_STORE": "False"}) is None

"""Where the ranks of a run meet before there is a process group.

    `toolkit resume`'s own processes    a file in a private folder
    `torchrun`, `accelerate launch`     the store of their agent
    RANK, WORLD_SIZE, MASTER_*          a store that rank 0 opens at MASTER_ADDR:MASTER_PORT

Waiting happens in Python, not inside torch: it says what it waits for, and a signal ends it.
"""

import datetime
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping

import torch.distributed as dist

from toolkit.distributed.ranks import STORE_FILE, is_loopback
from toolkit.errors import ConfigError, TrainingError
from toolkit.wording import count

SILENT_SECONDS = 3.0
"""Processes of one job come seconds apart; what waits longer says for what."""

_ARRIVED = "toolkit/arrived"


def open_store(
    rank: int, world_size: int, timeout: datetime.timedelta, environ: Mapping[str, str] = os.environ
) -> dist.Store:
    """The store that all ranks share. Where no launcher keeps one, all of them are here on return.

    Raises:
        ConfigError: this machine cannot listen at MASTER_ADDR:MASTER_PORT.
        TrainingError: some did not come in time.
    """
    if STORE_FILE in environ:
        store: dist.Store = dist.FileStore(environ[STORE_FILE], world_size)
        store.set_timeout(timeout)
        return store
    elastic = elastic_store(rank, world_size, timeout, environ)
    if elastic is not None:
        return elastic
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    wait = _Wait(f"{host}:{port}", world_size, timeout)
    if rank == 0:
        store = _serve(host, port, world_size, timeout)
        store.add(_ARRIVED, 1)
    else:
        wait.until(
            lambda: _answers(host, port), f"rank {rank}: waiting for rank 0 at {host}:{port}"
        )
        store = dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
        store.add(_ARRIVED, 1)

    def missing() -> int:
        return world_size - store.add(_ARRIVED, 0)

    wait.until(
        lambda: missing() <= 0,
        lambda: (
            f"waiting for {count(missing(), 'other process')} at {host}:{port}" if rank == 0 else ""
        ),
    )
    return store


class _Wait:
    """Waits with words."""

    def __init__(self, address: str, world_size: int, timeout: datetime.timedelta) -> None:
        self._address = address
        self._why = (
            f"WORLD_SIZE={world_size} from the environment; unset it to train on one process"
        )
        self._started = time.monotonic()
        self._timeout = timeout.total_seconds()

    def until(self, condition: Callable[[], bool], words: str | Callable[[], str]) -> None:
        """Raises TrainingError when `condition` stays false for too long."""
        has_spoken = False
        while not condition():
            seconds = time.monotonic() - self._started
            if seconds > SILENT_SECONDS and not has_spoken:
                has_spoken = True
                line = words if isinstance(words, str) else words()
                if line:
                    sys.stderr.write(f"{line} ({self._why})\n")
                    sys.stderr.flush()
            if seconds > self._timeout:
                raise TrainingError(
                    f"not all processes came to {self._address} within {self._timeout:.0f} s "
                    f"({self._why})"
                )
            time.sleep(0.05)


def _serve(host: str, port: int, world_size: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """The store, in this process. By itself torch listens on all addresses; for a loopback address
    it is given a socket that only this machine reaches."""
    try:
        if not is_loopback(host):
            return dist.TCPStore(
                host, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False
            )
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(max(128, world_size))
            return dist.TCPStore(
                host,
                port,
                world_size,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
                use_libuv=True,
            )
    except (OSError, dist.DistNetworkError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise ConfigError(
            f"MASTER_ADDR={host}, MASTER_PORT={port}: rank 0 cannot listen there ({reason}); "
            "choose another MASTER_PORT, or unset WORLD_SIZE to train on one process"
        ) from None


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 2.0).close()
    except OSError:
        return False
    return True


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

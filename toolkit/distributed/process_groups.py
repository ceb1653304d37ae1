"""Where the ranks of a run meet, and how their process groups open and close.

    `toolkit train --processes`         a file in a private folder
    `toolkit train --nodes`             a store that rank 0 opens on a socket of its launcher
    `torchrun`, `accelerate launch`     the store of their agent
    RANK, WORLD_SIZE, MASTER_*          a store that rank 0 opens at MASTER_ADDR:MASTER_PORT

Waiting happens in Python, not inside torch: it says what it waits for, and a signal ends it.
"""

import atexit
import contextlib
import datetime
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from toolkit.distributed.launcher import rank_of
from toolkit.distributed.ranks import (
    LAUNCH_FOLDER,
    STORE_FD,
    STORE_FILE,
    is_loopback,
    is_one_machine,
    loopback_interface,
)
from toolkit.errors import ConfigError, TrainingError
from toolkit.wording import count

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
SILENT_SECONDS = 3.0
"""Processes of one job come seconds apart; what waits longer says for what."""

_ARRIVED = "toolkit/arrived"

_closed_backends: list[Any] = []
"""Of process groups that were closed, until others are opened; see `close_process_groups`."""
# While Python still runs: a thread that wants its lock later, to drop the tensor of the last
# collective, is ended inside C++, which aborts the process.
atexit.register(_closed_backends.clear)


def open_process_groups(
    device: torch.device,
    world_size: int,
    *,
    backend: str | None = None,
    timeout: datetime.timedelta = COLLECTIVE_TIMEOUT,
) -> None:
    """Meet the other ranks; a group that is open already stays. Raises ConfigError where it is of
    another size, or see `open_store`."""
    _closed_backends.clear()
    if dist.is_initialized():
        if dist.get_world_size() != world_size:
            raise ConfigError(
                f"a process group of {dist.get_world_size()} exists, the launcher started "
                f"{world_size}; close the environment that opened it"
            )
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    for name, value in (("MASTER_PORT", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    if is_one_machine(os.environ):
        # Nobody on another machine needs to reach this one.
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback_interface())
    options: dict[str, Any] = {"timeout": timeout, "world_size": world_size}
    if world_size == 1:
        # A private in-memory store: no port, so parallel runs on one machine cannot collide.
        options |= {"store": dist.HashStore(), "rank": 0}
    else:
        rank = rank_of(os.environ)
        options |= {"store": open_store(rank, world_size, timeout), "rank": rank}
        if device.type == "cuda":
            # Alone there is nobody to connect to; torch would open a communicator for every group.
            options["device_id"] = device
    default = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend or default, **options)


def close_process_groups(*, leave_open: bool = False) -> None:
    """Leave all groups; errors of ranks that are already gone do not matter.

    gloo's backends outlive their groups until others are opened. Freed together with its group, a
    backend waits for its threads while this one holds Python's lock; a thread that just then drops
    the tensor of the last collective wants that lock, and both wait for ever (seen with torch
    2.13). The backend's own handle frees it without the lock.
    """
    for group in _process_groups():
        with contextlib.suppress(RuntimeError):
            _closed_backends.append(group._get_backend(torch.device("cpu")))
    if dist.is_initialized() and not leave_open:
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group()
    # DeepSpeed keeps handles on groups in module globals; a later environment of this process must
    # not get those that are gone.
    comm: Any = sys.modules.get("deepspeed.comm.comm")
    groups: Any = sys.modules.get("deepspeed.utils.groups")
    if comm is not None:
        comm.cdb = None
    if groups is not None:
        groups._WORLD_GROUP = groups.mesh_device = None


def set_collective_timeouts(timeout: datetime.timedelta) -> None:
    """Give all process groups our time-out; torch and DeepSpeed make some (meshes, sub-groups) with
    their own, ten minutes for NCCL."""
    for group in _process_groups():
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _process_groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []


def open_store(
    rank: int, world_size: int, timeout: datetime.timedelta, environ: Mapping[str, str] = os.environ
) -> dist.Store:
    """The store that all ranks share. Where no launcher keeps one, all of them are here on return.
    Raises ConfigError where this machine cannot listen at MASTER_ADDR:MASTER_PORT, TrainingError
    where some did not come in time."""
    if STORE_FILE in environ:
        store: dist.Store = dist.FileStore(environ[STORE_FILE], world_size)
        store.set_timeout(timeout)
        return store
    if (elastic := elastic_store(rank, world_size, timeout, environ)) is not None:
        return elastic
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    started = time.monotonic()
    why = f" (WORLD_SIZE={world_size} from the environment; unset it to train on one process)"
    if LAUNCH_FOLDER in environ:
        why = ""

    def wait(condition: Callable[[], bool], words: Callable[[], str]) -> None:
        has_spoken = False
        while not condition():
            seconds = time.monotonic() - started
            if seconds > SILENT_SECONDS and not has_spoken:
                has_spoken = True
                sys.stderr.write(f"{words()}{why}\n" if words() else "")
                sys.stderr.flush()
            if seconds > timeout.total_seconds():
                raise TrainingError(
                    f"not all processes came to {host}:{port} within "
                    f"{timeout.total_seconds():.0f} s{why}"
                )
            time.sleep(0.05)

    if rank == 0:
        store = _serve(host, port, world_size, timeout, environ)
    else:
        wait(
            lambda: _answers(host, port),
            lambda: f"rank {rank}: waiting for rank 0 at {host}:{port}",
        )
        store = dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    store.add(_ARRIVED, 1)

    def missing() -> int:
        return world_size - store.add(_ARRIVED, 0)

    def waiting() -> str:
        others = count(missing(), "other process")
        return f"waiting for {others} at {host}:{port}" if rank == 0 else ""

    wait(lambda: missing() <= 0, waiting)
    return store


def _serve(
    host: str,
    port: int,
    world_size: int,
    timeout: datetime.timedelta,
    environ: Mapping[str, str],
) -> dist.TCPStore:
    """The store, in this process. By itself torch listens on all addresses; it is given the socket
    of our launcher, or for a loopback address one that only this machine reaches."""
    options: dict[str, Any] = {"is_master": True, "timeout": timeout, "wait_for_workers": False}
    try:
        if STORE_FD in environ:
            options |= {"master_listen_fd": os.dup(int(environ[STORE_FD])), "use_libuv": True}
            return dist.TCPStore(host, port, world_size, **options)
        if not is_loopback(host):
            return dist.TCPStore(host, port, world_size, **options)
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(max(128, world_size))
            options |= {"master_listen_fd": listener.detach(), "use_libuv": True}
            return dist.TCPStore(host, port, world_size, **options)
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
    """A store for this round of workers, the same on all ranks; None where no agent keeps one.

    The agent's TCPStore outlives the workers, and torch (2.13) hands it to their successors as it
    is: they may read the addresses of the dead, and connect to nobody or wait for ever. So every
    round gets keys of its own. The restart count cannot name them: it stays when a node joins.
    """
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"toolkit/{agree_on_round(store, rank, world_size, timeout)}", store)


def agree_on_round(
    store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta
) -> int:
    """A number that no earlier round had, the same on all ranks of this one.

    Rank 0 counts rounds. The others come with numbers of their own, which are never used again, so
    an answer cannot be one left for a predecessor. Rank 0 answers all that ever came, until all of
    this round have heard it. Raises RuntimeError: a rank did not come in time."""
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

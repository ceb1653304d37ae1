"""Where ranks meet: what the launcher says makes sense, nobody else can reach it, waiting says for
what, and workers that are started again meet each other, not what their predecessors left."""

import datetime
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from tests.tiny import module_config, open_environment
from tests.workers import WorkerPool, free_port
from toolkit import signals
from toolkit.distributed import process_groups
from toolkit.distributed.process_groups import agree_on_round, elastic_store, open_store
from toolkit.distributed.ranks import (
    LAUNCH_FOLDER,
    STORE_FD,
    STORE_FILE,
    check_launcher_variables,
    is_one_machine,
)
from toolkit.errors import ConfigError, TrainingError

TIMEOUT = datetime.timedelta(seconds=60)
SHORT = datetime.timedelta(seconds=20)
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 without WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MEETING}, "RANK=2 with WORLD_SIZE=2: ranks are 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1' is no number of 0 or more"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two' is no number of 1 or more"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE='0' is no number of 1 or more"),
        ({"WORLD_SIZE": "", "RANK": "0"}, "WORLD_SIZE='' is no number"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 without MASTER_ADDR"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", **MEETING, "MASTER_PORT": "99999"},
            "MASTER_PORT=99999: ports are 1 to 65535",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", **MEETING, "MASTER_PORT": "http"},
            "MASTER_PORT='http' is no number",
        ),
        (
            {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2", **MEETING},
            "LOCAL_RANK=2 with LOCAL_WORLD_SIZE=2",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "4", **MEETING},
            "LOCAL_WORLD_SIZE=4 is more than WORLD_SIZE=2",
        ),
    ],
)
def test_variables_that_make_no_sense_are_refused_on_every_process(
    environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_launcher_variables(environ)
    assert caught.value.only_here  # nobody knows whether there is a rank 0 to say it


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1", **MEETING},  # pdsh
        {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING},
    ],
)
def test_what_launchers_set_is_accepted(environ: dict[str, str]) -> None:
    check_launcher_variables(environ)


def test_one_machine_is_told_by_its_ranks_or_its_address() -> None:
    assert is_one_machine({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1"})
    assert is_one_machine({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"})
    assert not is_one_machine({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1"})


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses and ports on which `process` can be reached."""
    found = process.net_connections("inet")
    return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}


def listening_ranks(store_file: str | None) -> set[str]:
    """Addresses that are new with all process groups open; a warm worker may keep older ones."""
    before = listening(psutil.Process())
    if store_file is not None:
        os.environ[STORE_FILE] = store_file
    env = open_environment(module_config("fsdp"))
    try:
        env.barrier()
        return {address for address, _ in listening(psutil.Process()) - before}
    finally:
        env.close()


@pytest.mark.parametrize("by_file", [False, True])
def test_nothing_of_a_run_on_one_machine_listens_to_others(
    by_file: bool, workers: WorkerPool, tmp_path: Path
) -> None:
    file = str(tmp_path / "store") if by_file else None
    for addresses in workers.run(2, listening_ranks, file):
        assert addresses
        assert addresses <= {"127.0.0.1", "::1"}


def test_waiting_says_for_whom_and_a_signal_ends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process_groups, "SILENT_SECONDS", 0.0)
    port = free_port()
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    write, lines = process_groups.sys.stderr.write, []

    def stop_then(text: str) -> int:
        lines.append(text)
        if len(lines) == 1:  # the second one acknowledges
            os.kill(os.getpid(), signal.SIGINT)
        return write(text)

    with monkeypatch.context() as patched:
        patched.setattr(process_groups.sys.stderr, "write", stop_then)
        with pytest.raises(signals.Interrupted), signals.listening(signals.Starting()):
            open_store(0, 3, TIMEOUT, environ)
    assert lines[0] == (
        f"waiting for 2 other processes at 127.0.0.1:{port} (WORLD_SIZE=3 from the environment; "
        "unset it to train on one process)\n"
    )


def test_ranks_that_come_late_meet_and_those_that_do_not_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process_groups, "SILENT_SECONDS", 0.0)
    environ = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    stores: dict[int, Any] = {}

    def come(rank: int) -> None:
        stores[rank] = open_store(rank, 2, TIMEOUT, environ)

    late = threading.Thread(target=come, args=(1,))
    late.start()
    come(0)
    late.join(60)
    stores[1].set("a", "b")
    assert stores[0].get("a") == b"b"
    port = str(free_port())
    with pytest.raises(TrainingError, match="not all processes came to 127"):
        open_store(1, 2, datetime.timedelta(0), {**environ, **MEETING, "MASTER_PORT": port})
    assert f"rank 1: waiting for rank 0 at 127.0.0.1:{port} (WORLD_SIZE=2" in (
        capsys.readouterr().err
    )


def test_rank_0_keeps_the_store_on_the_socket_of_its_launcher() -> None:
    with socket.create_server(("127.0.0.1", 0)) as launcher:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launcher.getsockname()[1])}
        own = where | {STORE_FD: str(launcher.fileno()), LAUNCH_FOLDER: "/x"}
        before = listening(psutil.Process())
        stores: dict[int, Any] = {}

        def come() -> None:
            stores[0] = open_store(0, 2, TIMEOUT, own)

        first = threading.Thread(target=come)
        first.start()
        second = open_store(1, 2, TIMEOUT, where)
        first.join(20)
        second.set("a", "b")
        assert stores[0].get("a") == b"b"
        assert listening(psutil.Process()) == before


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(ConfigError, match=f"MASTER_PORT={port}: rank 0 cannot listen there"):
            open_store(0, 2, TIMEOUT, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})


def test_processes_of_a_resume_meet_in_a_file(tmp_path: Path) -> None:
    environ = {STORE_FILE: str(tmp_path / "store")}
    first = open_store(0, 2, TIMEOUT, environ)
    first.set("a", "b")
    second = open_store(1, 2, TIMEOUT, environ)
    assert isinstance(second, dist.FileStore)
    assert second.get("a") == b"b"


def rounds_of(store: dist.Store, world_size: int) -> list[int]:
    """The answers of all ranks, each in a thread."""
    answers: dict[int, int] = {}

    def work(rank: int) -> None:
        answers[rank] = agree_on_round(store, rank, world_size, SHORT)

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
    assert elastic_store(0, 2, SHORT, {}) is None
    assert elastic_store(0, 2, SHORT, {"TORCHELASTIC_USE_AGENT_STORE": "False"}) is None

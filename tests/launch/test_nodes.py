"""How the launchers of several machines meet, what they refuse, and what they tell each other."""

import contextlib
import fcntl
import json
import logging
import resource
import socket
import struct
import sys
import threading
import time
from typing import Any

import msgspec
import psutil
import pytest

from tests.workers import free_port
from toolkit.distributed.ranks import loopback_interface
from toolkit.errors import ConfigError, ToolkitError, TrainingError
from toolkit.launch import interfaces, joining, workers
from toolkit.launch import nodes as module
from toolkit.launch.joining import TOKEN, meet
from toolkit.launch.messages import Common, Connection, Ended, Gone, Hello, ready
from toolkit.launch.nodes import Failed, Meeting, Nodes

COMMON = Common(versions={"toolkit": "1"}, config={"seed": "a", "lr": "b"})


class Machine(threading.Thread):
    """A launcher that meets the others: its meeting, or why it has none."""

    def __init__(self, nodes: Nodes, processes: int = 2, common: Common = COMMON) -> None:
        super().__init__(daemon=True)
        self.error: ToolkitError | None = None
        self.meeting: Meeting | None = None
        self._arguments = nodes, processes, common
        self._stack = contextlib.ExitStack()
        self.start()

    def run(self) -> None:
        try:
            self.meeting = self._stack.enter_context(meet(*self._arguments))
        except ToolkitError as error:
            self.error = error

    def met(self) -> Meeting:
        self.join(60)
        assert self.error is None, self.error
        assert self.meeting is not None
        return self.meeting

    def refusal(self, kind: type[ToolkitError] = ConfigError) -> str:
        self.join(60)
        assert isinstance(self.error, kind), self.error
        return str(self.error)

    def leave(self) -> None:
        self._stack.close()


@pytest.fixture
def nodes() -> Nodes:
    return Nodes(2, 0, "127.0.0.1", free_port(), join_seconds=50)


def poll(meeting: Meeting) -> Failed | None:
    """The first that is told within a while."""
    for _ in range(3000):
        if (failed := meeting.poll()) is not None:
            return failed
        time.sleep(0.01)
    return None


def test_machines_meet_and_hear_of_failures_and_ends(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALIVE_SECONDS", 0.0)
    three = nodes._replace(number=3)
    machines = [Machine(three._replace(rank=rank)) for rank in (2, 1, 0)]
    second, first, head = (machine.met() for machine in machines)
    assert (head.first_rank, first.first_rank, second.first_rank) == (0, 2, 4)
    assert head.store is not None
    port = head.store.getsockname()[1]
    for rank, meeting in enumerate((head, first, second)):
        assert meeting.interface == loopback_interface()
        assert meeting.variables == {
            "WORLD_SIZE": "6", "GROUP_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    assert [meeting.poll() for meeting in (head, first, second)] == [None] * 3
    second.tell(rank=5, code=2)
    failed = Failed(2, socket.gethostname(), 5, 2)
    assert (poll(head), poll(first)) == (failed, failed)
    assert str(failed) == f"rank 5 on node 2 ({socket.gethostname()}) ended with exit code 2"
    first.tell(rank=None, code=0)
    machines[1].leave()
    time.sleep(0.1)
    assert head.poll() is None  # node 1 is done, not lost
    machines[2].leave()
    lost = poll(second)
    assert lost == Failed(0, socket.gethostname(), None, None)
    assert "is lost: its launcher ended, or the network did" in str(lost)


def test_all_hear_of_a_machine_that_is_lost(nodes: Nodes) -> None:
    """The others are connected to the head alone."""
    three = nodes._replace(number=3)
    machines = [Machine(three._replace(rank=rank)) for rank in (0, 1, 2)]
    head, first, _ = (machine.met() for machine in machines)
    machines[2].leave()
    lost = Failed(2, socket.gethostname(), None, None)
    assert (poll(head), poll(first)) == (lost, lost)
    for machine in machines:
        machine.leave()


def test_the_last_words_of_who_was_reset_are_heard() -> None:
    """A machine that ends with a line of ours unread resets the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = Connection(socket.create_connection(server.getsockname()))
        with server.accept()[0] as other:
            other.sendall(b'{"type":"ended","node":1,"host":"h","rank":null,"code":0}\n')
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert connection.receive(wait=20) == [Ended(node=1, host="h", rank=None, code=0)]
    with pytest.raises(Gone):
        connection.receive(wait=20)
    connection.close()


def test_who_says_nothing_is_lost(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = [Machine(nodes._replace(rank=rank)) for rank in (0, 1)]
    head, other = (machine.met() for machine in machines)
    assert head.poll() is None
    monkeypatch.setattr(module, "LOST_SECONDS", 0.0)
    time.sleep(0.01)
    assert head.poll() == Failed(1, socket.gethostname(), None, None)
    for machine in machines:
        machine.leave()
    assert other.store is None


def refused(nodes: Nodes, processes: int = 2, **changed: Any) -> list[str]:
    """What both machines say when node 1 differs by `changed`."""
    common = Common(**{"versions": COMMON.versions, "config": COMMON.config, **changed})
    both = Machine(nodes), Machine(nodes._replace(rank=1), processes, common)
    return [machine.refusal() for machine in both]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"versions": {"toolkit": "2"}}, "has toolkit 2, node 0 (HOST) has toolkit 1; install"),
        ({"config": {"seed": "a", "lr": "c", "x": "y"}},
         "has another config than node 0 (HOST): lr (c, b), x (y, nothing); start all"),
        ({"processes": 4}, "was started with --processes 4, node 0 (HOST) with --processes 2"),
    ],
)  # fmt: skip
def test_machines_that_start_something_else_are_refused_on_both_sides(
    changed: dict[str, Any], message: str, nodes: Nodes
) -> None:
    for said in refused(nodes, **changed):
        host = socket.gethostname()
        assert said.startswith(f"node 1 ({host}) " + message.replace("HOST", host))


def test_a_rank_that_is_taken_is_refused(nodes: Nodes) -> None:
    three = nodes._replace(number=3)
    machines = [Machine(three._replace(rank=1)) for _ in range(2)]
    head = Machine(three)
    assert head.refusal().startswith("--node-rank 1 on ")
    assert all("is taken" in machine.refusal() for machine in machines)


def say_hello(nodes: Nodes, run: str = "", host: str = "h") -> Any:
    """A connection of node 1's to the head, over which nothing more is said."""
    connection = knock(nodes)
    connection.makefile().readline()
    hello = Hello(
        node=1, host=host, nodes=nodes.number, processes=2, nonce="",
        common=Common(COMMON.versions, COMMON.config, run),
    )  # fmt: skip
    connection.sendall(msgspec.json.encode(hello) + b"\n")
    return connection


def test_a_machine_that_comes_again_takes_the_place_of_one_that_is_gone(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was reset: nobody closed its connection."""
    monkeypatch.setattr(joining, "_ANSWER_SECONDS", 0.1)
    three = nodes._replace(number=3)
    machines = [Machine(three)]
    with say_hello(three) as gone:
        machines.append(Machine(three._replace(rank=1)))
        while gone.recv(4096):  # until the head lets it go
            pass
    machines.append(Machine(three._replace(rank=2)))
    assert [machine.met().first_rank for machine in machines] == [0, 2, 4]
    for machine in machines:
        machine.leave()


def test_a_machine_of_another_run_is_let_go(nodes: Nodes, caplog: pytest.LogCaptureFixture) -> None:
    head = Machine(nodes, common=Common(COMMON.versions, COMMON.config, "e/one"))
    with say_hello(nodes, host="a\n\x1b[2J") as other:
        assert b'"refused"' in other.recv(4096)
    said = Machine(nodes._replace(rank=1), common=Common({}, {}, "e/two")).refusal()
    assert f"({socket.gethostname()}) starts the run e/one, not e/two; give all" in said
    assert "a\\n\\x1b[2J came for another run" in caplog.text
    other = Machine(nodes._replace(rank=1), common=Common(COMMON.versions, COMMON.config, "e/one"))
    assert other.met().first_rank == 2
    assert head.met().first_rank == 0
    for machine in (head, other):
        machine.leave()


def test_more_than_1024_descriptors_are_no_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("the system allows no more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        here, there = socket.socketpair()
        with here, there, socket.socket(fileno=fcntl.fcntl(here, fcntl.F_DUPFD, 1500)) as high:
            assert ready([high], 0.0) == []
            there.send(b"x")
            assert ready([high], 20.0) == [high]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_strangers_neither_end_nor_delay_the_start(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Machine(nodes)
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04pickle\n", b'{"type": "hello"}\n'):
        with knock(nodes) as stranger:
            stranger.sendall(text)
    with knock(nodes) as stranger, contextlib.suppress(OSError):
        stranger.sendall(b"x" * (3 << 20))
    silent = knock(nodes)
    monkeypatch.setattr(joining, "_HELLO_SECONDS", 0.2)
    assert silent.recv(4096).startswith(b'{"type":"challenge"')
    assert silent.recv(4096) == b""  # it was let go
    silent.close()
    monkeypatch.undo()  # it would hold for the real one too
    other = Machine(nodes._replace(rank=1))
    assert other.met().first_rank == 2
    assert head.met().first_rank == 0
    other.leave()
    head.leave()


def knock(nodes: Nodes) -> socket.socket:
    """A connection to the head that does not know what to say."""
    for _ in range(3000):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((nodes.host, nodes.port), 5)
        time.sleep(0.01)
    raise AssertionError("no head listens")


def test_the_secret_is_asked_of_both_sides(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sides: dict[int, Any] = {}

    def side(rank: int, token: str) -> Machine:
        monkeypatch.setenv(TOKEN, token)
        made = sides[rank] = Machine(nodes._replace(rank=rank))
        return made

    head = side(0, "secret")
    knock(nodes).close()  # it listens, so it has read the variable
    for wrong in ("", "guess"):
        assert side(1, wrong).refusal().startswith(f"{TOKEN} is not that of the head")
    assert side(1, "secret").met().first_rank == 2
    assert head.met().first_rank == 0
    assert "came with another TOOLKIT_JOIN_TOKEN" in caplog.text
    for machine in (head, sides[1]):
        machine.leave()


def test_a_head_that_does_not_know_the_secret_is_refused(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, "secret")
    with socket.create_server((nodes.host, nodes.port)) as server:
        member = Machine(nodes._replace(rank=1))
        connection = server.accept()[0]
        connection.sendall(b'{"type":"challenge","protocol":1,"challenge":"x"}\n')
        hello = json.loads(connection.makefile().readline())
        assert hello["proof"]
        connection.sendall(b'{"type":"go","address":"127.0.0.1","port":1,"host":"h"}\n')
        assert "does not know TOOLKIT_JOIN_TOKEN" in member.refusal()
        connection.close()


def test_machines_that_do_not_come_are_named(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "toolkit")
    monkeypatch.setattr(joining, "SILENT_SECONDS", 0.0)
    short = nodes._replace(join_seconds=0.3)
    where = f"127.0.0.1:{nodes.port}"
    three = nodes._replace(number=3, join_seconds=7)
    has_heard, hear = threading.Event(), joining._Head._hear
    with monkeypatch.context() as patch:
        late = property(lambda side: side.nodes.rank == 0 and has_heard.is_set())
        patch.setattr(joining._Side, "is_late", late)
        patch.setattr(joining._Head, "_hear", lambda *a: hear(*a) and not has_heard.set())
        head, first = (Machine(three._replace(rank=rank)) for rank in (0, 1))
        said = head.refusal(TrainingError)
        assert first.refusal(TrainingError) == said
    assert said.startswith(f"node 2 did not come to {where} within 7 s; start this command there")
    assert f"waiting for nodes 1, 2 at {where}" in caplog.text
    said = Machine(short._replace(rank=1)).refusal(TrainingError)
    assert said.startswith(f"node 0 cannot be reached at {where} within 0 s (Connection refused)")
    with socket.create_server((nodes.host, nodes.port)):
        said = Machine(short._replace(rank=1)).refusal(TrainingError)
    assert said.startswith(f"the head at {where} did not start the run within 0 s")


def test_a_head_that_gives_up_is_told_from_one_that_is_not_there(nodes: Nodes) -> None:
    with socket.create_server((nodes.host, nodes.port)) as server:
        member = Machine(nodes._replace(rank=1))
        server.accept()[0].close()
        assert "closed the connection; if node 0 is there" in member.refusal(TrainingError)


def test_a_name_that_is_not_known_yet_is_waited_for(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "toolkit")
    monkeypatch.setattr(joining, "SILENT_SECONDS", 0.0)
    unknown = [socket.gaierror(-2, "Name or service not known")] * 2
    lookup = socket.getaddrinfo

    def look_up(host: str, *arguments: Any, **named: Any) -> Any:
        if host == "node0.run" and unknown:
            raise unknown.pop()
        return lookup("127.0.0.1" if host == "node0.run" else host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    late = nodes._replace(host="node0.run")
    said = Machine(late._replace(join_seconds=-1.0)).refusal()
    assert said.startswith("--head node0.run: Name or service not known; give an address")
    assert unknown
    monkeypatch.setattr(interfaces, "is_loopback", lambda host: True)  # its name does not say so
    head = Machine(late)
    while unknown and head.is_alive():
        time.sleep(0.01)
    member = Machine(late._replace(rank=1))
    assert (head.met().first_rank, member.met().first_rank) == (0, 2)
    assert "waiting for an address: --head node0.run: Name or service not known" in caplog.text
    for machine in (head, member):
        machine.leave()


def test_a_port_that_is_taken_is_named(nodes: Nodes) -> None:
    with socket.create_server((nodes.host, nodes.port)):
        said = Machine(nodes).refusal()
    assert said.startswith(f"node 0 cannot listen at 127.0.0.1:{nodes.port}: Address already in")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("sys.exit(3 if rank == '3' else time.sleep(60))", [3, 3]),
        ("os.kill(os.getpid(), 9) if rank == '1' else time.sleep(60)",
         ["rank 1 was killed", f"rank 1 on node 0 ({socket.gethostname()}) was killed"]),
        ("print(os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'])", [0, 0]),
    ],
)  # fmt: skip
def test_a_process_that_fails_ends_those_of_all_machines(
    code: str, expected: list[Any], nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_SECONDS_TO_EXPLAIN", 0.0)
    head = "import os, sys, time; rank = os.environ['RANK']\n"
    command = [sys.executable, "-S", "-c", head + code]
    found: dict[int, Any] = {}

    def start(rank: int) -> None:
        try:
            found[rank] = workers.launch(command, 2, nodes=nodes._replace(rank=rank), common=COMMON)
        except TrainingError as error:
            found[rank] = str(error).partition(" (SIG")[0]

    both = [threading.Thread(target=start, args=(rank,)) for rank in (0, 1)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(30)
    assert [found[0], found[1]] == expected


NETWORK = {"eth0": ["10.0.0.5", "fd00::5"], "down0": [], "lo": ["127.0.0.1", "::1"]}


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with the interfaces of `NETWORK`, and names to fill in."""
    names = {"node0": "10.0.0.5", "debian": "127.0.1.1", "node7": "10.0.0.7"}

    def lookup(host: str, *_: Any, **__: Any) -> list[Any]:
        if host == "nowhere":
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (names.get(host, host), 0))]

    monkeypatch.setattr(interfaces, "_addresses", lambda: NETWORK)
    monkeypatch.setattr(interfaces.socket, "getaddrinfo", lookup)
    return names


@pytest.mark.parametrize(
    ("head", "interface", "expected"),
    [
        ("node0", None, ("10.0.0.5", "eth0")),
        ("fd00::5", None, ("fd00::5", "eth0")),
        ("127.0.0.1", None, ("127.0.0.1", "lo")),
        ("debian", "eth0", ("10.0.0.5", "eth0")),
    ],
)
def test_the_head_listens_on_one_interface(
    head: str, interface: str | None, expected: tuple[str, str], network: dict[str, str]
) -> None:
    assert interfaces.listen_address(head, interface) == expected


@pytest.mark.parametrize(
    ("head", "interface", "message"),
    [
        ("node0", "eth9", "--interface eth9: this machine has none of that name; it has eth0"),
        ("node0", "down0", "--interface down0: it has no address; there is eth0 (10.0.0.5), lo"),
        ("debian", None, "--head debian is 127.0.1.1 on this machine, which no other one reaches"),
        ("node7", None, "--head node7, 10.0.0.7, is no address of this machine, which is node 0"),
        ("10.0.0.7", None, "--head 10.0.0.7 is no address of this machine, which is node 0; give"),
        ("nowhere", None, "--head nowhere: Name or service not known; give an address"),
    ],
)
def test_a_head_that_cannot_be_reached_there_is_refused(
    head: str, interface: str | None, message: str, network: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as error:
        interfaces.listen_address(head, interface)
    assert str(error.value).startswith(message)


def test_beyond_loopback_one_address_listens_and_the_log_says_so(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is sent there: the address is this machine's own."""
    found = [
        (name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and name != loopback_interface()
    ]
    if not found:
        pytest.skip("this machine has no network but loopback")
    interface, address = found[0]
    caplog.set_level(logging.INFO, "toolkit")
    here = nodes._replace(host=address, interface=interface)
    machines = [Machine(here._replace(rank=rank)) for rank in (0, 1)]
    head, other = (machine.met() for machine in machines)
    assert head.store is not None
    assert head.store.getsockname()[0] == address
    for meeting in (head, other):
        assert meeting.variables["GLOO_SOCKET_IFNAME"] == interface
        assert meeting.variables["NCCL_SOCKET_IFNAME"] == interface
    assert f"listening on the network, at {address} of {interface}: port {nodes.port}" in (
        caplog.text
    )
    assert "use a network of your own" in caplog.text
    for machine in machines:
        machine.leave()

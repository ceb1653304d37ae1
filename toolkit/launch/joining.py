"""The machines of one run find each other (`toolkit train --nodes`).

1. Node 0, the head, listens on one network interface. The launcher of every other node connects to
   it, and says what it is about to start.
2. Once all have come, the head tells them where rank 0 will keep the store of the processes: a
   socket of the same interface, which rank 0 inherits. Every launcher starts its processes.
3. The connections stay open (`nodes.py`).

With a shared secret in `TOOLKIT_JOIN_TOKEN` both sides prove that they know it; torch's store and
collectives, between the processes, know no such thing.
"""

import contextlib
import hmac
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from toolkit.distributed.ranks import is_loopback
from toolkit.errors import ConfigError, ToolkitError, TrainingError
from toolkit.launch.interfaces import NoAddress, find_interface, listen_address, listen_on
from toolkit.launch.messages import (
    PROTOCOL,
    Alive,
    Challenge,
    Common,
    Connection,
    Go,
    Gone,
    Hello,
    Refused,
    difference,
    proof,
    ready,
)
from toolkit.launch.nodes import Meeting, Nodes, host_name
from toolkit.wording import count, shortened, visible

log = logging.getLogger(__name__)

SILENT_SECONDS = 3.0
"""Machines of one job come seconds apart; who waits longer says for whom."""
TOKEN = "TOOLKIT_JOIN_TOKEN"
"""Variable with the secret that all machines of a run share, if any."""

_HELLO_SECONDS = 10.0
"""How long who connects has to say who it is."""
_ANSWER_SECONDS = 10.0
"""How long who has joined has to answer whether it is still there."""
_RETRY_SECONDS = 0.3
_MOST_STRANGERS = 64
"""Connections at a time that have not said who they are."""


@contextlib.contextmanager
def meet(nodes: Nodes, processes: int, common: Common) -> Iterator[Meeting]:
    """Wait for the launchers of the other machines; `common` has to be the same on all.

    Raises:
        ConfigError: there is no such interface; this machine is not the head, or cannot listen
            there; the machines do not start the same.
        TrainingError: the head cannot be reached, or a machine did not come, in time.
    """
    meeting = (_Head if nodes.rank == 0 else _Member)(nodes, processes, common).gather()
    try:
        yield meeting
    finally:
        meeting.close()


class _Side:
    def __init__(self, nodes: Nodes, processes: int, common: Common) -> None:
        self.nodes = nodes
        self.processes = processes
        self.common = common
        self.token = os.environ.get(TOKEN, "")
        self.where = f"{nodes.host}:{nodes.port}"
        self.started = time.monotonic()
        self._has_spoken = False

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self.started > self.nodes.join_seconds

    def say_once(self, line: str) -> None:
        if not self._has_spoken and time.monotonic() - self.started > SILENT_SECONDS:
            self._has_spoken = True
            log.info("%s", line)


class _Head(_Side):
    _other = ""
    """Who came, but not for this run: the end of an error."""

    def gather(self) -> Meeting:
        address, interface = self._address()
        try:
            listener = listen_on(address, self.nodes.port)
        except OSError as error:
            raise ConfigError(
                f"node 0 cannot listen at {address}:{self.nodes.port}: {error.strerror}; choose "
                f"another port with --head {self.nodes.host}:PORT, the same on all machines"
            ) from None
        with listener, contextlib.ExitStack() as failing:
            if not is_loopback(address):
                log.info(
                    "listening on the network, at %s of %s: port %d for the other machines, and "
                    "ports that the system chooses for the processes. Whoever reaches them can "
                    "disturb or take over this run: use a network of your own",
                    address, interface, self.nodes.port,
                )  # fmt: skip
            joined: dict[int, tuple[Connection, Hello]] = {}
            failing.callback(lambda: _close(connection for connection, _ in joined.values()))
            try:
                self._wait(listener, joined)
            except ToolkitError as error:
                refusal = Refused(reason=str(error), is_late=isinstance(error, TrainingError))
                for connection, _ in joined.values():
                    with contextlib.suppress(OSError):
                        connection.send(refusal)
                raise
            store = listen_on(address, 0)
            failing.callback(store.close)
            go = Go(address=address, port=store.getsockname()[1], host=host_name())
            for connection, hello in joined.values():
                answer = msgspec.structs.replace(go, proof=proof(self.token, hello.nonce))
                with contextlib.suppress(OSError):  # lost, as `poll` finds
                    connection.send(answer)
            failing.pop_all()
        peers = {node: (connection, hello.host) for node, (connection, hello) in joined.items()}
        each = count(self.processes, "process")
        log.info("%s, %s on each", count(self.nodes.number, "machine"), each)
        return Meeting(self.nodes, self.processes, go, interface, peers, store)

    def _address(self) -> tuple[str, str]:
        """Where to listen. The name of a machine that has just been made may not be known yet."""
        while True:
            try:
                return listen_address(self.nodes.host, self.nodes.interface)
            except NoAddress as error:
                if self.is_late:
                    raise
                self.say_once(f"waiting for an address: {error}")
            time.sleep(_RETRY_SECONDS)

    def _wait(self, listener: socket.socket, joined: dict[int, tuple[Connection, Hello]]) -> None:
        """Until all others have joined. Who does not say a valid hello is let go."""
        strangers: list[Connection] = []
        with contextlib.ExitStack() as leaving:
            leaving.callback(_close, strangers)
            while len(joined) < self.nodes.number - 1:
                missing = [n for n in range(1, self.nodes.number) if n not in joined]
                names = ", ".join(map(str, missing[:8])) + (", ..." if missing[8:] else "")
                plural = "s" if len(missing) > 1 else ""
                self.say_once(f"waiting for node{plural} {names} at {self.where}")
                if self.is_late:
                    raise TrainingError(
                        f"node{plural} {names} did not come to {self.where} within "
                        f"{self.nodes.join_seconds:.0f} s; start this command there too, with "
                        "--node-rank and the same --head, and see that the port is open"
                        f"{self._other}"
                    )
                sources: list[Any] = [listener, *strangers, *(c for c, _ in joined.values())]
                if listener in ready(sources, 0.2) and len(strangers) < _MOST_STRANGERS:
                    with contextlib.suppress(OSError):
                        strangers.append(self._greet(listener))
                for stranger in list(strangers):
                    if self._hear(stranger, joined):
                        strangers.remove(stranger)
                for node, (connection, hello) in list(joined.items()):
                    try:
                        connection.receive()
                    except Gone:
                        log.warning("node %d (%s) left before the start", node, hello.host)
                        connection.close()
                        del joined[node]

    def _greet(self, listener: socket.socket) -> Connection:
        connection = Connection(listener.accept()[0])
        connection.challenge = secrets.token_hex(16)
        connection.send(Challenge(protocol=PROTOCOL, challenge=connection.challenge))
        return connection

    def _hear(self, stranger: Connection, joined: dict[int, tuple[Connection, Hello]]) -> bool:
        """Whether `stranger` has said who it is, or is let go."""
        try:
            messages = stranger.receive()
        except Gone:
            stranger.close()
            return True
        hello = next((m for m in messages if isinstance(m, Hello)), None)
        if hello is None:
            if is_idle := time.monotonic() - stranger.opened_at > _HELLO_SECONDS:
                stranger.close()
            return is_idle
        is_known = _equal(hello.proof, hello.proof_for(self.token, stranger.challenge))
        hello = msgspec.structs.replace(hello, host=visible(hello.host))
        if not is_known:
            log.warning("%s came with another %s than this machine's", hello.host, TOKEN)
            _refuse(stranger, f"{TOKEN} is not that of the head ({host_name()})")
            return True
        if hello.common.run != self.common.run:
            theirs = visible(shortened(hello.common.run))
            log.warning("%s came for another run, %s", hello.host, theirs)
            self._other = f"; {hello.host} came for another run, {theirs}"
            reason = (
                f"the head at {self.where} ({host_name()}) starts the run {self.common.run}, not "
                f"{theirs}; give all machines of a run the same name, each run a port of its own"
            )
            _refuse(stranger, reason)
            return True
        if hello.node in joined and not _answers(joined[hello.node][0]):
            log.warning("node %d (%s) is gone, and comes again", hello.node, hello.host)
            joined.pop(hello.node)[0].close()
        if (problem := self._problem(hello, joined)) is not None:
            problem = visible(problem)
            _refuse(stranger, problem)
            raise ConfigError(problem)
        joined[hello.node] = stranger, hello
        return True

    def _problem(self, hello: Hello, joined: dict[int, tuple[Connection, Hello]]) -> str | None:
        """Why this machine cannot take part."""
        who = f"node {hello.node} ({hello.host})"
        for flag, theirs, ours in (
            ("--nodes", hello.nodes, self.nodes.number),
            ("--processes", hello.processes, self.processes),
        ):
            if theirs != ours:
                return (
                    f"{who} was started with {flag} {theirs}, node 0 ({host_name()}) with "
                    f"{flag} {ours}; give all machines the same"
                )
        if not 0 < hello.node < self.nodes.number or hello.node in joined:
            other = f"{joined[hello.node][1].host} has" if hello.node in joined else "the head has"
            return (
                f"--node-rank {hello.node} on {hello.host} is taken: {other} it; give each "
                f"machine its own, 0 to {self.nodes.number - 1}"
            )
        return difference(who, hello.common, f"node 0 ({host_name()})", self.common)


class _Member(_Side):
    def gather(self) -> Meeting:
        source = find_interface(self.nodes.interface) if self.nodes.interface else None
        with contextlib.ExitStack() as failing:
            connection = self._reach(source)
            failing.callback(connection.close)
            go = self._join(connection)
            failing.pop_all()
        interface = self.nodes.interface or connection.interface
        number = count(self.processes, "process")
        log.info("node %d, head %s: %s on %s", self.nodes.rank, go.host, number, interface)
        peers = {0: (connection, go.host)}
        return Meeting(self.nodes, self.processes, go, interface, peers, None)

    def _reach(self, source: str | None) -> Connection:
        where = (self.nodes.host, self.nodes.port)
        while True:
            try:
                address = None if source is None else (source, 0)
                return Connection(socket.create_connection(where, 5.0, source_address=address))
            except OSError as error:
                why = error.strerror or str(error)
            self.say_once(f"waiting for node 0 at {self.where} ({why})")
            if self.is_late:
                raise TrainingError(
                    f"node 0 cannot be reached at {self.where} within "
                    f"{self.nodes.join_seconds:.0f} s ({why}); start it with --node-rank 0 and the "
                    "same --head, and see that its port is open for this machine"
                )
            time.sleep(_RETRY_SECONDS)

    def _join(self, connection: Connection) -> Go:
        """Say who this is; the head's answer once all are there."""
        nonce = secrets.token_hex(16)
        while True:
            try:
                messages = connection.receive(wait=0.2)
            except Gone as gone:
                raise TrainingError(
                    f"{self.where} {gone}; if node 0 is there, its error says why"
                ) from None
            for message in messages:
                if isinstance(message, Challenge):
                    if message.protocol != PROTOCOL:
                        raise ConfigError(
                            f"node 0 at {self.where} has another version of toolkit; install the "
                            "same on all machines"
                        )
                    self._say_hello(connection, message, nonce)
                    # From here on the head decides how long is too long, and says so.
                    self.started = time.monotonic() + _HELLO_SECONDS
                elif isinstance(message, Alive):
                    with contextlib.suppress(OSError):
                        connection.send(Alive())
                elif isinstance(message, Refused):
                    kind = TrainingError if message.is_late else ConfigError
                    raise kind(visible(message.reason))
                elif isinstance(message, Go):
                    if not _equal(message.proof, proof(self.token, nonce)):
                        raise ConfigError(
                            f"who answers at {self.where} does not know {TOKEN}: not the head of "
                            "this run, or started without it"
                        )
                    return msgspec.structs.replace(message, host=visible(message.host))
            self.say_once("waiting for the other machines")
            if self.is_late:
                raise TrainingError(
                    f"the head at {self.where} did not start the run within "
                    f"{self.nodes.join_seconds:.0f} s; another machine is missing, or this is no "
                    "head of a run"
                )

    def _say_hello(self, connection: Connection, challenge: Challenge, nonce: str) -> None:
        hello = Hello(
            node=self.nodes.rank,
            host=host_name(),
            nodes=self.nodes.number,
            processes=self.processes,
            common=self.common,
            nonce=nonce,
        )
        signed = hello.proof_for(self.token, challenge.challenge)
        with contextlib.suppress(OSError):
            connection.send(msgspec.structs.replace(hello, proof=signed))


def _equal(told: str, expected: str) -> bool:
    return hmac.compare_digest(told.encode(), expected.encode())


def _answers(connection: Connection) -> bool:
    """Whether a machine that has joined is still there: who was reset closes nothing."""
    try:
        connection.send(Alive())
        return bool(connection.receive(wait=_ANSWER_SECONDS))
    except (OSError, Gone):
        return False


def _refuse(connection: Connection, reason: str) -> None:
    with contextlib.suppress(OSError):
        connection.send(Refused(reason=reason))
    connection.close()


def _close(connections: Iterable[Connection]) -> None:
    for connection in connections:
        connection.close()

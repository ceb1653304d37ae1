"""The machines of one run, and what their launchers tell each other while it goes. `joining.py` is
how they find each other; `messages.py` what they say.

Which process failed first, with which exit code, is told to all machines, and so is which machine
is lost: gone, or silent for `LOST_SECONDS`.
"""

import contextlib
import socket
import time
from typing import Any, NamedTuple

from toolkit.launch.messages import Alive, Connection, Ended, Go, Gone, Lost

DEFAULT_PORT = 29500
JOIN_SECONDS = 600.0
"""How long machines wait for each other, by default."""
LOST_SECONDS = 60.0
ALIVE_SECONDS = 5.0


class Nodes(NamedTuple):
    """The machines of a run, as one of them sees it."""

    number: int
    rank: int
    """Of this machine; 0 is the head."""
    host: str
    """Name or address of the head."""
    port: int = DEFAULT_PORT
    interface: str | None = None
    """Network interface to listen on; None: the one that has the head's address, or reaches it."""
    join_seconds: float = JOIN_SECONDS


class Failed(NamedTuple):
    """The end of a process. `node` is None for this machine; `code` is None where the whole machine
    is lost, and then `rank` is too."""

    node: int | None
    host: str
    rank: int | None
    code: int | None

    def __str__(self) -> str:
        where = "" if self.node is None else f"node {self.node} ({self.host})"
        if self.code is None:
            return f"{where} is lost: its launcher ended, or the network did"
        how = "was killed" if self.code < 0 else f"ended with exit code {self.code}"
        return f"rank {self.rank}{where and f' on {where}'} {how}"


class Meeting:
    """What a launcher knows once all machines are there, and its connections to the others."""

    def __init__(
        self,
        nodes: Nodes,
        processes: int,
        go: Go,
        interface: str,
        peers: dict[int, tuple[Connection, str]],
        store: socket.socket | None,
    ) -> None:
        self.interface = interface
        self.first_rank = nodes.rank * processes
        self.store = store
        """On the head: where rank 0's store listens."""
        self._nodes = nodes
        self._processes = processes
        self._go = go
        self._peers = peers
        """By node: all others on the head, the head on the others."""
        self._ended: set[int] = set()
        self._spoke_at = time.monotonic()
        for connection, _ in peers.values():
            connection.heard_at = self._spoke_at  # it may have waited long for the others
        self._has_told = False

    @property
    def variables(self) -> dict[str, str]:
        """What all processes of this machine see, besides the numbers of their own."""
        found = {
            "WORLD_SIZE": str(self._nodes.number * self._processes),
            "GROUP_RANK": str(self._nodes.rank),
            "MASTER_ADDR": self._go.address,
            "MASTER_PORT": str(self._go.port),
        }
        if self._nodes.interface is not None:  # else what the environment says stays
            found |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), self.interface)
        return found

    def tell(self, *, rank: int | None, code: int | None) -> None:
        """Tell the others that `rank` of this machine was the first to end with `code`."""
        if not self._has_told:
            self._has_told = True
            end = Ended(node=self._nodes.rank, host=host_name(), rank=rank, code=code or 0)
            for node in self._peers:
                self._send(node, end)

    def poll(self) -> Failed | None:
        """Which other machine failed, if one did; called often, never waits."""
        now = time.monotonic()
        if now - self._spoke_at > ALIVE_SECONDS:
            self._spoke_at = now
            for node in self._peers:
                self._send(node, Alive())
        for node, (connection, host) in self._peers.items():
            if node in self._ended:
                continue
            try:
                messages = connection.receive()
            except Gone:
                return self._lose(node, host)
            for message in messages:
                if isinstance(message, Ended) and message.node == node:
                    self._ended.add(node)
                if isinstance(message, Lost):
                    return Failed(message.node, message.host, None, None)
                if isinstance(message, Ended) and message.code != 0:
                    self._pass_on(message, node)
                    return Failed(message.node, message.host, message.rank, message.code)
            if now - connection.heard_at > LOST_SECONDS:
                return self._lose(node, host)
        return None

    def _lose(self, node: int, host: str) -> Failed:
        self._ended.add(node)
        self._pass_on(Lost(node=node, host=host), node)
        return Failed(node, host, None, None)

    def _pass_on(self, message: Any, source: int) -> None:
        """The others on the other machines know only what the head tells them."""
        for node in self._peers:
            if node != source:
                self._send(node, message)

    def close(self) -> None:
        for connection, _ in self._peers.values():
            connection.close()
        if self.store is not None:
            self.store.close()

    def _send(self, node: int, message: Any) -> None:
        with contextlib.suppress(OSError):  # `poll` finds out
            self._peers[node][0].send(message)


def host_name() -> str:
    return socket.gethostname()

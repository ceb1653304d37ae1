"""What the launchers of several machines say to each other: lines of JSON, of bounded length, with
the fields and types below and nothing else."""

import contextlib
import hashlib
import hmac
import selectors
import socket
import time
from collections.abc import Iterable
from typing import Any

import msgspec

from toolkit.launch.interfaces import interface_of

PROTOCOL = 1
_LONGEST = 1 << 20
"""Bytes of a message."""
_MOST = 100
"""Messages that are read at a time, about."""
_SHOWN = 5


HASH = "#"
"""Begins a value of `Common.config` that is a hash."""


class Common(msgspec.Struct, frozen=True):
    """What all machines must have alike: name -> value."""

    versions: dict[str, str | None] = {}
    config: dict[str, str] = {}
    """By path; texts as hashes."""
    run: str = ""
    """Its name. Machines of another run have only mistaken the head."""


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """The head's first line."""

    protocol: int
    challenge: str


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """What a machine is about to start."""

    node: int
    host: str
    nodes: int
    processes: int
    common: Common
    nonce: str
    proof: str = ""

    def proof_for(self, token: str, challenge: str) -> str:
        """That whoever says this knows `token`, here and now."""
        unsigned = msgspec.json.encode(msgspec.structs.replace(self, proof=""), order="sorted")
        return proof(token, challenge + unsigned.decode())


class Go(msgspec.Struct, frozen=True, kw_only=True, tag="go"):
    """All are there; rank 0's store is at `address` and `port`."""

    address: str
    port: int
    host: str
    proof: str = ""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The run does not start."""

    reason: str
    is_late: bool = False
    """Another machine did not come in time."""


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    pass


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """The processes of `node` ended: all with 0, or `rank` first with another code."""

    node: int
    host: str
    rank: int | None
    code: int


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag="lost"):
    """The head lost `node`: the others, which talk to the head alone, do not see it."""

    node: int
    host: str


_ANY = msgspec.json.Decoder(Challenge | Hello | Go | Refused | Alive | Ended | Lost)


class Gone(Exception):
    """The other side is no longer there, or does not speak like one of us."""


class Connection:
    """To another launcher."""

    def __init__(self, other: socket.socket) -> None:
        other.settimeout(5.0)
        other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.challenge = ""
        self.opened_at = self.heard_at = time.monotonic()
        self._socket = other
        self._buffer = b""

    @property
    def interface(self) -> str:
        """The network interface of this side."""
        return interface_of(self._socket.getsockname()[0])

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Raises OSError."""
        self._socket.sendall(msgspec.json.encode(message) + b"\n")

    def receive(self, *, wait: float = 0.0) -> list[Any]:
        """The messages that came, perhaps none; waits up to `wait` seconds for some. Raises
        Gone."""
        found: list[Any] = []
        while ready([self._socket], 0.0 if found else wait):
            try:
                received = self._socket.recv(1 << 16)
            except OSError as error:  # also where it left with a line of ours unread
                received, why = b"", f"is gone ({error.strerror or error})"
            else:
                why = "closed the connection"
            if not received:
                if found:  # its last words; the end is found next time
                    break
                raise Gone(why)
            *lines, self._buffer = (self._buffer + received).split(b"\n")
            if len(self._buffer) > _LONGEST:
                raise Gone("does not speak like a launcher of toolkit")
            try:
                found += [_ANY.decode(line) for line in lines]
            except msgspec.MsgspecError:
                raise Gone("does not speak like a launcher of toolkit") from None
            if lines:
                self.heard_at = time.monotonic()
            if len(found) > _MOST:
                break
        return found

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


def ready(sources: Iterable[Any], seconds: float) -> list[Any]:
    """Those of `sources` that have something to read; waits up to `seconds` for one."""
    with selectors.DefaultSelector() as selector:  # `select` takes no descriptor above 1023
        for source in sources:
            selector.register(source, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(seconds)]


def proof(token: str, text: str) -> str:
    """That whoever says this knows `token`; empty where there is none."""
    return token and hmac.new(token.encode(), text.encode(), hashlib.sha256).hexdigest()


def difference(who: str, theirs: Common, me: str, ours: Common) -> str | None:
    """What is not alike on two machines, as an error; None: nothing."""
    if odd := _unlike(theirs.versions, ours.versions):
        name = odd[0]
        return (
            f"{who} has {name} {theirs.versions.get(name)}, {me} has {name} "
            f"{ours.versions.get(name)}; install the same on all machines"
        )
    if odd := _unlike(theirs.config, ours.config):
        shown = [_both(name, theirs.config, ours.config) for name in odd[:_SHOWN]]
        names = ", ".join(shown) + (", ..." if odd[_SHOWN:] else "")
        return (
            f"{who} has another config than {me}: {names}; start all machines with the same "
            "config file and flags"
        )
    return None


def _both(name: str, theirs: dict[str, str], ours: dict[str, str]) -> str:
    """A name with the values of both sides, where they are not hashes."""
    values = [side.get(name, "nothing") for side in (theirs, ours)]
    return (
        name if any(value.startswith(HASH) for value in values) else f"{name} ({', '.join(values)})"
    )


def _unlike(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    names = {**ours, **theirs}
    return [name for name in names if theirs.get(name, "") != ours.get(name, "")]

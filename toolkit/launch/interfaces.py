"""Network interfaces of this machine, and sockets that listen on one of them alone."""

import socket

import psutil

from toolkit.distributed.ranks import is_loopback
from toolkit.errors import ConfigError

_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class NoAddress(ConfigError):
    """Nobody knows an address of this name, perhaps not yet."""


def find_interface(name: str) -> str:
    """An address of the interface. Raises ConfigError: there is none of that name."""
    found = _addresses()
    if name not in found:
        raise ConfigError(
            f"--interface {name}: this machine has none of that name; it has {_all()}"
        )
    if not found[name]:
        raise ConfigError(f"--interface {name}: it has no address; there is {_all()}")
    return found[name][0]


def interface_of(address: str) -> str:
    """The name of the interface that has `address`; raises ConfigError where none has."""
    for name, addresses in _addresses().items():
        if address in addresses:
            return name
    raise ConfigError(f"{address} is no address of this machine, which has {_all()}")


def listen_address(host: str, interface: str | None) -> tuple[str, str]:
    """The address at which the head listens, and the name of its interface: `interface`, or the one
    that has an address of `host`. Raises ConfigError: this machine has none; NoAddress: nobody has.
    """
    if interface is not None:
        return find_interface(interface), interface
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NoAddress(
            f"--head {host}: {error.strerror}; give an address of this machine, node 0, or "
            f"--interface NAME: {_all()}"
        ) from None
    addresses = [str(entry[4][0]) for entry in found]
    own = [a for a in addresses if any(a in there for there in _addresses().values())]
    own.sort(key=is_loopback)
    if own and (is_loopback(host) or not is_loopback(own[0])):
        return own[0], interface_of(own[0])
    if own or any(is_loopback(address) for address in addresses):
        raise ConfigError(
            f"--head {host} is {(own or addresses)[0]} on this machine, which no other one "
            f"reaches; give --interface NAME: {_all()}"
        )
    which = host if host == addresses[0] else f"{host}, {addresses[0]},"
    raise ConfigError(
        f"--head {which} is no address of this machine, which is node 0; give the "
        f"--node-rank of this machine, or if it is the head, --interface NAME: {_all()}"
    )


def listen_on(address: str, port: int) -> socket.socket:
    """A socket that is reached at `address` alone; port 0: a free one. Raises OSError."""
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    return listener


def _addresses() -> dict[str, list[str]]:
    """By interface, IPv4 first."""
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        own = [a for a in addresses if a.family in _FAMILIES]
        own.sort(key=lambda a: _FAMILIES.index(a.family))
        found[name] = [a.address.partition("%")[0] for a in own]
    return found


def _all() -> str:
    """`eth0 (10.0.0.5), lo (127.0.0.1)`: loopback last."""
    named = sorted(_addresses().items(), key=lambda item: item[1][:1] == ["127.0.0.1"])
    return ", ".join(f"{name} ({own[0]})" for name, own in named if own) or "no interface"

"""Whether the launcher's variables make sense together: left in a shell, they start a run that
waits for processes that nobody started. No torch here."""

import ipaddress
import os
from collections.abc import Mapping

from toolkit.errors import ConfigError

STORE_FILE = "TOOLKIT_STORE_FILE"
"""Variable of `toolkit resume`'s processes: the file through which they find each other."""

_HINT = "it is from the environment, not from a config: unset it, or start with a launcher"


def check_launcher_variables(environ: Mapping[str, str] = os.environ) -> None:
    """Check what `torchrun`, `accelerate launch`, `deepspeed` or a job script said about ranks.

    Raises:
        ConfigError: names the variable and its value. Every process shows it, since none knows
            whether it is rank 0.
    """
    try:
        _check(environ)
    except ConfigError as error:
        error.only_here = True
        raise


def _check(environ: Mapping[str, str]) -> None:
    size = _number(environ, "WORLD_SIZE", least=1)
    rank = _number(environ, "RANK")
    local_rank = _number(environ, "LOCAL_RANK")
    local_size = _number(environ, "LOCAL_WORLD_SIZE", least=1)
    if size is None:
        for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
            if value:
                raise ConfigError(f"{name}={value} without WORLD_SIZE; {_HINT}")
        return
    if rank is None and size > 1:
        raise ConfigError(
            f"WORLD_SIZE={size} without RANK, so no process knows which one it is; {_HINT}"
        )
    if rank is not None and rank >= size:
        raise ConfigError(f"RANK={rank} with WORLD_SIZE={size}: ranks are 0 to {size - 1}; {_HINT}")
    if local_size is not None and local_size > size:
        raise ConfigError(f"LOCAL_WORLD_SIZE={local_size} is more than WORLD_SIZE={size}; {_HINT}")
    if local_rank is not None and local_rank >= (local_size or size):
        most = f"LOCAL_WORLD_SIZE={local_size}" if local_size else f"WORLD_SIZE={size}"
        raise ConfigError(f"LOCAL_RANK={local_rank} with {most}: too large; {_HINT}")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environ.get(name):
                raise ConfigError(
                    f"WORLD_SIZE={size} without {name}, which says where the processes meet; "
                    "unset WORLD_SIZE to train on one process, or start with a launcher"
                )
        port = _number(environ, "MASTER_PORT")
        if port is not None and not 0 < port < 65536:
            raise ConfigError(f"MASTER_PORT={port}: ports are 1 to 65535; {_HINT}")


def is_one_machine(environ: Mapping[str, str]) -> bool:
    """Whether all ranks surely run on this machine."""
    size = environ.get("WORLD_SIZE", "1")
    return environ.get("LOCAL_WORLD_SIZE") == size or is_loopback(environ.get("MASTER_ADDR", ""))


def is_loopback(address: str) -> bool:
    """Whether an address names this machine alone."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def loopback_interface() -> str:
    """The name of the network interface that never leaves the machine: `lo` on Linux."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return name
    return "lo"


def _number(environ: Mapping[str, str], name: str, *, least: int = 0) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise ConfigError(f"{name}={text!r} is no number of {least} or more; {_HINT}")
    return int(text)

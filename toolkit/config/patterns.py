"""Shell-style patterns over names that are known: each must match one."""

import difflib
import fnmatch
from collections.abc import Sequence

from toolkit.errors import ConfigError


def matching(key: str, pattern: str, names: Sequence[str], noun: str = "parameter") -> list[str]:
    """The names that `pattern` matches, in their order.

    Args:
        key: path of the config value, for the message.

    Raises:
        ConfigError: there is none; names one that looks like it.
    """
    hits = fnmatch.filter(names, pattern)
    if not hits:
        near = difflib.get_close_matches(pattern[:100], names[:200], n=1, cutoff=0.75)
        hint = f"did you mean {near[0]}?" if near else f"names look like {', '.join(names[:3])}"
        raise ConfigError(f"{pattern!r} matches no {noun} ({hint})", key=key)
    return hits

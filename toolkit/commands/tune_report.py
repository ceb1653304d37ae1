"""What `toolkit tune` found: a table, flags, and a file."""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from toolkit.errors import ConfigError
from toolkit.storage.atomic import create_atomic

FASTER = 1.03
"""What a change has to win at least; more, where two turns of the first try are further apart."""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the table."""

    change: str
    """What is different from the best one before."""
    values: dict[str, Any]
    """All that differs from the config."""
    tokens_per_second: float | None = None
    peak_memory: int | None = None
    """Bytes."""
    failed: str | None = None


class Report(NamedTuple):
    """What `toolkit tune` found."""

    attempts: list[Attempt]
    best: Attempt
    flags: list[str]
    """What changes the config so on the command line."""
    written: dict[str, Any]
    """A config file with the best one's values: what no default says."""
    faster: float = FASTER
    """How many times faster a change had to be."""


def describe(report: Report) -> tuple[list[list[str]], str]:
    """The rows of a table (change, tokens/s, GB, note), and what follows from it."""
    rows = []
    for attempt in report.attempts:
        speed, memory = attempt.tokens_per_second, attempt.peak_memory
        note = attempt.failed or ("best" if attempt is report.best else "")
        rows.append(
            [
                attempt.change,
                "" if speed is None else f"{speed:,.0f}",
                "" if memory is None else f"{memory / 1e9:.2f}",
                note,
            ]
        )
    if not report.flags:
        least = f"{100 * (report.faster - 1):.0f}%"
        return rows, f"nothing is faster than the config as it is by more than {least}"
    return rows, " ".join(report.flags)


def write_config(report: Report, file: Path) -> None:
    """Write the config with the best values, for `toolkit train FILE`. Raises ConfigError: there is
    such a file by now."""
    text = msgspec.json.format(msgspec.json.encode(report.written), indent=2)
    if not create_atomic(file, text + b"\n"):
        raise ConfigError(f"--write {file}: exists by now, and was not replaced")

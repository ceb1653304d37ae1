"""`Service`, what a sender asks of a tracking service, and what it tells it."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from toolkit.train.trackers.rows import Row

Outcome = Literal["finished", "failed", "stopped", "killed"]


class TrackedRun(NamedTuple):
    """What a service is told of a run besides its metrics."""

    folder: Path
    name: str
    project: str
    key: str
    """32 hexadecimal digits, chosen once for each run folder and service."""

    @property
    def scratch(self) -> Path:
        """Where libraries keep their files."""
        return self.folder / "trackers"


class Opened(NamedTuple):
    """A run at a service."""

    run_id: str | None
    """What `open` takes to continue it."""
    last_step: int | None = None
    """The last step that the service has (-1: none); None: it does not say."""
    where: str | None = None
    """Where to look at it."""


class Service:
    """One run at one service. All methods may raise anything; they are then called again."""

    def __init__(self, config: Any, run: TrackedRun, tell: Callable[[str], object]) -> None:
        self.config, self.run, self.tell = config, run, tell
        self.name = config.name or run.name
        self.project = config.project or run.project

    def open(self, run_id: str | None) -> Opened:
        """Create the run, or continue the one that was opened as `run_id`."""
        raise NotImplementedError

    def describe(self, facts: dict[str, Any]) -> None:
        """Store config, git, environment and command; called again when they change."""
        raise NotImplementedError

    def send(self, rows: Sequence[Row], *, again: bool) -> None:
        """Store rows, in step order; `again`: some may be there from a call that was cut off."""
        raise NotImplementedError

    def finish(self, outcome: Outcome) -> None:
        """Deliver what the library still holds, and mark how the run ended."""
        raise NotImplementedError


def flat(facts: dict[str, Any], before: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` as `{"a.b": "1"}`; lists as JSON."""
    found: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            found[f"{before}{name}"] = text
    return found


def cells(row: Row) -> list[list[str]]:
    """Prompt and text of each sample."""
    return [[sample["prompt"], sample["text"]] for sample in row.samples]


def parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """`items`, up to `size` at a time."""
    return (items[first : first + size] for first in range(0, len(items), size))

"""Steps that succeed or fail on all ranks: one rank's error is never the others' time-out."""

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from toolkit.errors import ToolkitError, TrainingError

Result = TypeVar("Result")


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's picklable `value`, by rank; `group` None: one process."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def run_together(
    action: Callable[[], Result], group: dist.ProcessGroup | None, *, failing: str
) -> list[Result]:
    """Run `action` on every rank; the results by rank.

    Raises:
        TrainingError: on every rank when it failed on any: `failing`, then rank, host and cause.
    """
    result, failure, cause = None, None, None
    try:
        result = action()
    except Exception as error:
        cause = error
        kind = [] if isinstance(error, ToolkitError) else [f"{type(error).__name__}:"]
        reason = " ".join([*kind, *str(error).splitlines()[:1]])
        failure = f"rank {0 if group is None else dist.get_rank(group)} on {socket.gethostname()}"
        failure += f": {reason}"
    everywhere = gather((result, failure), group)
    failures = [failure for _, failure in everywhere if failure is not None]
    if failures:
        others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        raise TrainingError(f"{failing}: {failures[0]}{others}") from cause
    return [result for result, _ in everywhere]

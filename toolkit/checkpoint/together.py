"""Steps that succeed or fail on all ranks: one rank's error is never the others' time-out. No torch
without a group."""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from toolkit.errors import CheckpointError, ToolkitError, TrainingError
from toolkit.storage.remote import ContentError

if TYPE_CHECKING:
    import torch.distributed as dist

Result = TypeVar("Result")


def place_in(group: "dist.ProcessGroup | None") -> tuple[int, int]:
    """Rank and number of ranks; `group` None: one process."""
    if group is None:
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(group), group.size()


def gather(value: Any, group: "dist.ProcessGroup | None") -> list[Any]:
    """Every rank's picklable `value`, by rank."""
    if group is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def run_together(
    action: Callable[[], Result],
    group: "dist.ProcessGroup | None",
    *,
    failing: str,
    finds_damage: bool = False,
) -> list[Result]:
    """Run `action` on every rank; the results by rank.

    Raises:
        TrainingError: on every rank when it failed on any: `failing`, then rank, host and cause.
        CheckpointError: on every rank, with `finds_damage`, when it raised one on any.
    """
    result, failure, damage, cause = None, None, None, None
    try:
        result = action()
    except Exception as error:
        cause = error
        if finds_damage and isinstance(error, CheckpointError | ContentError):
            damage = str(error)
        else:
            kind = [] if isinstance(error, ToolkitError) else [f"{type(error).__name__}:"]
            reason = " ".join([*kind, *str(error).splitlines()[:1]])
            failure = f"rank {place_in(group)[0]} on {socket.gethostname()}: {reason}"
    everywhere = gather((result, failure, damage), group)
    failures = [failure for _, failure, _ in everywhere if failure is not None]
    if failures:
        others = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        raise TrainingError(f"{failing}: {failures[0]}{others}") from cause
    for _, _, damage in everywhere:
        if damage is not None:
            raise CheckpointError(damage) from cause
    return [result for result, _, _ in everywhere]


def ask_rank_0(
    action: Callable[[], Result], group: "dist.ProcessGroup | None", *, failing: str
) -> Result:
    """What `action` gives on rank 0, on every rank; errors as with `finds_damage`."""
    is_first = place_in(group)[0] == 0
    return run_together(
        lambda: action() if is_first else None, group, failing=failing, finds_damage=True
    )[0]  # type: ignore[return-value]

"""Which checkpoint: the newest whole one, found by looking at the folders.

All ranks look together: each checks a share of the files, so that hashing takes as long as saving.
"""

import logging
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple

from toolkit.checkpoint.folder import (
    CheckpointMetadata,
    Place,
    check_files,
    inside,
    is_committed,
    move_aside,
    rank_file,
    read_metadata,
    saved_steps,
)
from toolkit.checkpoint.together import place_in, run_together
from toolkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch.distributed as dist

log = logging.getLogger(__name__)


class Found(NamedTuple, Generic[Place]):
    """What a search saw."""

    checkpoint: Place | None
    """The newest whole one."""
    rejected: tuple[Place, ...] = ()
    """Newer ones that are not."""


def find_checkpoint(
    path: Path,
    *,
    rank: int = 0,
    group: "dist.ProcessGroup | None" = None,
    quick: bool = False,
    report: bool = True,
) -> Found[Path]:
    """The newest whole checkpoint meant by `path`; every rank of `group` calls it.

    An invalid one is reported with the reason and the one before is tried.

    Args:
        path: a step folder, a folder of them, or a run folder.
        quick: compare sizes, and only the content of rank 0's state. Reports nothing.
        report: log what is invalid.

    Raises:
        CheckpointError: `path` is itself a step folder, and not whole.
    """

    def problem(checkpoint: Path) -> str | None:
        return _problem(checkpoint, place_in(group), hashes=not quick)

    return _newest(path, problem, rank, group, report=report and not quick)


def find_remote_checkpoint(
    url: str,
    *,
    rank: int = 0,
    group: "dist.ProcessGroup | None" = None,
    hashes: bool = False,
    skip: Collection[str] = (),
) -> Found[str]:
    """`find_checkpoint` at a URL. Being out of reach is not being invalid.

    Args:
        hashes: also read all contents, a share on each rank, and compare their hashes; default:
            sizes, and the description of the tensors.
        skip: known to be damaged.

    Raises:
        CheckpointError: `url` is itself a step folder, and not whole.
        TrainingError: the store cannot be asked.
    """

    def problem(checkpoint: str) -> str | None:
        if place_in(group)[0] == 0 or hashes:
            return _problem(checkpoint, place_in(group), hashes=hashes)
        return None

    return _newest(url.rstrip("/"), problem, rank, group, report=True, skip=skip)


def problem_of(checkpoint: Path) -> str | None:
    """Why `checkpoint` is not whole; None: it is."""
    return _problem(checkpoint, (0, 1), hashes=True)


def set_aside(checkpoints: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they count no more; see `move_aside`."""
    for checkpoint in checkpoints:
        try:
            aside = move_aside(checkpoint)
        except OSError as error:
            log.warning("%s: damaged, but cannot be renamed: %s", checkpoint, error)
        else:
            log.warning("damaged checkpoint renamed: %s", aside)


def share_of(metadata: CheckpointMetadata, rank: int, world_size: int) -> list[str]:
    """The files that `rank` of `world_size` reads: about as many bytes as every other."""
    loads = [0] * world_size
    shares: list[list[str]] = [[] for _ in range(world_size)]
    for name, entry in sorted(metadata.files.items(), key=lambda item: (-item[1].size, item[0])):
        least = loads.index(min(loads))
        loads[least] += entry.size
        shares[least].append(name)
    return shares[rank]


def _candidates(path: Place) -> list[Place]:
    if is_committed(path):
        return [path]
    for root in (path, inside(path, "checkpoints")):
        if steps := saved_steps(root):
            return [inside(root, f"step{step}") for step in reversed(steps)]
    return []


def _newest(
    path: Place,
    problem: Callable[[Place], str | None],
    rank: int,
    group: "dist.ProcessGroup | None",
    *,
    report: bool,
    skip: Collection[Place] = (),
) -> Found[Place]:
    """The first of the candidates, which rank 0 lists, in which no rank sees a problem."""
    failing = f"{path}: cannot look for checkpoints"
    rejected: list[Place] = []
    candidates = run_together(
        lambda: _candidates(path) if rank == 0 else [], group, failing=failing
    )[0]
    for checkpoint in candidates:
        if checkpoint in skip:
            rejected.append(checkpoint)
            continue
        seen = run_together(lambda: problem(checkpoint), group, failing=failing)  # noqa: B023
        problems = [problem for problem in seen if problem]
        if not problems:
            return Found(checkpoint, tuple(rejected))
        if checkpoint == path:
            raise CheckpointError(problems[0])
        if report and rank == 0:
            log.warning("checkpoint skipped: %s", problems[0])
        rejected.append(checkpoint)
    return Found(None, tuple(rejected))


def _problem(checkpoint: Path | str, place: tuple[int, int], *, hashes: bool) -> str | None:
    """What is wrong with this rank's share of the files."""
    try:
        metadata = read_metadata(checkpoint)
        if hashes:
            check_files(checkpoint, metadata, hashes=True, only=share_of(metadata, *place))
        else:
            check_files(checkpoint, metadata)
            if isinstance(checkpoint, Path):
                check_files(checkpoint, metadata, hashes=True, only=[rank_file(0)])
        if place[0] == 0:
            from toolkit.checkpoint.load import shapes_of  # torch

            shapes_of(checkpoint)
    except (CheckpointError, OSError) as error:
        return str(error)
    return None

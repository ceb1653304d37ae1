"""Which checkpoint: the newest whole one, found by looking at the folders.

All ranks look together: each checks a share of the files, so that hashing takes as long as saving.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from toolkit.checkpoint.folder import (
    METADATA_FILE,
    TENSORS_FOLDER,
    check_files,
    move_aside,
    rank_file,
    read_metadata,
    saved_steps,
    step_folder,
)
from toolkit.checkpoint.tensors import stored_shapes
from toolkit.checkpoint.together import gather, run_together
from toolkit.errors import CheckpointError

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """What `find_checkpoint` saw."""

    checkpoint: Path | None
    """The newest whole one."""
    rejected: tuple[Path, ...] = ()
    """Newer ones that are not."""


def find_checkpoint(
    path: Path,
    *,
    rank: int = 0,
    group: dist.ProcessGroup | None = None,
    quick: bool = False,
    report: bool = True,
) -> Found:
    """The newest whole checkpoint meant by `path`; every rank of `group` calls it.

    An invalid one is reported with the reason and the one before is tried.

    Args:
        path: a step folder, a folder of them, or a run folder.
        quick: compare sizes, and only the content of rank 0's state. Reports nothing.
        report: log what is invalid.

    Raises:
        CheckpointError: `path` is itself a step folder, and not whole.
    """
    candidates = run_together(
        lambda: _candidates(path) if rank == 0 else [],
        group,
        failing=f"{path}: cannot look for checkpoints",
    )[0]
    rejected: list[Path] = []
    for checkpoint in candidates:
        problems = [p for p in gather(_problem(checkpoint, group, quick=quick), group) if p]
        if not problems:
            return Found(checkpoint, tuple(rejected))
        if checkpoint == path:
            raise CheckpointError(problems[0])
        if report and not quick:
            log.warning("checkpoint skipped: %s", problems[0])
        rejected.append(checkpoint)
    return Found(None, tuple(rejected))


def set_aside(checkpoints: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they count no more; see `move_aside`."""
    for checkpoint in checkpoints:
        try:
            aside = move_aside(checkpoint)
        except OSError as error:
            log.warning("%s: damaged, but cannot be renamed: %s", checkpoint, error)
        else:
            log.warning("damaged checkpoint renamed: %s", aside)


def _candidates(path: Path) -> list[Path]:
    if (path / METADATA_FILE).is_file():
        return [path]
    for root in (path, path / "checkpoints"):
        steps = saved_steps(root)
        if steps:
            return [step_folder(root, step) for step in reversed(steps)]
    return []


def problem_of(checkpoint: Path) -> str | None:
    """Why `checkpoint` is not whole; None: it is."""
    return _problem(checkpoint, None, quick=False)


def _problem(checkpoint: Path, group: dist.ProcessGroup | None, *, quick: bool) -> str | None:
    """What is wrong with this rank's share of the files."""
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), group.size())
    try:
        metadata = read_metadata(checkpoint)
        if quick:
            check_files(checkpoint, metadata)
            check_files(checkpoint, metadata, hashes=True, only=[rank_file(0)])
        else:
            share = sorted(metadata.files)[rank::world_size]
            check_files(checkpoint, metadata, hashes=True, only=share)
        if rank == 0:
            stored_shapes(checkpoint / TENSORS_FOLDER)
    except (CheckpointError, OSError) as error:
        return str(error)
    return None

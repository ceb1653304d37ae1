"""Which checkpoints stay: a pure rule over what is there, and its application to a place."""

import logging
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from toolkit.checkpoint.folder import (
    METADATA_FILE,
    CheckpointMetadata,
    Kind,
    Place,
    check_files,
    inside,
    is_committed,
    move_aside,
    read_metadata,
    saved_steps,
    step_folders,
    step_of,
)
from toolkit.errors import CheckpointError, StorageError
from toolkit.storage.atomic import remove_tree
from toolkit.storage.remote import RemoteFolder

log = logging.getLogger(__name__)


class Saved(NamedTuple):
    """What the rule needs to know of one committed checkpoint."""

    step: int
    kind: Kind = "permanent"
    score: float | None = None
    """The result that `keep_best` compares; None where there was no evaluation."""


class Retention(NamedTuple):
    """The rule. A checkpoint stays if any part of it says so; the newest always does."""

    keep_last: int | None = 3
    """Newest permanent ones; None: all of them."""
    keep_every: int | None = None
    """Permanent ones whose step is a multiple."""
    keep_best: int | None = None
    """This many with the best score."""
    best_metric: str = "val/loss"
    best_mode: Literal["min", "max"] = "min"

    def saved(self, metadata: CheckpointMetadata) -> Saved:
        """What the rule needs of a checkpoint."""
        return Saved(metadata.step, metadata.kind, metadata.scores.get(self.best_metric))

    def kept(self, saved: Iterable[Saved]) -> set[int]:
        """Steps that stay."""
        everything = sorted(saved)
        if not everything:
            return set()
        permanent = [one.step for one in everything if one.kind != "ephemeral"]
        steps = {everything[-1].step, *(one.step for one in everything if one.kind == "fixed")}
        steps |= set(permanent if self.keep_last is None else permanent[-self.keep_last :])
        if self.keep_every:
            steps |= {step for step in permanent if step % self.keep_every == 0}
        if self.keep_best:
            sign = 1.0 if self.best_mode == "min" else -1.0
            scored = [(sign * one.score, one.step) for one in everything if one.score is not None]
            steps |= {step for _, step in sorted(scored)[: self.keep_best]}
        return steps


def prune_checkpoints(
    root: Place, rule: Retention, *, newest: int, in_use: Collection[int] = ()
) -> None:
    """Remove what `rule` does not keep of the checkpoints in a folder or at a URL up to step
    `newest`, which was just committed there, and unfinished leftovers; steps that are `in_use` go
    the next time. One rank calls it. What cannot be removed is a warning.

    Damaged ones neither count nor go; those in a folder are set aside. Later steps are not touched:
    nobody knows here whether they are whole.
    """
    try:
        whole: list[Saved] = []
        damaged: set[int] = set()
        for step in saved_steps(root):
            checkpoint = inside(root, f"step{step}")
            if step > newest:
                continue
            try:
                metadata = read_metadata(checkpoint)
                check_files(checkpoint, metadata)
                whole.append(rule.saved(metadata))
            except CheckpointError as error:
                damaged.add(step)
                if isinstance(checkpoint, Path):
                    log.warning("%s; renamed: %s", error, move_aside(checkpoint))
                else:
                    log.warning("%s; it is left as it is", error)
        _remove_others(root, rule.kept(whole) | damaged | set(in_use), newest)
    except (OSError, StorageError) as error:
        log.warning("%s: old checkpoints cannot be removed: %s", root, error)


def _remove_others(root: Path | str, kept: set[int], newest: int) -> None:
    """Remove steps before `newest` that are not `kept`, and unfinished leftovers."""
    if isinstance(root, str):
        remote = RemoteFolder(root)
        for name in remote.folders():
            there = step_of(name)
            if there is not None and there < newest and there not in kept:
                (remote / name).remove(first=METADATA_FILE)
        return
    for path, step in step_folders(root).items():
        if step < newest and step not in kept and (is_committed(path) or not path.is_symlink()):
            _remove(path)
    for leftover in (*root.glob("step*.tmp"), *root.glob(".step*.tmp")):
        _remove(leftover)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        log.info("%s: the link is removed, what it leads to stays", folder)
    try:
        if folder.name.startswith(".") and not folder.is_symlink():
            shutil.rmtree(folder)  # a removal that was cut short: renamed already
        else:
            remove_tree(folder)
    except OSError as error:
        log.warning("%s: old checkpoints cannot be removed: %s", folder.parent, error)

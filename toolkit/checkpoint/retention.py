"""Which checkpoints stay: a pure rule over what is there, and its application to a folder."""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from toolkit.checkpoint.folder import (
    METADATA_FILE,
    CheckpointMetadata,
    Kind,
    check_files,
    move_aside,
    read_metadata,
    saved_steps,
    step_folder,
    step_folders,
)
from toolkit.errors import CheckpointError
from toolkit.storage.atomic import remove_tree

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


def prune_checkpoints(root: Path, rule: Retention, *, newest: int) -> None:
    """Remove what `rule` does not keep of the checkpoints up to step `newest`, which was just
    committed, and unfinished leftovers. What cannot be removed is a warning.

    Damaged ones are set aside: they neither count nor go. Folders of later steps are not touched:
    nobody knows here whether they are whole.
    """
    whole: list[Saved] = []
    try:
        for step in saved_steps(root):
            folder = step_folder(root, step)
            if step <= newest and (saved := _examine(folder, rule)) is not None:
                whole.append(saved)
        kept = rule.kept(whole)
        doomed = [step_folder(root, saved.step) for saved in whole if saved.step not in kept]
        doomed += [
            folder
            for folder, step in step_folders(root).items()
            if step < newest and not (folder / METADATA_FILE).is_file() and not folder.is_symlink()
        ]
        for leftover in (*root.glob("step*.tmp"), *root.glob(".step*.tmp"), *doomed):
            _remove(leftover)
    except OSError as error:
        log.warning("%s: old checkpoints cannot be removed: %s", root, error)


def _examine(folder: Path, rule: Retention) -> Saved | None:
    """What the rule needs of a committed checkpoint; None: it is damaged, and set aside now."""
    try:
        metadata = read_metadata(folder)
        check_files(folder, metadata)
    except CheckpointError as error:
        log.warning("%s; renamed: %s", error, move_aside(folder))
        return None
    return rule.saved(metadata)


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

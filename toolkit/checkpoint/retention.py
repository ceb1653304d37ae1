"""Which checkpoints stay: a pure rule over what is there, and its application to a folder."""

import logging
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from toolkit.checkpoint.layout import (
    INVALID_SUFFIX,
    METADATA_FILE,
    CheckpointMetadata,
    Kind,
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

    def saved(self, step: int, read: Callable[[], CheckpointMetadata]) -> Saved:
        """What the rule needs of checkpoint `step`; one that cannot be read counts by its step."""
        try:
            metadata = read()
        except CheckpointError:
            return Saved(step)
        return Saved(step, metadata.kind, metadata.scores.get(self.best_metric))

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

    Folders of later steps are not touched: nobody knows here whether they are whole.
    """
    try:
        for folder in _superseded(root, rule, newest):
            remove_tree(folder)
        for leftover in (*root.glob("step*.tmp"), *root.glob(".step*.tmp")):
            shutil.rmtree(leftover)
    except OSError as error:
        log.warning("%s: old checkpoints cannot be removed: %s", root, error)


def _superseded(root: Path, rule: Retention, newest: int) -> list[Path]:
    committed = [step for step in saved_steps(root) if step <= newest]
    kept = rule.kept(
        rule.saved(step, partial(read_metadata, step_folder(root, step))) for step in committed
    )
    oldest = min(kept, default=newest)
    return [
        folder
        for folder, step in step_folders(root).items()
        if (step in committed and step not in kept and folder == step_folder(root, step))
        or (step < newest and _is_uncommitted(folder))
        or (step < oldest and folder.name.endswith(INVALID_SUFFIX))
    ]


def _is_uncommitted(folder: Path) -> bool:
    """Left by a crash between the rename and the metadata."""
    return not (folder / METADATA_FILE).is_file() and not folder.name.endswith(INVALID_SUFFIX)

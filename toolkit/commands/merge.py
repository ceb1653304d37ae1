"""`toolkit merge`: the mean of checkpoints."""

from collections.abc import Sequence
from pathlib import Path

from toolkit.checkpoint.folder import kind_of, saved_steps, step_folder
from toolkit.checkpoint.merge import merge_checkpoints
from toolkit.config.paths import local_path
from toolkit.errors import CheckpointError, ConfigError
from toolkit.runs.files import RUN_FILES
from toolkit.runs.listing import find_named


def merge(
    where: str, *, steps: Sequence[int] = (), last: int | None = None, out: str | None = None
) -> Path:
    """The mean of the weights in checkpoints of the run or folder `where`, those of `steps` or the
    `last` ones; the checkpoint it is written to: step{N} in `out`, default: in merged/ of the run.

    Raises ConfigError and CheckpointError: these checkpoints are not there, or cannot be merged.
    """
    folder = local_path(find_named(where), "RUN")
    if kind_of(str(folder)) not in ("run", "checkpoints"):
        raise CheckpointError(f"{where}: give a run folder, or a folder of step{{N}} folders")
    inside = folder / RUN_FILES.checkpoints
    root = inside if inside.is_dir() else folder
    saved = saved_steps(root)
    if bool(steps) == (last is not None):
        raise ConfigError("give --steps or --last: which checkpoints are merged")
    if last is not None and not 0 < last <= len(saved):
        raise ConfigError(f"--last {last}: {root} has {len(saved)} checkpoints")
    chosen = list(steps) if last is None else saved[-last:]
    if missing := sorted(set(chosen) - set(saved)):
        there = ", ".join(map(str, saved)) or "none"
        raise CheckpointError(f"{root}: no checkpoint step{missing[0]}; there are: {there}")
    if len(set(chosen)) < len(chosen):
        raise ConfigError(f"--steps {','.join(map(str, chosen))}: one is there twice")
    target = folder / RUN_FILES.merged if out is None else local_path(out, "--out")
    final = step_folder(target, max(chosen))
    if final.exists():
        raise CheckpointError(f"{final}: exists already; give another folder with --out")
    return merge_checkpoints([step_folder(root, step) for step in chosen], target)

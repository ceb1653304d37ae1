"""How far a run has come, and what to say where it has no checkpoint to go on from. No torch."""

import contextlib
import difflib
from pathlib import Path

import msgspec

from toolkit.checkpoint.folder import kind_of, move_aside, saved_steps, step_folder, step_folders
from toolkit.errors import CheckpointError, RunError
from toolkit.metrics.lines import last_record
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import read_status
from toolkit.storage.atomic import unused_name
from toolkit.storage.foreign import read_json
from toolkit.train.config import TrainerConfig
from toolkit.wording import count


class _Archive(msgspec.Struct):
    """What is asked of metadata/archive.json."""

    left_out: list[str] = []


START_ANEW = "--trainer.start_anew"


def reached_step(folder: Path) -> int:
    """The last step that a run folder tells of: in its status, its metrics, or by the name of a
    checkpoint, whole or not; 0 where nothing was trained yet."""
    status = read_status(folder)
    said = (status.step or 0) if status is not None else 0
    named = step_folders(folder / RUN_FILES.checkpoints).values()
    recorded = last_record(folder / RUN_FILES.train_metrics).get("step", 0)
    return max(said, int(recorded), *named)


def refusal(folder: Path, reached: int, why: str, start: str = "step 0") -> CheckpointError:
    """That the run in `folder` cannot go on, and how to start it anew from `start`."""
    return CheckpointError(
        f"{folder}: it has done {count(reached, 'step')}, and no checkpoint "
        f"of it is whole ({why}); {START_ANEW} starts it again from {start}, and keeps its metrics "
        "and what is left of its checkpoints under other names"
    )


def none_saved(folder: Path, no_checkpoints: bool) -> str:
    """Why there is none, of a run without any folder of a checkpoint."""
    with contextlib.suppress(OSError, RunError):
        if (
            RUN_FILES.checkpoints
            in read_json(folder / RUN_FILES.archive, RunError, _Archive).left_out
        ):
            return (
                "this folder was restored from an archive without checkpoints; go on from the "
                "original run, or from an archive that holds them"
            )
    return "trainer.no_checkpoints is true" if no_checkpoints else "it was never saved"


def nothing_left(config: TrainerConfig, last: int, total: int, reached: int) -> str:
    """That a run at step `reached` is at or past its end, step `last` of `total`, and the flags
    that continue it."""
    flags = ["--trainer.hard_stop=null"] if config.hard_stop is not None else []
    if max(last, reached) >= total:
        longer = 2 * max(total, reached)
        flags.append(f"--trainer.max_duration='{{value: {longer}, unit: steps}}'")
    end = f"it ends at step {last:,}"
    if reached > last:
        end += f" and has done {count(reached, 'step')} already, so no step is trained"
    return f"nothing is left: {end}; to go on, add {' '.join(flags)}"


def no_checkpoint(load_path: str, key: str = "trainer.load_path") -> str:
    """That the path of a config's `key` holds none, why, and what to give in its place."""
    return f"{key} {load_path}: holds no valid checkpoint{_why_nothing(load_path)}"


def _why_nothing(load_path: str) -> str:
    advice = "; give a run folder or a step{N} folder of one"
    path, kind = Path(load_path).expanduser(), kind_of(load_path)
    if kind == "run":
        return f"; see `toolkit verify {path}`"
    if kind != "missing":
        return f", it is a file{advice}" if kind == "file" else advice
    steps = [step_folder(path.parent, step).name for step in saved_steps(path.parent)]
    others = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    near = steps or difflib.get_close_matches(path.name, others)
    return f", there is no such folder{', but ' + ', '.join(near) if near else advice}"


def set_run_aside(folder: Path, attempt: int) -> list[str]:
    """Give what the attempts before `attempt` recorded and saved other names; the new ones.

    metrics/, tb/ and trackers/ become NAME.attempt{K}, each step{N} is renamed as a damaged one is.
    """
    names = []
    for name in (RUN_FILES.metrics, RUN_FILES.tensorboard, RUN_FILES.trackers):
        place = folder / name
        if place.is_dir() and any(place.iterdir()):
            kept = unused_name(f"{name}.attempt{attempt - 1}", lambda n: (folder / n).exists())
            place.rename(folder / kept)
            place.mkdir()
            names.append(kept)
    for step in step_folders(folder / RUN_FILES.checkpoints):
        names.append(f"{RUN_FILES.checkpoints}/{move_aside(step).name}")
    return names

"""Is every checkpoint of a run what was saved? Files against manifests, tensors against files."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from toolkit.checkpoint.folder import (
    INVALID_SUFFIX,
    METADATA_FILE,
    TENSORS_FOLDER,
    CheckpointMetadata,
    check_files,
    is_committed,
    read_metadata,
    saved_steps,
)
from toolkit.commands.runs.named import folder_of
from toolkit.errors import CheckpointError, RunError, ToolkitError
from toolkit.experiment.recorded import config_of, has_config
from toolkit.launch.remote_run import is_at
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import is_run
from toolkit.runs.status import read_status
from toolkit.storage.remote import is_url
from toolkit.train.config import TrainerConfig

UNFINISHED_SUFFIX = ".tmp"

_STEP = re.compile(
    rf"\.?step(\d+)({re.escape(INVALID_SUFFIX)}|{re.escape(UNFINISHED_SUFFIX)})?(\W.*)?\Z"
)


class CheckpointReport(NamedTuple):
    folder: Path
    metadata: CheckpointMetadata | None
    """None where it cannot be read, or there is none."""
    problem: str | None
    """Why it is not whole."""
    is_leftover: bool
    """Set aside or unfinished: no resume looks at it, so it breaks no promise."""

    @property
    def size(self) -> int | None:
        """Bytes of all files, as the manifest says."""
        if self.metadata is None:
            return None
        return sum(entry.size for entry in self.metadata.files.values())


def verify(text: str, *, quick: bool = False) -> list[CheckpointReport]:
    """`verify_checkpoints` of the run called `text`; or of one at a URL, whose files are read where
    they are."""
    if not is_url(text):
        return verify_checkpoints(folder_of(text), quick=quick)
    url, root = text.rstrip("/"), f"{text.rstrip('/')}/{RUN_FILES.checkpoints}"
    if is_committed(url):
        return [_check_stored(url, quick=quick)]
    if not is_at(url):
        raise RunError(f"{url}: neither a run nor a checkpoint of one is there")
    return [_check_stored(f"{root}/step{step}", quick=quick) for step in saved_steps(root)]


def _check_stored(url: str, *, quick: bool) -> CheckpointReport:
    from toolkit.checkpoint.load import shapes_of

    metadata, problem = None, None
    try:
        metadata = read_metadata(url)
        check_files(url, metadata, hashes=not quick)
        shapes_of(url)
    except CheckpointError as error:
        problem = str(error).removeprefix(url).lstrip(":/ ")
    return CheckpointReport(Path(url), metadata, problem, is_leftover=False)


def verify_checkpoints(path: Path, *, quick: bool = False) -> list[CheckpointReport]:
    """Check all checkpoints of the run in `path`, or right in it, oldest first; or `path` itself, a
    step folder. `quick` compares sizes only, not contents. A config that the run cannot be resumed
    with comes first."""
    if is_step_folder(path):
        return [check_checkpoint(path, quick=quick)]
    reports: list[CheckpointReport] = []
    trainer = TrainerConfig()
    if is_run(path) or has_config(path):
        root = path / RUN_FILES.checkpoints
        try:
            trainer = config_of(path).trainer if has_config(path) else trainer
        except ToolkitError as error:
            file = path / RUN_FILES.config
            reports.append(CheckpointReport(file, None, _problem(error, file), is_leftover=False))
    elif saved_steps(path):
        root = path
    else:
        raise RunError(
            f"{path}: neither a run folder nor a step{{N}} folder of one; `toolkit runs` lists runs"
        )
    if not root.is_dir() and (problem := _why_no_folder(path, root, trainer)) is not None:
        return [*reports, CheckpointReport(root, None, problem, is_leftover=False)]
    there = root.iterdir() if root.is_dir() else ()
    steps = {path: int(match[1]) for path in there if (match := _STEP.match(path.name))}
    in_order = sorted(steps, key=lambda path: (steps[path], path.name))
    return reports + [check_checkpoint(path, quick=quick) for path in in_order]


def _why_no_folder(run: Path, root: Path, trainer: TrainerConfig) -> str | None:
    """Why a run should have a folder of checkpoints; None: it saved none."""
    status = read_status(run)
    if status is None or not status.step:
        return None
    if trainer.no_checkpoints or not trainer.callbacks.checkpointer.enabled:
        return None
    why = f"a link to {os.readlink(root)}, which is" if root.is_symlink() else "is"
    return f"{why} not there, and the run is at step {status.step}; restore it"


def _problem(error: Exception, path: Path) -> str:
    """What `error` says, in a line, without the `path` that it is about."""
    lines = str(error).splitlines()
    return "; ".join(line.removeprefix(str(path)).lstrip(":/ ") for line in lines)


def is_step_folder(path: Path) -> bool:
    return path.is_dir() and bool((path / METADATA_FILE).is_file() or _STEP.match(path.name))


def check_checkpoint(folder: Path, *, quick: bool = False) -> CheckpointReport:
    match = _STEP.match(folder.name)
    suffix = match[2] if match else None
    if suffix == UNFINISHED_SUFFIX or folder.name.startswith("."):
        why = "unfinished: being written, or left by a crash"
        return CheckpointReport(folder, None, why, is_leftover=True)
    if folder.is_symlink() and not folder.exists():
        why = f"a link to {os.readlink(folder)}, which is not there"
        return CheckpointReport(folder, None, why, is_leftover=suffix is not None)
    if suffix is None and not os.path.lexists(folder / METADATA_FILE):
        why = f"unfinished: a crash came between its files and its {METADATA_FILE}"
        return CheckpointReport(folder, None, why, is_leftover=True)
    metadata: CheckpointMetadata | None = None
    problem: str | None = None
    try:
        metadata = read_metadata(folder)
        if match and metadata.step != int(match[1]):
            problem = f"{METADATA_FILE} says step {metadata.step}"
        check_files(folder, metadata, hashes=not quick)
        from toolkit.checkpoint.tensors import stored_shapes

        stored_shapes(folder / TENSORS_FOLDER)
    except (CheckpointError, OSError) as error:
        problem = _problem(error, folder)
    if suffix == INVALID_SUFFIX:
        problem = f"set aside: {problem or 'no damage found now'}"
    return CheckpointReport(folder, metadata, problem, is_leftover=suffix is not None)

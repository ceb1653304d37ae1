"""What to say where `trainer.load_path` must hold a checkpoint and does not; no torch here."""

import difflib
from pathlib import Path

from toolkit.checkpoint.layout import saved_steps, step_folder
from toolkit.runs.files import RUN_FILES
from toolkit.storage.remote import is_url

_ADVICE = "give a run folder or a step{N} folder of one"


def no_checkpoint(load_path: str) -> str:
    """Why it holds none, and what to give in its place."""
    return f"trainer.load_path {load_path}: {_why_nothing(load_path)}"


def _why_nothing(load_path: str) -> str:
    if is_url(load_path):
        return f"holds no valid checkpoint; {_ADVICE}"
    path = Path(load_path).expanduser()
    if path.is_dir():
        if (path / RUN_FILES.status).is_file():
            return "this run has no whole checkpoint; `toolkit verify` lists what there is"
        return f"holds no valid checkpoint; {_ADVICE}"
    if path.exists():
        return f"is a file; {_ADVICE}"
    steps = [step_folder(path.parent, step).name for step in saved_steps(path.parent)]
    others = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    near = steps or difflib.get_close_matches(path.name, others)
    return f"no such folder; there is {', '.join(near)}" if near else f"no such folder; {_ADVICE}"

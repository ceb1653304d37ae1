"""What to say where `trainer.load_path` must hold a checkpoint and does not; no torch here."""

import difflib
from pathlib import Path

from toolkit.checkpoint.folder import saved_steps, step_folder
from toolkit.runs.files import RUN_FILES
from toolkit.storage.remote import is_url


def no_checkpoint(load_path: str) -> str:
    """Why it holds none, and what to give in its place."""
    return f"trainer.load_path {load_path}: holds no valid checkpoint{_why_nothing(load_path)}"


def _why_nothing(load_path: str) -> str:
    advice = "; give a run folder or a step{N} folder of one"
    if is_url(load_path):
        return advice
    path = Path(load_path).expanduser()
    if path.is_dir():
        is_run = (path / RUN_FILES.status).is_file()
        return f"; see `toolkit verify {path}`" if is_run else advice
    if path.exists():
        return f", it is a file{advice}"
    steps = [step_folder(path.parent, step).name for step in saved_steps(path.parent)]
    others = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    near = steps or difflib.get_close_matches(path.name, others)
    return f", there is no such folder{', but ' + ', '.join(near) if near else advice}"

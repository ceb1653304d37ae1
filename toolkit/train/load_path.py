"""What to say where `trainer.load_path` must hold a checkpoint and does not; no torch here."""

import difflib
from pathlib import Path

from toolkit.checkpoint.folder import kind_of, saved_steps, step_folder


def no_checkpoint(load_path: str) -> str:
    """Why it holds none, and what to give in its place."""
    return f"trainer.load_path {load_path}: holds no valid checkpoint{_why_nothing(load_path)}"


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

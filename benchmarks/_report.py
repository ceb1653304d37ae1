"""Figures of a benchmark as JSON, which `compare.py` reads."""

import json
from pathlib import Path
from typing import Literal, TypedDict


class Figure(TypedDict):
    """One number that a benchmark prints."""

    name: str
    value: float
    unit: str
    better: Literal["lower", "higher"]


def write_json(path: Path | str | None, figures: list[Figure]) -> None:
    """Write `figures` to `path`; nothing where it is None (the option `--json` was not given)."""
    if path is not None:
        Path(path).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

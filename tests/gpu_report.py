"""What `tests/gpu_check.py` has found: a table, and the same as JSON."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from tests.gpu_machine import Machine

GRACE = 90.0
"""Seconds for the part that runs when the time is over."""
FIGURES: dict[str, float] = {}
"""What was measured, by name."""


class Line(NamedTuple):
    """One line of the table."""

    state: str
    """ok, FAIL, or - where the part says nothing about this machine."""
    name: str
    seconds: float
    detail: str

    def __str__(self) -> str:
        return f"{self.state:4}  {self.name:34}{self.seconds:7.1f} s  {self.detail}"


class Report:
    """The lines so far, as a table and as JSON."""

    def __init__(self, machine: Machine, path: str | None) -> None:
        self.lines: list[Line] = []
        self.running = ""
        where = torch.cuda.get_device_name() if machine.is_gpu else "CPU"
        self._where = f"{where}, torch {torch.__version__}, {machine.precision}"
        self._path = path

    def end(self) -> int:
        """Print the table, keep the JSON; 1 if a part failed."""
        print(f"\n{self._where}")
        print("\n".join(map(str, self.lines)))
        failed = sum(line.state == "FAIL" for line in self.lines)
        number = len(self.lines)
        print(f"{failed} of {number} checks failed" if failed else "all checks passed", flush=True)
        if self._path is not None:
            parts = [line._asdict() for line in self.lines]
            found = {"where": self._where, "figures": FIGURES, "parts": parts}
            Path(self._path).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return 1 if failed else 0

    def give_up(self) -> None:
        """End the process with what is known, while a part hangs."""
        self.lines.append(Line("FAIL", self.running, GRACE, "did not end; the rest was not run"))
        self.end()
        os._exit(1)

"""Figures of an older revision beside those of this working tree, in turns.

    python benchmarks/compare.py --base main
    make bench-compare BASE=main

The older revision is checked out into a temporary folder. A turn runs one program twice, once with
the `toolkit` of each tree, in the same environment; the next turn begins with the other tree. Both
are measured by this tree's program. Where it does not run with the older `toolkit`, that revision's
own program measures it, and the table says so.

A ratio above 1 means that this tree is better. Each is the median over the turns, so other load on
the machine has to last through most of them to be seen. Exit code 1: `--worse` was given, and a
figure is worse by more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _report import Figure
from rich.console import Console
from rich.table import Table

TREE = Path(__file__).resolve().parents[1]

PROGRAMS: dict[str, tuple[str, ...]] = {
    "step_speed": ("--only", "toolkit", "--rounds", "2", "--steps", "3"),
    "loop_overhead": ("--only", "bare,toolkit", "--rounds", "3"),
    "first_step": ("--rounds", "2", "--only", "toolkit"),
    "cli_startup": ("--repeats", "5"),
    "prepare": ("--only", "toolkit", "--megabytes", "25", "--repeats", "1"),
    "loader": ("--only", "kinds", "--tokens", "20e6"),
    "checkpoint_speed": ("--only", "compare", "--rounds", "3"),
}
"""Program -> arguments that make it short."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", required=True, help="revision of git to compare with")
    parser.add_argument("--only", help=f"comma-separated programs, of {', '.join(PROGRAMS)}")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--worse", type=float, help="allowed loss of any figure, e.g. 0.1")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(PROGRAMS)
    if unknown := [name for name in names if name not in PROGRAMS]:
        parser.error(f"no such program: {', '.join(unknown)}; there are {', '.join(PROGRAMS)}")
    with checked_out(arguments.base) as base, tempfile.TemporaryDirectory() as scratch:
        rows = [
            row for name in names for row in compare(name, base, arguments.turns, Path(scratch))
        ]
    table = Table(title=f"{arguments.base} against this tree, medians of {arguments.turns} turns")
    for column in ("", arguments.base, "here", "unit", "ratio"):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    for name, old, new, unit, ratio in rows:
        style = "" if 0.95 <= ratio <= 1.05 else "green" if ratio > 1 else "red"
        table.add_row(name, f"{old:,.4g}", f"{new:,.4g}", unit, f"{ratio:.2f}x", style=style)
    Console().print(table)
    worst = min((row[-1] for row in rows), default=1.0)
    if arguments.worse is not None and worst < 1 - arguments.worse:
        sys.exit(1)


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A temporary folder with the files of `revision`."""
    git = ("git", "-C", str(TREE), "worktree")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "base"
        added = subprocess.run(
            [*git, "add", "--quiet", "--detach", str(folder), revision],
            capture_output=True,
            text=True,
        )
        if added.returncode:
            raise SystemExit(f"git cannot check out {revision}: {added.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=False)


def compare(
    name: str, base: Path, turns: int, scratch: Path
) -> list[tuple[str, float, float, str, float]]:
    """Figure, value of `base`, value here, unit, and how many times better it is here."""
    old: dict[str, list[Figure]] = {}
    new: dict[str, list[Figure]] = {}
    program, note = TREE, ""
    for turn in range(turns):
        for tree in (base, TREE) if turn % 2 == 0 else (TREE, base):
            figures = run(name, program if tree == base else TREE, tree, scratch)
            if figures is None and tree == base and program == TREE:
                program, note = base, ", by its own program"
                figures = run(name, program, tree, scratch)
            if figures is None:
                whose = "of the older revision" if tree == base else "of this tree"
                print(f"{name}: does not run with the toolkit {whose}; left out", file=sys.stderr)
                return []
            for figure in figures:
                (old if tree == base else new).setdefault(figure["name"], []).append(figure)
    rows = []
    for figure_name in (figure for figure in new if figure in old):
        pairs = zip(old[figure_name], new[figure_name], strict=True)
        is_time = new[figure_name][0]["better"] == "lower"
        ratios = [a["value"] / b["value"] if is_time else b["value"] / a["value"] for a, b in pairs]
        values = (
            statistics.median(figure["value"] for figure in side[figure_name])
            for side in (old, new)
        )
        unit = new[figure_name][0]["unit"]
        rows.append((f"{name}: {figure_name}{note}", *values, unit, statistics.median(ratios)))
    return rows


def run(name: str, program: Path, tree: Path, scratch: Path) -> list[Figure] | None:
    """The figures of a program of `program` that imports the `toolkit` of `tree`; None: it failed,
    and its last words are printed."""
    out = scratch / "figures.json"
    out.unlink(missing_ok=True)
    file = program / "benchmarks" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(file), *PROGRAMS[name], "--json", str(out)],
        env={**os.environ, "PYTHONPATH": str(tree)},
        cwd=scratch,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0 and out.exists():
        return json.loads(out.read_text(encoding="utf-8"))
    print(f"{name} with {tree}: {done.stderr.strip()[-400:]}", file=sys.stderr)
    return None


if __name__ == "__main__":
    main()

"""Seconds that the command line takes before any work, as whole processes.

    python benchmarks/cli_startup.py

The first run of each command, which may have to read files from disk, is not counted.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import Figure, write_json
from rich.console import Console
from rich.table import Table

COMMANDS = ("--help", "recipes", "train --help", "train quickstart --dry-run")
NOTHING = "python -c pass"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    beside = Path(sys.executable).with_name("toolkit")
    script = str(beside) if beside.exists() else shutil.which("toolkit")
    if script is None:
        raise SystemExit("no `toolkit` command; install the package first: pip install -e .")
    commands = {NOTHING: [sys.executable, "-c", "pass"]}
    commands |= {f"toolkit {line}": [script, *line.split()] for line in COMMANDS}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(repeats + 1):
            for name, command in commands.items():
                started = time.perf_counter()
                subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
                if turn:
                    seconds[name].append(time.perf_counter() - started)
        assert not list(Path(folder).iterdir()), "a dry run wrote something"
    table = Table(title=f"{repeats} turns")
    for column in ("", "seconds (median)", "best", "worst"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, times in seconds.items():
        table.add_row(
            name, *(f"{value:.3f}" for value in (statistics.median(times), min(times), max(times)))
        )
    Console().print(table)
    figures: list[Figure] = [
        {"name": name, "value": statistics.median(times), "unit": "s", "better": "lower"}
        for name, times in seconds.items()
    ]
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()

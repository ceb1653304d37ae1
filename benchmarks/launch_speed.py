"""Seconds from a command to the first step of a run of two processes, by launcher.

    python benchmarks/launch_speed.py

Launchers take turns. The first turn, which prepares data and reads files from disk, is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import Figure, write_json
from rich.console import Console
from rich.table import Table

BIN = Path(sys.executable).parent
TRAIN = ("train", "smoke", "--trainer.hard_stop={value: 1, unit: steps}", "--trainer.no_evals")
LAUNCHERS = {
    "torchrun": ("torchrun", "--nproc-per-node=2", "-m", "toolkit", *TRAIN),
    "toolkit train --processes": ("toolkit", *TRAIN, "--processes", "2"),
    "accelerate launch": (
        *("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "toolkit", *TRAIN),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    seconds: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            for name, command in LAUNCHERS.items():
                took = first_step(command, Path(folder), f"{name.split()[0]}{turn}")
                if turn:
                    seconds[name].append(took)
    table = Table(title=f"seconds to the first step, {rounds} turns")
    for column in ("", "median", "best", "worst", "x torchrun"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    base = seconds["torchrun"]
    for name, times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        values = (statistics.median(times), min(times), max(times))
        table.add_row(name, *(f"{value:.2f}" for value in values), f"{ratio:.2f}")
    Console().print(table)
    figures: list[Figure] = [
        {"name": name, "value": statistics.median(times), "unit": "s", "better": "lower"}
        for name, times in seconds.items()
    ]
    write_json(arguments.json, figures)


def first_step(command: tuple[str, ...], folder: Path, name: str) -> float:
    run = folder / name
    started = time.time()
    subprocess.run(
        [BIN / command[0], *command[1:], "--save-folder", run],
        cwd=folder,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "TOOLKIT_NUM_THREADS": "1", "TOOLKIT_MEASURE": "0"},
        check=True,
        capture_output=True,
    )
    line = (run / "metrics" / "train.jsonl").read_text().splitlines()[0]
    return float(json.loads(line)["time"]) - started


if __name__ == "__main__":
    main()

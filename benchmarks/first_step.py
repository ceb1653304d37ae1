"""Seconds from a command to the end of the first step of `toolkit train quickstart`.

    python benchmarks/first_step.py

The data is prepared before. Each is a whole process with the recipe as it is, its evaluation before
the first step included; "compiled" has `train_module.compile_model`. Variants take turns, and the
first turn, which reads files from disk, is not counted.

- toolkit train: one process.
- accelerate launch: the same under Accelerate's launcher.
- compiled, cold: with an empty folder for torch's compiled code.
- compiled, warm: with the folder that the cold one has filled.

After them come the parts of a start, by a process that notes when it comes where.
"""

import argparse
import itertools
import json
import os
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

BIN = Path(sys.executable).parent
TRAIN = (
    *("train", "quickstart", "--trainer.hard_stop={value: 1, unit: steps}"),
    *("--trainer.callbacks.lm_evaluator.at_end=false", "--trainer.no_checkpoints=true"),
    *("--trainer.callbacks.sample_writer.enabled=false", "--train_module.precision=fp32"),
)
COMPILED = "--train_module.compile_model=true"
ACCELERATE = (
    *("accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "toolkit"),
)
VARIANTS = {
    "toolkit train": ("toolkit", *TRAIN),
    "accelerate launch": (*ACCELERATE, *TRAIN),
    "compiled, cold": ("toolkit", *TRAIN, COMPILED),
    "compiled, warm": ("toolkit", *TRAIN, COMPILED),
}
PARTS = {
    "python": "Python",
    "toolkit.cli.main": "command line",
    "before torch": "config, checks, data",
    "torch": "import torch",
    "toolkit.experiment.training": "other imports",
    "__init__": "run folder, model, engine",
    "_loop": "metrics, evaluation before the first step",
    "_train_step": "first batch",
    "first step": "first step",
}
"""Places of `_first_step_worker.py` in the order they come, and what lies before each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="comma-separated beginnings of variants' names, `parts`")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    wanted = tuple(arguments.only.split(",")) if arguments.only else ("",)
    seconds: dict[str, list[float]] = {n: [] for n in VARIANTS if n.startswith(wanted)}
    parts: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [BIN / "toolkit", "prepare", "quickstart"], cwd=folder, check=True, capture_output=True
        )
        for turn in range(arguments.rounds + 1):
            for variant in seconds:
                took = first_step(variant, folder)
                if turn:
                    seconds[variant].append(took)
            if "parts".startswith(wanted):
                found = parts_of_start(folder)
                if turn:
                    parts.append(found)
    report(seconds, parts, arguments.rounds)
    figures: list[Figure] = [
        {"name": name, "value": statistics.median(times), "unit": "s", "better": "lower"}
        for name, times in seconds.items()
    ]
    write_json(arguments.json, figures)


def first_step(variant: str, folder: Path) -> float:
    """Seconds of one start of a variant, by the time that the first record carries."""
    started = time.time()
    run(folder, variant, [str(BIN / VARIANTS[variant][0]), *VARIANTS[variant][1:]])
    lines = (folder / "run" / "metrics" / "train.jsonl").read_text().splitlines()
    return float(json.loads(lines[0])["time"]) - started


def parts_of_start(folder: Path) -> dict[str, float]:
    """Part -> its seconds in one start."""
    places, worker = folder / "places.json", Path(__file__).with_name("_first_step_worker.py")
    started = time.time()
    run(folder, "parts", [sys.executable, str(worker), str(places), *TRAIN])
    found = json.loads(places.read_text())
    times = [started, *(found[place] for place in PARTS)]
    spans = (after - before for before, after in itertools.pairwise(times))
    return dict(zip(PARTS.values(), spans, strict=True))


def run(folder: Path, variant: str, command: list[str]) -> None:
    shutil.rmtree(folder / "run", ignore_errors=True)
    cache = folder / "compiled"
    if variant.endswith("cold"):
        shutil.rmtree(cache, ignore_errors=True)
    subprocess.run(
        [*command, "--save-folder", str(folder / "run")],
        cwd=folder,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)},
        check=True,
        capture_output=True,
    )


def report(seconds: dict[str, list[float]], parts: list[dict[str, float]], rounds: int) -> None:
    console = Console(width=100)
    if seconds:
        table = Table(title=f"seconds to the end of the first step, {rounds} turns")
        for column in ("", "median", "best", "worst"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for name, times in seconds.items():
            values = (statistics.median(times), min(times), max(times))
            table.add_row(name, *(f"{value:.2f}" for value in values))
        console.print(table)
    if parts:
        table = Table("part", "seconds (median)", title="toolkit train, by parts")
        for name in PARTS.values():
            table.add_row(name, f"{statistics.median(turn[name] for turn in parts):.2f}")
        console.print(table)


if __name__ == "__main__":
    main()

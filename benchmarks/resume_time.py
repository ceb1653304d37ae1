"""Does resuming take longer the further a run had got?

    python benchmarks/resume_time.py

Measured is what looks at the past: repairing the metrics files, which grow with the steps (their
earlier lines are on the disk, as a checkpoint leaves them), and the first batch after the
checkpoint, on a sparse corpus of 1e10 tokens. Loading the state itself does not depend on the step
(see checkpoint_speed.py).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from _report import Figure, write_json
from _synthetic import write_corpus
from rich.console import Console
from rich.table import Table

from toolkit.data.config import DataConfig, DataLoaderConfig, DatasetConfig
from toolkit.data.loader import TrainLoader, get_dataloaders
from toolkit.metrics.streams import STREAMS, MetricStreams

NUM_TOKENS = 10_000_000_000
LOST_STEPS = 50
"""Recorded after the checkpoint, so they are cut off."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 10_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    figures: list[Figure] = []
    table = Table(title=f"resuming, median of {arguments.rounds}")
    for column in ("checkpoint at step", "train.jsonl (MB)", "metrics (ms)", "first batch (ms)"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as root:
        loader = open_loader(Path(root))
        for step in arguments.steps:
            rounds = [measure(loader, step) for _ in range(arguments.rounds)]
            size, metrics, batch = (
                statistics.median(column) for column in zip(*rounds, strict=True)
            )
            for what, seconds in (("metrics files", metrics), ("first batch", batch)):
                name = f"resume after {step} steps: {what}"
                figures.append(
                    {"name": name, "value": 1e3 * seconds, "unit": "ms", "better": "lower"}
                )
            table.add_row(
                f"{step:,}", f"{size / 1e6:.1f}", f"{1e3 * metrics:.1f}", f"{1e3 * batch:.1f}"
            )
    Console().print(table)
    write_json(arguments.json, figures)


def open_loader(root: Path) -> TrainLoader:
    write_corpus(root / "corpus" / "default", NUM_TOKENS, is_sparse=True)
    config = DataConfig(
        dataset=DatasetConfig(root=str(root)),
        data_loader=DataLoaderConfig(global_batch_size=4096),
    )
    return get_dataloaders(config)[0]


def measure(loader: TrainLoader, step: int) -> tuple[int, float, float]:
    """(bytes of train.jsonl, seconds for the metrics files, seconds for the batch after `step`)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics"
        path.mkdir()
        record = {"tokens": 0, "loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "time": 1e9, "ppl": 12.0}
        text = json.dumps(record)[1:]
        for stream in STREAMS:
            with (path / f"{stream}.jsonl").open("w") as file:
                lines = (f'{{"step": {n}, {text}\n' for n in range(1, step + LOST_STEPS))
                file.writelines(lines)
        size = (path / "train.jsonl").stat().st_size
        os.sync()
        started = time.perf_counter()
        MetricStreams(Path(folder), resume_step=step, tensorboard=()).close()
        repaired = time.perf_counter()
        batches = loader.iterate(step)
        next(batches)
        done = time.perf_counter()
        batches.close()
    return size, repaired - started, done - repaired


if __name__ == "__main__":
    main()

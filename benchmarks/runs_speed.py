"""Seconds of `toolkit runs` over many runs, and of `compare` over 20, as whole processes.

    python benchmarks/runs_speed.py
    python benchmarks/runs_speed.py --runs 1000 --steps 10000 --json figures.json

Run folders are written without training. The first run of each command is not counted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _report import Figure, write_json

from toolkit.metrics.history import read_history
from toolkit.runs.files import RUN_FILES
from toolkit.runs.listing import reindex
from toolkit.runs.status import RunStatus
from toolkit.storage.atomic import encode_json

_LONG = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10_000, help="of the 20 compared runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "runs"
        config = _config()
        compared = [f"run{number:04}" for number in range(20)]
        for number in range(options.runs):
            steps = options.steps if number < 20 else 300
            make(root / "exp" / f"run{number:04}", steps, config, number)
        reindex(root)
        print(f"{options.runs} runs; {len(compared)} of {options.steps:,} steps are compared")
        commands = {
            "runs": ["runs"],
            "runs --check": ["runs", "list", "--check"],
            "runs compare (20)": ["runs", "compare", *compared],
            "runs show": ["runs", "show", "run0000"],
        }
        for name, words in commands.items():
            seconds = timed(words, Path(place), options.repeats)
            print(f"{name:20} {statistics.median(seconds):.3f} s (best {min(seconds):.3f})")
            figures.append(_figure(name, statistics.median(seconds)))
        long = root / "exp" / "long"
        make(long, _LONG, config, 0)
        seconds = []
        for _ in range(options.repeats):
            started = time.perf_counter()
            read_history(long)
            seconds.append(time.perf_counter() - started)
        name = f"read_history ({_LONG:,} steps)"
        print(f"{name:20} {statistics.median(seconds):.3f} s (best {min(seconds):.3f})")
        figures.append(_figure(name, statistics.median(seconds)))
    write_json(options.json, figures)


def timed(words: list[str], folder: Path, repeats: int) -> list[float]:
    seconds = []
    for turn in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "toolkit", *words],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        if turn:
            seconds.append(time.perf_counter() - started)
    return seconds


def make(folder: Path, steps: int, config: bytes, seed: int) -> None:
    """A finished run folder as training leaves it, without checkpoints."""
    for name in (RUN_FILES.metadata, RUN_FILES.metrics, RUN_FILES.checkpoints):
        (folder / name).mkdir(parents=True)
    (folder / RUN_FILES.config).write_bytes(config)
    when = "2026-01-01T00:00:00Z"
    status = RunStatus(
        state="finished", experiment=folder.parent.name, name=folder.name, attempt=1, step=steps,
        tokens=steps * 1024, created=when, started=when, updated=when, host="node", pid=1,
        world_size=1, engine="single", parameters=41_120,
    )  # fmt: skip
    (folder / RUN_FILES.status).write_bytes(encode_json(status))
    with (folder / RUN_FILES.train_metrics).open("w") as file:
        for step in range(1, steps + 1):
            line = {
                "step": step, "tokens": step * 1024, "epoch": step / 467, "time": 1.79e9 + step / 7,
                "attempt": 1, "loss": 2.0 + 3.0 / step + seed * 1e-6, "ppl": 20.08553692318767,
                "lr": 0.001389045440608296, "grad_norm": 0.7720186114311218,
                "tokens_per_second": 16540.430926375946, "data_loading_pct": 0.010610757098757858,
                "peak_memory_gb": 0.408645632, "skipped": 0,
            }  # fmt: skip
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
    with (folder / RUN_FILES.eval_metrics).open("w") as file:
        for number in range(1, 51):
            step = max(1, steps * number // 50)
            line = {"step": step, "tokens": step * 1024, "name": "val", "loss": 2 + 3 / step}
            file.write(json.dumps(line) + "\n")


def _config() -> bytes:
    """The config that `toolkit train quickstart` keeps."""
    command = [sys.executable, "-m", "toolkit", "train", "quickstart", "--dry-run", "--json"]
    return subprocess.run(command, check=True, capture_output=True).stdout


def _figure(name: str, seconds: float) -> Figure:
    return {"name": name, "value": seconds, "unit": "s", "better": "lower"}


if __name__ == "__main__":
    main()

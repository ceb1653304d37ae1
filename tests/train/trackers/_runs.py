"""A run folder that is written without training."""

import json
import time
from pathlib import Path
from typing import Any

from toolkit.metrics.streams import MetricStreams
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.runs.registry import start_run
from toolkit.train.trackers import process

BLOCK = 5
EVAL_EVERY = 4
COMET = """
import json, os, time
def note(*words):
    with open(os.environ["FAKE_CALLS"], "a") as file:
        file.write(json.dumps(words) + "\\n")
mode = os.environ.get("FAKE_MODE", "")
ExperimentConfig = dict
class Run:
    url = "https://fake"
    def __init__(self, key): self.key = key
    def get_key(self): return self.key
    def log_parameters(self, values):
        print("noise")
        note("config", values["seed"])
    def log_other(self, *words): note(*words)
    def log_metrics(self, values, step):
        note("row", step, values.get("train/loss"))
        if mode == "hang": time.sleep(1000)
    def log_text(self, text, step): note("text", step, text)
    def flush(self): pass
    def end(self): note("end")
def start(experiment_key, **options):
    note("start", experiment_key)
    if mode == "down": raise ConnectionError("refused")
    if mode == "exit": os._exit(3)
    return Run(experiment_key)
"""
"""A fake of Comet's library, which writes its calls to the file $FAKE_CALLS."""


def keep_priority() -> None:
    """Senders of this process run like it: other tests may take all processors."""
    if "os.nice" not in process._START:
        process._START = f"import os; os.nice = lambda by: 0; {process._START}"


def open_run(folder: Path, *, resume: bool = False) -> RunManager:
    run = start_run("exp", "first", save_folder=folder, resume=resume, root=folder.parent.parent)
    run.wait()
    run.log_metadata({"seed": 3, "model": {"d_model": 8}}, RUN_FILES.config)
    return run


def write_steps(streams: MetricStreams, first: int, last: int, offset: float = 0.0) -> None:
    """Steps as training writes them: in blocks, evaluations with the block after their step."""
    evals: list[dict[str, Any]] = []
    for begin in range(first, last + 1, BLOCK):
        steps = range(begin, min(begin + BLOCK, last + 1))
        now = time.time()
        streams.write("eval", evals)
        streams.write("network", [{"step": s, "time": now, "grad_norm/total": 1.0} for s in steps])
        values = [{"step": s, "time": now, "tokens": 8 * s, "loss": offset + s} for s in steps]
        streams.write("train", values)
        streams.write("system", [{"step": steps[-1], "time": now, "cpu_pct": 50.0}])
        evals = [
            {"step": s, "time": now, "name": "val", "loss": offset + s, "tokens": 8 * s}
            for s in steps
            if s % EVAL_EVERY == 0
        ]
    streams.write("eval", evals)


def noted(calls: Path, word: str) -> list[Any]:
    """The calls of the fake that begin with `word`."""
    return [call for call in map(json.loads, calls.read_text().splitlines()) if call[0] == word]

"""A run folder that is written without training."""

import time
from pathlib import Path
from typing import Any

from toolkit.metrics.streams import MetricStreams
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.runs.registry import start_run

BLOCK = 5
EVAL_EVERY = 4


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

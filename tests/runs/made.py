"""Run folders without training."""

import json
from pathlib import Path
from typing import Any

from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import start_run


def make_run(
    root: Path,
    name: str,
    *,
    losses: list[float | str] | None = None,
    val: dict[int, float] | None = None,
    config: dict[str, Any] | None = None,
    experiment: str = "exp",
    end: str | None = "finished",
    attempts: int = 1,
) -> Path:
    """A run of as many steps as `losses`, whose attempts share them; its folder."""
    losses = losses or []
    for attempt in range(1, attempts + 1):
        run = start_run(experiment, name, root=root, resume=attempt > 1)
        mine = range(attempt, len(losses) + 1, attempts)
        if attempts > 1:
            size = len(losses) // attempts
            mine = range((attempt - 1) * size + 1, attempt * size + 1)
        run.log_metadata(config or {"run": {"name": name}, "seed": 0}, RUN_FILES.config)
        lines = [
            {
                "step": step,
                "tokens": step * 100,
                "time": 1.7e9 + step,
                "attempt": attempt,
                "loss": losses[step - 1],
                "tokens_per_second": 1000.0 + step,
            }
            for step in mine
        ]
        with run.path(RUN_FILES.train_metrics).open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        evals = [{"step": s, "name": "val", "loss": v} for s, v in (val or {}).items()]
        if attempt == attempts:
            with run.path(RUN_FILES.eval_metrics).open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in evals)
        last = end if attempt == attempts else "stopped"
        if last is None:
            run.wait()
            continue
        run.close(last, step=mine[-1] if mine else None, exit_reason="SIGINT")
    return run.folder

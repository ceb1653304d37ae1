"""`toolkit train` and `toolkit resume`: what is missing is prepared, then the experiment runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from toolkit.commands.prepared import OF_A_RUN, PREPARED
from toolkit.experiment import run
from toolkit.experiment.config import ExperimentConfig


def train(
    config: ExperimentConfig,
    *,
    origins: Mapping[str, str] | None = None,
    stored: ExperimentConfig | None = None,
) -> int:
    """`experiment.run.train`, with data prepared where it is missing; returns the exit code."""
    return run.train(config, origins=origins, stored=stored, data=PREPARED)


def resume(run_dir: Path, overrides: Sequence[str] = (), *, debug: bool = False) -> int:
    """`experiment.run.resume`, with data prepared where it is missing; returns the exit code."""
    return run.resume(run_dir, overrides, debug=debug, data=OF_A_RUN)

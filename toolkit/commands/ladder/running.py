"""The runs of a ladder, one after the other, each in processes of its own."""

import contextlib
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from toolkit import signals
from toolkit.commands.ladder.rungs import Rung
from toolkit.distributed.layout import Layout
from toolkit.distributed.ranks import ENGINE
from toolkit.errors import EXIT_DONE, ConfigError, RunError
from toolkit.experiment.checks import layout_for
from toolkit.launch.workers import Workers, launcher_seconds, toolkit_command
from toolkit.runs.progress import read_progress
from toolkit.runs.status import read_status
from toolkit.storage.atomic import write_atomic

CONFIGS = "configs"
"""Folder of the runs' configs, beside the runs."""
VALIDATION = "val"
"""Name of the evaluation on held-out documents."""

Start = Callable[[Rung, Path, Path], int]
"""Trains a rung, of the config file and into the run folder given; returns an exit code."""


class Finished(NamedTuple):
    """A run that is done."""

    rung: Rung
    loss: float
    """On held-out documents, after its last step."""


def write_configs(rungs: Sequence[Rung], out: Path) -> list[Path]:
    """The config of each run as a file in `out`. Raises ConfigError: there is another one of its
    name already, which the runs there were made with."""
    paths = [out / CONFIGS / f"{rung.name}.json" for rung in rungs]
    for rung, path in zip(rungs, paths, strict=True):
        content = rung.config.to_json()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content)
        elif path.read_bytes() != content:
            raise ConfigError(
                f"{path}: made from another config, or with other flags; give another --out, or "
                "the config and flags that it was made with"
            )
    return paths


def train_rungs(
    rungs: Sequence[Rung], out: Path, start: Start, *, notify: Callable[[str], None]
) -> int:
    """Train those of `rungs` that are not done yet, in order; the exit code of the first that did
    not end well, or 0. A run that was stopped goes on from its checkpoint."""
    paths = write_configs(rungs, out)
    for number, (rung, path) in enumerate(zip(rungs, paths, strict=True), 1):
        place, folder = f"[{number}/{len(rungs)}] {rung.name}", out / rung.name
        if (loss := final_loss(rung, folder)) is not None:
            notify(f"{place}: done, val loss {loss:.4f}")
            continue
        notify(f"{place}: {rung.steps:,} steps, {rung.tokens:,} tokens")
        code = start(rung, path, folder)
        if code != EXIT_DONE:
            return code
        if (loss := final_loss(rung, folder)) is None:
            raise RunError(f"{folder}: ended without a loss on held-out documents; see its logs/")
        notify(f"{place}: val loss {loss:.4f}")
    return EXIT_DONE


def layout_of_runs(rungs: Sequence[Rung], processes: int | None, engine: str | None) -> Layout:
    """That each run will have by `start_training`. Raises ConfigError: none is possible."""
    environ = dict(os.environ)
    if processes is not None:
        environ |= {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}"}
    if engine is not None:
        environ[ENGINE] = engine
    return layout_for(rungs[0].config, environ)


def start_training(*options: str) -> Start:
    """Trains by `toolkit train`, with further `options`, in a process of its own. Requests to stop
    are passed on to it."""

    def start(rung: Rung, config: Path, folder: Path) -> int:
        words = ["train", str(config), "--save-folder", str(folder), *options]
        with contextlib.ExitStack() as stack:
            with signals.holding_back():
                workers = Workers(toolkit_command(words), [os.environ])
                stack.enter_context(signals.listening(workers))
            failed = workers.wait(launcher_seconds(os.environ))
        if failed is None or failed.code is None:
            return EXIT_DONE
        if failed.code < 0:
            name = signal.Signals(-failed.code).name
            raise RunError(f"{rung.name}: {name} ended it; the same command goes on")
        return failed.code

    return start


def finished_runs(rungs: Sequence[Rung], out: Path) -> Iterator[Finished]:
    """Those of `rungs` that are done."""
    for rung in rungs:
        if (loss := final_loss(rung, out / rung.name)) is not None:
            yield Finished(rung, loss)


def final_loss(rung: Rung, folder: Path) -> float | None:
    """The validation loss after the last step; None: the run is not done."""
    status = read_status(folder)
    if status is None or status.state != "finished":
        return None
    found = read_progress(folder)
    is_last = found.val_name == VALIDATION and found.val_step == rung.steps
    return found.val_loss if is_last and math.isfinite(found.val_loss or math.nan) else None

"""Which config and which processes continue a run. No torch at import: `toolkit resume --explain`
asks too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from toolkit.checkpoint.folder import saved_steps, step_folder, step_of
from toolkit.distributed.config import PARALLEL_FIELDS, DataParallelConfig
from toolkit.distributed.launcher import (
    has_launcher,
    launcher_axes,
    launcher_names_engine,
    launcher_precision,
    offloads,
    world_size_of,
)
from toolkit.distributed.precision import Precision
from toolkit.distributed.ranks import ENGINE
from toolkit.errors import CheckpointError, RunError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.found_data import find_data
from toolkit.experiment.load import load_run_config
from toolkit.experiment.recorded import RecordedParallelism
from toolkit.launch.capacity import capacity_here
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import is_run, run_of_checkpoint
from toolkit.runs.status import RunStatus, not_a_run, read_status
from toolkit.storage.foreign import guard
from toolkit.train.config import TransformerTrainModuleConfig


class ResumePlan(NamedTuple):
    """What `toolkit resume` does with a run."""

    folder: Path
    config: ExperimentConfig
    """What is trained: the recorded engine and precision filled in."""
    stored: ExperimentConfig
    """What the run folder keeps. Silence stays silence: the next launcher may say something else.
    """
    origins: dict[str, str]
    status: RunStatus
    processes: int | None
    """Processes to launch; None: this one is a worker, or the only one."""
    environ: Mapping[str, str]
    """What the processes that train see."""


def plan_resume(run_dir: Path, overrides: Sequence[str], environ: Mapping[str, str]) -> ResumePlan:
    """Which config and which processes continue the run in `run_dir`; nothing is written."""
    run_dir = _run_meant(run_dir)
    loaded = load_run_config(run_dir, overrides)
    folder = run_dir.resolve()
    status = read_status(folder)
    if status is None:
        raise not_a_run(run_dir)
    config = find_data(loaded.config, folder, overrides)
    module = config.train_module
    asked = any(flag.startswith("--train_module.dp_config") for flag in overrides)
    on_one = asked and module.dp_config is not None and module.dp_config.name == "single"
    processes = None
    if not has_launcher(environ) and (status.world_size or 1) > 1 and not on_one:
        processes = processes_here(status.world_size or 1)
        environ = {**environ, "WORLD_SIZE": str(processes)}
    stored = find_data(loaded.stored, folder, overrides, is_filled=False)
    stored = stored.replace(run=stored.run.replace(save_folder=str(folder)))
    config = config.replace(run=config.run.replace(save_folder=str(folder)))
    with guard(folder / RUN_FILES.status, RunError):
        recorded = msgspec.convert(status.other, RecordedParallelism)
    module = parallel_again(module, recorded, status.world_size, environ, overrides)
    if not any(flag.startswith("--train_module.precision") for flag in overrides):
        precision = precision_again(module, status.other.get("precision"), environ)
        module = module.replace(precision=precision)
    config = config.replace(train_module=module)
    return ResumePlan(folder, config, stored, loaded.origins, status, processes, environ)


def _run_meant(path: Path) -> Path:
    """The run to continue: `path`, or that of the step folder `path`, which must be its newest
    whole checkpoint."""
    step, run = step_of(path.name), run_of_checkpoint(path)
    if is_run(path) or step is None or run is None:
        return path
    if not path.is_dir():
        there = [f"step{other}" for other in saved_steps(path.parent)]
        raise RunError(f"{path}: no such folder; there is {', '.join(there) or 'no checkpoint'}")
    from toolkit.checkpoint.find import problem_of

    if (problem := problem_of(path)) is not None:
        problem = problem.removeprefix(f"{path}: ").removeprefix(f"{path}/")
        raise CheckpointError(f"{path}: cannot be continued from: {problem}")
    root = run / RUN_FILES.checkpoints
    newer = [step_folder(root, other) for other in saved_steps(root) if other > step]
    if whole := [other.name for other in newer if problem_of(other) is None]:
        raise RunError(
            f"{path}: its run has gone on to {whole[-1]}, which this would do again; continue with "
            f"`toolkit resume {run}`, or branch off: `toolkit train {run / RUN_FILES.config} "
            f"--save-folder NEW_FOLDER --trainer.load_path={path}`"
        )
    return run


def parallel_again(
    module: TransformerTrainModuleConfig,
    recorded: RecordedParallelism,
    recorded_size: int | None,
    environ: Mapping[str, str],
    overrides: Sequence[str] = (),
) -> TransformerTrainModuleConfig:
    """`module` with the recorded engine and axes, where neither launcher nor `overrides` speak."""
    found = {
        "dp_config": engine_again(recorded.dp_config, recorded_size, environ),
        **{name: getattr(recorded, name) or getattr(module, name) for name in PARALLEL_FIELDS[1:]},
    }
    said = launcher_axes(environ)
    for name in PARALLEL_FIELDS:
        if name in said or any(flag.startswith(f"--train_module.{name}") for flag in overrides):
            del found[name]
    return module.replace(**found)


def engine_again(
    recorded: DataParallelConfig | None, recorded_size: int | None, environ: Mapping[str, str]
) -> DataParallelConfig | None:
    """The recorded engine, where the launcher is silent and it fits the number of processes."""
    if recorded is None:
        return None
    if launcher_names_engine(environ) and environ.get(ENGINE) != recorded.name:
        return None
    world_size = world_size_of(environ)
    if recorded.name in ("single", "ddp"):
        return None  # what silence means: single on one process, ddp on several
    if world_size == 1 and recorded_size != 1 and not offloads(recorded):
        return None  # nothing to shard over
    if recorded.name == "hsdp" and world_size != recorded_size:
        return msgspec.structs.replace(recorded, num_replicas=None, shard_degree=None)
    return recorded


def precision_again(
    module: TransformerTrainModuleConfig, recorded: str | None, environ: Mapping[str, str]
) -> Precision:
    """The recorded precision, where neither config nor launcher asks for one."""
    is_asked = module.precision != "auto" or (module.dp_config and module.dp_config.param_dtype)
    if is_asked or launcher_precision(environ):
        return module.precision
    known = {"fp32", "bf16", "fp16"}
    return recorded if recorded in known else module.precision  # type: ignore[return-value]


def processes_here(recorded: int) -> int:
    """As many processes as were recorded, or as the machine has GPUs if those are fewer."""
    capacity = capacity_here()
    if recorded > capacity.most and not capacity.gpus:
        raise RunError(
            f"{RUN_FILES.status}: the run had {recorded:,} processes; this machine has "
            f"{capacity.why}: start fewer with `toolkit resume RUN_DIR --processes N`"
        )
    return min(recorded, capacity.most)

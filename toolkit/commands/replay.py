"""Run some recorded steps again, from a checkpoint, and compare their losses with the record.

1. `plan_replay` reads the run folder: which checkpoint, which recorded steps, and the config and
   engine of the attempt that recorded them.
2. `train` runs that config in a temporary folder, from the checkpoint to the last of the steps.
3. The two train.jsonl are compared: bit for bit where everything that decides rounding is as it
   was, else within a tolerance. The receipt is the only thing written into the run folder.
"""

import functools
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.autotune.question import not_measuring
from toolkit.checkpoint.folder import check_files, read_metadata, saved_steps, step_folder, step_of
from toolkit.commands.receipt import Receipt, ReplayPlan, compare
from toolkit.commands.train import read_run_data, train
from toolkit.commands.verify import is_step_folder
from toolkit.config import leaves
from toolkit.data.corpus_info import without_sources
from toolkit.distributed.launcher import has_launcher, rank_of
from toolkit.distributed.layout import layout_of
from toolkit.distributed.logging import quieter, setup_logging
from toolkit.distributed.ranks import check_launcher_variables
from toolkit.errors import EXIT_DONE, ConfigError, RunError, TrainingError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.recorded import (
    RecordedStep,
    config_of,
    engine_of,
    found_config,
    read_steps,
    versions_of,
)
from toolkit.experiment.resuming import parallel_again, precision_again, processes_here
from toolkit.experiment.run import start_workers
from toolkit.launch.capacity import capacity_here
from toolkit.launch.plan import LaunchPlan
from toolkit.launch.workers import toolkit_command
from toolkit.runs.config import RunConfig
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import is_run, resolve_run_folder, run_of_checkpoint
from toolkit.runs.status import not_a_run
from toolkit.train.callbacks.config import CallbacksConfig
from toolkit.train.callbacks.config_base import CallbackConfig
from toolkit.train.config import Duration, TrainerConfig

log = logging.getLogger(__name__)

_NOT_NUMERIC = ("run.", "description", "trainer.")
_NUMERIC = ("trainer.max_duration.", "trainer.deterministic")
"""Of the config's values, those that change what a step computes: not the first, but the second."""


def replay_steps(
    run_dir: Path,
    steps: int,
    *,
    step: int | None = None,
    asked: LaunchPlan | None = None,
    debug: bool = False,
) -> Receipt | int:
    """Replay `steps` steps of a run from its checkpoint `step`, on the processes that are `asked`
    for, else on as many as the run had; the receipt. On ranks other than 0, and where other
    processes did the work, the exit code instead."""
    check_launcher_variables()
    environ, rank = os.environ, rank_of(os.environ)
    setup_logging(rank)
    plan = plan_replay(run_dir, steps, step)
    size = plan.engine.world_size if plan.engine else 1
    if asked is None and not has_launcher(environ) and size > 1:
        asked = LaunchPlan(processes_here(size))
        log.info("relaunching with %d processes", asked.processes)
    if asked is not None and asked.starts_workers:
        words = ["verify", str(plan.folder), "--replay", str(steps), "--step", str(plan.step)]
        command = toolkit_command(words, debug=debug)
        config = plan.config
        if plan.engine is not None:
            module = parallel_again(config.train_module, plan.engine, size, asked.environ(environ))
            config = config.replace(train_module=module)
        return start_workers(config, asked, command, verb="verify", folder=plan.folder)
    log.info(
        "replaying steps %d to %d of %s from %s",
        plan.step + 1, plan.step + steps, plan.folder, plan.checkpoint.name,
    )  # fmt: skip
    # A folder that goes away, though other ranks may still close their log files in it. What a run
    # says about itself would be about this folder.
    scratch = tempfile.TemporaryDirectory(prefix="toolkit-replay-", ignore_cleanup_errors=True)
    with scratch as root, quieter(logging.WARNING, "toolkit.experiment.run", "toolkit.train"):
        config = replay_config(plan, root, environ)
        # What it stores goes away with the folder; the recorded config has no secrets filled in.
        with not_measuring():
            code = train(config, stored=config_of(plan.folder, plan.recorded[0].attempt))
        if rank != 0:
            return code
        if code != EXIT_DONE:
            raise TrainingError("the replay was stopped before its last step; nothing was compared")
        return compare(plan, resolve_run_folder(config.run, ""))


def plan_replay(run_dir: Path, steps: int, step: int | None = None) -> ReplayPlan:
    folder = run_dir.resolve()
    run = run_of_checkpoint(run_dir) if is_step_folder(run_dir) else None
    if run is not None:
        if step is not None:
            raise ConfigError(f"{run_dir} is a checkpoint already; leave out --step, or the folder")
        step, folder = step_of(Path(os.path.abspath(run_dir)).name), run
    if not is_run(folder):
        raise not_a_run(run_dir)
    if steps < 1:
        raise ConfigError(f"--replay {steps}: give the number of steps, 1 or more")
    record = read_steps(folder)
    root = folder / RUN_FILES.checkpoints
    saved = saved_steps(root)
    comparable = {s: _count_comparable(folder, record, s) for s in saved}
    chosen = [s for s in saved if comparable[s] >= steps and step in (None, s)]
    if not chosen:
        _refuse(folder, steps, step, comparable)
    start = chosen[-1]
    attempt = record[start + 1].attempt
    config = found_config(folder, attempt)
    read_run_data(config)
    return ReplayPlan(
        folder=folder,
        checkpoint=step_folder(root, start),
        step=start,
        recorded=[record[start + number] for number in range(1, steps + 1)],
        config=config,
        engine=engine_of(folder, attempt),
        versions=versions_of(folder, attempt),
    )


def replay_config(plan: ReplayPlan, root: str, environ: Mapping[str, str]) -> ExperimentConfig:
    """What `train` runs: the recorded config, from the checkpoint to the last step, in `root`."""
    config, recorded = plan.config, plan.engine
    module = config.train_module
    if recorded is not None:
        module = parallel_again(module, recorded, recorded.world_size, environ)
        module = module.replace(precision=precision_again(module, recorded.precision, environ))
        if module.compile_model == "auto":
            module = module.replace(compile_model=bool(recorded.chosen.compile_model))
        kernel = recorded.chosen.attention
        # The kernel cannot be asked for elsewhere; then the receipt tells what is different.
        if module.attention_backend == "auto" and kernel is not None:
            is_same = layout_of(module, environ).precision == recorded.precision
            if is_same and capacity_here(environ).gpus:
                module = module.replace(attention_backend=kernel)
    trainer, run = config.trainer, RunConfig(root=root, experiment="replay", name="steps")
    if config.train_module.lora is None:
        defaults = TrainerConfig()
        loading = [name for name in TrainerConfig.__struct_fields__ if name.startswith("load_")]
        trainer = trainer.replace(
            **{name: getattr(defaults, name) for name in loading}
            | {"load_path": str(plan.checkpoint), "load_strategy": "always"}
        )
    else:
        # `load_path` is the adapter's base; the adapter is found where a run has its own.
        run = run.replace(save_folder=str(Path(root) / "replay" / "steps"))
        # A damaged one would be passed over.
        check_files(plan.checkpoint, read_metadata(plan.checkpoint), hashes=True)
        checkpoints = Path(str(run.save_folder)) / RUN_FILES.checkpoints
        checkpoints.mkdir(parents=True, exist_ok=True)
        (checkpoints / plan.checkpoint.name).symlink_to(plan.checkpoint, target_is_directory=True)
    if recorded is not None and trainer.num_threads is None:
        trainer = trainer.replace(num_threads=recorded.chosen.threads)
    trainer = trainer.replace(
        hard_stop=Duration(value=plan.recorded[-1].step),
        no_checkpoints=True,
        no_evals=True,
        max_wall_time=None,
        stop_file=None,
        callbacks=_without_observers(config.trainer.callbacks),
    )
    return config.replace(
        run=run,
        # Taken as it is: a replay prepares nothing, and stores nothing.
        dataset=without_sources(config.dataset),
        store=config.store.replace(permanent_root=None),
        train_module=module,
        trainer=trainer,
    )


def _count_comparable(folder: Path, record: dict[int, RecordedStep], step: int) -> int:
    """Recorded steps right after `step` that one config and one engine made."""

    @functools.cache
    def made_by(attempt: int) -> Any:
        return engine_of(folder, attempt), _numbers_of(folder, attempt)

    count, first = 0, record.get(step + 1)
    while first is not None and (line := record.get(step + 1 + count)) is not None:
        if line.attempt != first.attempt and made_by(line.attempt) != made_by(first.attempt):
            break
        count += 1
    return count


def _refuse(folder: Path, steps: int, step: int | None, comparable: dict[int, int]) -> None:
    shown = [f"{s} ({count} after it)" for s, count in sorted(comparable.items()) if count]
    can = f"can be replayed: step {', '.join(shown)}" if shown else "none can be replayed"
    if step is not None and step not in comparable:
        raise RunError(f"{folder}: no checkpoint step{step}; {can}")
    wanted = "no checkpoint has" if step is None else f"step{step} has not"
    raise RunError(
        f"{folder}: {wanted} {steps} steps recorded after it by one config and engine; {can}"
    )


def _numbers_of(folder: Path, attempt: int) -> dict[str, Any]:
    values = leaves(config_of(folder, attempt).to_dict())
    return {
        path: value
        for path, value in values
        if path.startswith(_NUMERIC) or not path.startswith(_NOT_NUMERIC)
    }


def _without_observers(callbacks: CallbacksConfig) -> CallbacksConfig:
    """Off is what only watches and writes: all but those of the user's own."""
    configs = ((name, getattr(callbacks, name)) for name in callbacks.__struct_fields__)
    silent = {n: c.replace(enabled=False) for n, c in configs if isinstance(c, CallbackConfig)}
    # Nor is anything taken from there.
    silent["checkpointer"] = silent["checkpointer"].replace(upload_to=None)
    return callbacks.replace(**silent)

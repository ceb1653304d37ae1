"""Running an experiment: the public steps, in the order that keeps bad input harmless.

Config, data, run folder and lock are checked before any process group exists: an error is then one
line from rank 0 instead of a time-out on all ranks, and no collective waits while one process
prepares data.
"""

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from toolkit import signals
from toolkit.autotune.question import Aspect
from toolkit.config.interpolation import fill
from toolkit.config.secrets import check_no_secrets
from toolkit.data.corpus_info import CorpusInfo, planned_batches, read_corpus
from toolkit.distributed.choosing import PATHS
from toolkit.distributed.launcher import rank_of
from toolkit.distributed.logging import setup_logging
from toolkit.distributed.ranks import check_launcher_variables
from toolkit.distributed.tuning import threads_asked_for
from toolkit.errors import EXIT_STOPPED, DataError, ErrorList, RunError
from toolkit.experiment.checks import check_corpus, check_experiment, layout_for
from toolkit.experiment.common import common_of
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load_checks import check_load_path
from toolkit.experiment.notices import notices
from toolkit.experiment.resuming import plan_resume
from toolkit.experiment.schedules import check_schedule_lengths
from toolkit.launch.capacity import check_processes
from toolkit.launch.failures import clear_notes, first_line
from toolkit.launch.mirror import Mirror
from toolkit.launch.plan import LaunchPlan
from toolkit.launch.starting import RunStart, current_launch, find_predecessor, stays_stopped
from toolkit.launch.workers import launch, note_run, toolkit_command
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import (
    check_run_folder,
    choose_run_name,
    has_trained,
    resolve_run_folder,
)
from toolkit.train.trackers.config import check_trackers

log = logging.getLogger(__name__)


class DataDoor(NamedTuple):
    """How a start comes to its data: the core opens what exists; `commands/` prepares more."""

    prepare: Callable[[ExperimentConfig], CorpusInfo | None]
    """What there is, made where it is missing; None: it is still missing. All processes call it."""
    check: Callable[[ExperimentConfig], None]
    """Raises ConfigError or DataError where text that would be prepared is not there."""


EXISTING_DATA = DataDoor(
    prepare=lambda config: read_corpus(config.data, in_use=True), check=lambda config: None
)


def train(
    config: ExperimentConfig,
    *,
    origins: Mapping[str, str] | None = None,
    stored: ExperimentConfig | None = None,
    data: DataDoor = EXISTING_DATA,
    anew: frozenset[Aspect] = frozenset(),
) -> int:
    """Run the experiment under the current launcher, if any; returns the exit code.

    A `save_folder` that holds a run is resumed; so is the run that earlier workers of the same
    launch began (`torchrun --max-restarts`).

    The run folder keeps `origins`, and as its config `stored`, with `${NAME}` as it was written;
    default: `config`, whose `${NAME}` are filled in here. A config with a secret is a ConfigError.
    What `auto` means for `anew` is chosen again, though a run that goes on has recorded it.
    """
    if stored is None:
        stored, config = config, fill(config)
    check_no_secrets(stored.to_dict())
    if local := config.run.on_this_machine():
        config = config.replace(run=config.run.replace(**local))
        url = str(stored.run.save_folder)  # with `${NAME}` as it was written
        stored = stored.replace(run=stored.run.replace(**local | {"mirror": url}))
    starting = RunStart()
    with signals.listening(starting):
        try:
            return _run(config, origins or {}, stored, starting, data, anew)
        except BaseException as error:
            # What fails in a start that is being stopped, as helpers do, is part of the stop.
            if starting.reason is None or isinstance(error, GeneratorExit):
                raise
            signals.settle()
            return starting.stop(starting.reason)
        finally:
            starting.close()


def start_workers(
    config: ExperimentConfig,
    plan: LaunchPlan,
    command: Sequence[str],
    *,
    verb: str = "train",
    folder: Path | None = None,
) -> int:
    """Run `command`, which is `toolkit VERB` of `config`, as the processes of `plan`; returns the
    exit code. `folder` is the run's, where it is known. Raises ConfigError before anything starts:
    this machine cannot hold so many, or engine and config do not fit."""
    check_processes(plan.processes)
    layout_for(config, plan.environ(os.environ))
    _log_to_console(config)
    common = common_of(config) if plan.nodes is not None else None
    return launch(
        command, plan.processes, verb=verb, folder=folder, nodes=plan.nodes, common=common
    )


def resume(
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    asked: LaunchPlan | None = None,
    debug: bool = False,
    data: DataDoor = EXISTING_DATA,
) -> int:
    """Continue the run in `run_dir`; returns the exit code.

    It starts the processes that are `asked` for. Else, without a launcher, it relaunches itself
    with the recorded engine and number of processes; under a launcher it takes what the launcher
    gives. The recorded engine and precision count where nobody asks for others. `debug` reaches the
    processes it launches.
    """
    check_launcher_variables()
    environ = os.environ if asked is None else asked.environ(os.environ)
    plan = plan_resume(run_dir, overrides, environ)
    _log_to_console(plan.config)
    command = toolkit_command(["resume", str(plan.folder), *overrides], debug=debug)
    if asked is not None and asked.starts_workers:
        return start_workers(plan.config, asked, command, verb="resume", folder=plan.folder)
    if plan.processes is not None:
        recorded = plan.status.world_size
        if plan.processes != recorded:
            text = "the run had %d processes; this machine has %d devices"
            log.warning(text, recorded, plan.processes)
        log.info("relaunching with %d processes", plan.processes)
        return launch(command, plan.processes, verb="resume", folder=plan.folder)
    if "***" in (plan.config.run.registry or ""):
        log.warning(
            "run.registry: its password was not stored; to update it, put the password into an "
            "environment variable and write its name: --run.registry='...://USER:${NAME}@HOST/DB'"
        )
    anew = frozenset(
        aspect
        for aspect, path in PATHS.items()
        if any(flag.startswith(f"--{path}") for flag in overrides)
    )
    return train(plan.config, origins=plan.origins, stored=plan.stored, data=data, anew=anew)


def _run(
    config: ExperimentConfig,
    origins: Mapping[str, str],
    stored: ExperimentConfig,
    starting: RunStart,
    data: DataDoor,
    anew: frozenset[Aspect],
) -> int:
    environ = os.environ
    check_launcher_variables(environ)
    layout = layout_for(config, environ)
    rank = starting.rank = rank_of(environ)
    _log_to_console(config)
    run, name = None, choose_run_name()
    found = ErrorList()
    found.ask(check_experiment, config, layout.batch_ranks, layout=layout)
    found.ask(threads_asked_for, environ, config.trainer.num_threads)
    if rank == 0:
        before = find_predecessor(config.run, current_launch())
        if before is not None:
            if stays_stopped(before):
                log.warning("%s: was asked to stop, so it is not started again", before)
                return EXIT_STOPPED
            log.info("started again by the launcher; continuing %s", before)
            config = config.replace(run=config.run.replace(save_folder=str(before)))
            anew = frozenset()  # its first start has chosen
        if config.run.mirror is not None:
            found.raise_any()  # before anybody is asked
            starting.mirror = _open_mirror(config, resolve_run_folder(config.run, name))
        found.ask(check_run_folder, config.run, name)
        found.ask(check_trackers, config.trainer.callbacks)
        folder = resolve_run_folder(config.run, name)
        found.ask(check_load_path, config, folder)
        # Else earlier batches may have had other sizes, and the length of an epoch is not known.
        is_new = not has_trained(folder)
        if config.trainer.load_path is None and is_new and not config.dataset.custom:
            found.ask(check_schedule_lengths, config, planned_batches(config.data, None), origins)
        if found.errors:  # preparing the data, which tells the same, is not reached
            found.ask(data.check, config)
    found.raise_any()
    try:
        corpus = data.prepare(config)
        if corpus is not None:
            check_corpus(config, corpus, layout.batch_ranks)
        is_first = "torch" not in sys.modules
        # It needs torch: bad text is reported seconds sooner without it.
        from toolkit.experiment.device_checks import check_device
        from toolkit.experiment.training import Training

        if is_first:
            gc.freeze()  # modules are no garbage: no collection has to look at them again
        training = Training(config, corpus, layout.batch_rank(rank), layout.batch_ranks)
    except DataError as error:
        # The other processes of this machine see the same files; other machines may not.
        error.only_here = rank > 0 and environ.get("LOCAL_RANK", "0") == "0"
        raise
    if rank == 0:
        check_device(config, layout)
        training.check_continuation(resolve_run_folder(config.run, name))
        batches = training.train_loader.batches
        # A run that was let go on with its warm-up goes on.
        check_schedule_lengths(config, batches, origins if is_new else {})
        for notice in notices(config, batches, origins):
            log.warning("%s", notice)
        run = starting.run = training.open_run(name, is_main=True)
        note_run(run.folder)
    try:
        if run is not None:
            clear_notes(run.folder)
            if starting.mirror is not None:
                starting.mirror.start(run)
            if not run.path(RUN_FILES.config).exists():
                training.log_configs(stored, run, layout, origins)
        return training.train(stored, run, name, origins, starting, anew)
    except BaseException as error:
        # Whatever the trainer itself did not close: an error before or outside its loop.
        if run is not None and starting.reason is None:
            with contextlib.suppress(RunError):
                run.close("failed", message=first_line(error), exit_reason="error")
        raise


def _open_mirror(config: ExperimentConfig, folder: Path) -> Mirror:
    saves = config.trainer.callbacks.checkpointer
    wait = config.run.mirror_wait
    mirror = Mirror(str(config.run.mirror), folder, saves.retention, wait_seconds=wait)
    try:
        mirror.open()
    except BaseException:
        mirror.close()
        raise
    return mirror


def _log_to_console(config: ExperimentConfig) -> None:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    setup_logging(rank_of(os.environ), local_rank=local_rank, log_ranks=config.trainer.log_ranks)

"""Running an experiment: the public steps, in the order that keeps bad input harmless.

Config, data, run folder and lock are checked before any process group exists: an error is then one
line from rank 0 instead of a time-out on all ranks, and no collective waits while one process
prepares data.
"""

import contextlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from toolkit import signals
from toolkit.config.files import read_json_mapping
from toolkit.config.interpolation import fill
from toolkit.config.secrets import check_no_secrets
from toolkit.distributed.launcher import rank_of
from toolkit.distributed.layout import Layout, resolve_layout
from toolkit.distributed.ranks import check_launcher_variables
from toolkit.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    DataError,
    ErrorList,
    RunError,
)
from toolkit.experiment.agreement import check_agreement
from toolkit.experiment.changes import config_changes
from toolkit.experiment.checks import check_corpus, check_experiment, rank_microbatch_size
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.notices import notices
from toolkit.experiment.opening import opening_lines
from toolkit.experiment.preflight import check_continuation, check_data_files, check_load_path
from toolkit.experiment.recorded import describe_engine, metadata_of_attempt, plan_resume
from toolkit.experiment.run_data import started_in, without_gone_sources
from toolkit.launch.failures import LostPeerError, Peers, clear_notes, first_line, name_rank
from toolkit.launch.relaunch import relaunch
from toolkit.launch.restarts import current_launch, find_predecessor, stays_stopped
from toolkit.launch.starting import RunStart
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.runs.registry import (
    check_run_folder,
    choose_run_name,
    is_run,
    resolve_run_folder,
    start_run,
)
from toolkit.train.progress import nothing_left
from toolkit.train.scores import check_best_metric
from toolkit.wording import count

if TYPE_CHECKING:
    from toolkit.data.corpus import Corpus
    from toolkit.data.loader import TrainLoader
    from toolkit.train.trainer import TrainResult

log = logging.getLogger(__name__)

GENTLE_STOPS = (None, "hard_stop")
"""Ends that are what was asked for: exit code 0."""


def train(
    config: ExperimentConfig,
    *,
    origins: Mapping[str, str] | None = None,
    stored: ExperimentConfig | None = None,
) -> int:
    """Run the experiment under the current launcher, if any; returns the exit code.

    A `save_folder` that holds a run is resumed; so is the run that earlier workers of the same
    launch began (`torchrun --max-restarts`).

    Args:
        origins: where each config value came from; stored beside the config.
        stored: what the run folder keeps as its config, with `${NAME}` as it was written;
            default: `config`, whose `${NAME}` are filled in here.

    Raises:
        ConfigError: a secret stands in the config.
    """
    if stored is None:
        stored, config = config, fill(config)
    check_no_secrets(stored.to_dict())
    starting = RunStart()
    with signals.listening(starting):
        try:
            return _run(config, origins or {}, stored, starting)
        except BaseException as error:
            # What fails in a start that is being stopped, as helpers do, is part of the stop.
            if starting.reason is None or isinstance(error, GeneratorExit):
                raise
            signals.settle()
            return starting.stop(starting.reason)
        finally:
            starting.close_log()


def _run(
    config: ExperimentConfig,
    origins: Mapping[str, str],
    stored: ExperimentConfig,
    starting: RunStart,
) -> int:
    environ = os.environ
    check_launcher_variables(environ)
    layout = resolve_layout(config.train_module.precision, config.train_module.dp_config, environ)
    found = ErrorList()
    with found.collecting():
        check_experiment(config, layout.batch_ranks)
    rank = starting.rank = rank_of(environ)

    from toolkit.distributed.logging import setup_logging

    setup_logging(rank, local_rank=_local_rank(), log_ranks=config.trainer.log_ranks)
    run, name = None, choose_run_name()
    if rank == 0:
        before = find_predecessor(config.run, current_launch())
        if before is not None:
            if stays_stopped(before):
                log.warning("%s: was asked to stop, so it is not started again", before)
                return EXIT_STOPPED
            log.info("started again by the launcher; continuing %s", before)
            config = config.replace(run=config.run.replace(save_folder=str(before)))
        with found.collecting():
            check_run_folder(config.run, name)
        with found.collecting():
            check_load_path(config, resolve_run_folder(config.run, name))
        if found.errors:  # preparing the data, which tells the same, is not reached
            with found.collecting():
                check_data_files(config)
    found.raise_any()
    try:
        train_loader = _prepare_data(config, layout, rank=rank)
    except DataError as error:
        # The other processes of this machine see the same files; other machines may not.
        error.only_here = rank > 0 and _local_rank() == 0
        raise
    if rank == 0:
        check_continuation(config, resolve_run_folder(config.run, name), train_loader)
        per_epoch = train_loader.steps_per_epoch
        for notice in notices(config, int(per_epoch) if math.isfinite(per_epoch) else None):
            log.warning("%s", notice)
        run = starting.run = _start(config, name, is_main=True)
    try:
        if run is not None:
            clear_notes(run.folder)
            if not run.path(RUN_FILES.config).exists():
                _log_metadata(stored, run, layout, origins, {})
        return _train(config, stored, run, name, origins, starting, train_loader.corpus)
    except BaseException as error:
        # Whatever the trainer itself did not close: an error before or outside its loop.
        if run is not None and starting.reason is None:
            with contextlib.suppress(RunError):
                run.close("failed", message=first_line(error), exit_reason="error")
        raise


def resume(run_dir: Path, overrides: Sequence[str] = (), *, debug: bool = False) -> int:
    """Continue the run in `run_dir`; returns the exit code.

    Without a launcher it relaunches itself with the recorded engine and number of processes; under
    a launcher it takes what the launcher gives, and the recorded engine and precision where that
    is silent. `debug` reaches the processes it launches.

    Raises:
        RunError: not a run folder.
    """
    from toolkit.distributed.logging import setup_logging

    check_launcher_variables()
    plan = plan_resume(run_dir, overrides, os.environ)
    log_ranks = plan.config.trainer.log_ranks
    setup_logging(rank_of(os.environ), local_rank=_local_rank(), log_ranks=log_ranks)
    if plan.processes is not None:
        recorded = plan.status.world_size
        if plan.processes != recorded:
            text = "the run had %d processes; this machine has %d devices"
            log.warning(text, recorded, plan.processes)
        return relaunch(plan.folder, overrides, plan.processes, debug=debug)
    if "***" in (plan.config.run.registry or ""):
        log.warning(
            "run.registry: its password was not stored; to update it, put the password into an "
            "environment variable and write its name: --run.registry='...://USER:${NAME}@HOST/DB'"
        )
    return train(plan.config, origins=plan.origins, stored=plan.stored)


def _train(
    config: ExperimentConfig,
    stored: ExperimentConfig,
    run: RunManager | None,
    name: str,
    origins: Mapping[str, str],
    starting: RunStart,
    corpus: "Corpus",
) -> int:
    from toolkit.data.loader import get_dataloaders
    from toolkit.distributed.environment import check_shared_folder, prepare_training_environment
    from toolkit.distributed.logging import add_log_file, log_failure
    from toolkit.train.trainer import Trainer

    environment = prepare_training_environment(config)
    log_file, trainer, train_dl, has_failed = None, None, None, False
    # To the very end: a rank that ends because of another one must say so before a signal ends it.
    until_the_end = contextlib.ExitStack()
    try:
        # Where rank 0 writes is where all do.
        name, where = environment.broadcast((name, config.run))
        config = config.replace(run=where)
        if run is None:
            run = _start(config, name, is_main=False)
        check_shared_folder(environment, run.folder)
        log_file = add_log_file(run.path(RUN_FILES.logs), environment.rank)
        starting.log_file = log_file
        train_dl, eval_dl = get_dataloaders(
            config.data,
            batch_rank=environment.batch_rank,
            batch_ranks=environment.batch_ranks,
            eval_batch_tokens=rank_microbatch_size(config, environment.batch_ranks),
            vocab_size=config.model.vocab_size,
            device=environment.device,
            corpus=corpus,
        )
        check_agreement(config, environment, train_dl, eval_dl)
        for line in opening_lines(config, environment, run.folder):
            log.info("%s", line)
        _log_data(train_dl)
        model = config.model.build(init_device="meta")
        train_module = config.train_module.build(model, environment=environment)
        trainer = Trainer(config.trainer, train_module, train_dl, eval_dl, run=run)
        before = read_json_mapping(run.path(RUN_FILES.config)) if environment.is_main else {}
        trainer.restore()
        if environment.is_main:
            command = metadata_of_attempt(run.folder, RUN_FILES.command, run.attempt - 1)
            for change in config_changes(before, stored, started_in(command)):
                log.info("changed since the run's last start: %s", change)
            if trainer.step >= trainer.stop_step:
                stop = trainer.stop_step
                log.warning("%s", nothing_left(config.trainer, stop, trainer.total_steps))
        # Not before: a run that cannot be continued with this config keeps the one it has.
        _log_metadata(stored, run, environment.layout, origins, train_module.kernels)
        until_the_end.enter_context(trainer.stop_request.listening())
        signals.settle()
        result = trainer.train()
        _log_end(result, run)
        if result.reason in GENTLE_STOPS:
            return EXIT_DONE
        return EXIT_FAILED if result.saved_step is None else EXIT_STOPPED
    except BaseException as error:
        has_failed = True
        if isinstance(error, signals.Interrupted):
            raise
        signals.settle()
        step = trainer.step if trainer is not None else 0
        lost = None
        if run is not None:
            with contextlib.suppress(RunError):  # this host does not see the run folder
                peers = Peers(run, rank=environment.rank, world_size=environment.world_size)
                lost = peers.report(error, step=step)
        if log_file is not None:
            log_failure(log_file, lost or error, rank=environment.rank, step=step)
        if lost is not None:
            raise lost from error
        if run is not None and not isinstance(error, LostPeerError):
            name_rank(error, run, environment.rank, step)
        raise
    finally:
        if train_dl is not None:
            train_dl.close()
        environment.close(after_error=has_failed)
        until_the_end.close()


def _prepare_data(config: ExperimentConfig, layout: Layout, *, rank: int) -> "TrainLoader":
    """Prepare the corpus (one process of each machine; the others wait) and check that it fits."""
    from toolkit.data.prepare.corpus import prepare_corpus

    if rank > 0 and _local_rank() == 0:  # another machine may have the prepared data alone
        config = without_gone_sources(config)
    corpus = prepare_corpus(
        config.data,
        work_dir=config.run.work_dir,
        progress=_local_rank() == 0,
        check_text=_local_rank() == 0,
    )
    check_corpus(config, corpus)
    # torch comes with the loaders: bad text is reported seconds sooner without it.
    from toolkit.data.corpus import open_corpus
    from toolkit.data.loader import get_dataloaders

    train_loader, evaluation = get_dataloaders(
        config.data,
        batch_rank=layout.batch_rank(rank),
        batch_ranks=layout.batch_ranks,
        vocab_size=config.model.vocab_size,
        corpus=open_corpus(config.data, corpus),
    )
    check_best_metric(config.trainer, evaluation)
    return train_loader


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _start(config: ExperimentConfig, name: str, *, is_main: bool) -> RunManager:
    folder = resolve_run_folder(config.run, name)
    run = start_run(
        config.run.experiment,
        config.run.name or (None if config.run.save_folder else name),
        resume=config.run.save_folder is not None and is_run(folder) and is_main,
        root=config.run.root,
        save_folder=config.run.save_folder,
        registry_url=config.run.registry,
        is_main=is_main,
    )
    launch = current_launch() if is_main else None
    run.set_status("running", launch=None if launch is None else msgspec.to_builtins(launch))
    return run


def _log_metadata(
    config: ExperimentConfig,
    run: RunManager,
    layout: Layout,
    origins: Mapping[str, str],
    kernels: Mapping[str, str] | None = None,
) -> None:
    # Asked for once: the next start must not do it again.
    config = config.replace(trainer=config.trainer.replace(start_anew=False))
    run.log_metadata(config, RUN_FILES.config)
    run.log_metadata(config.data, RUN_FILES.data_config)
    run.log_metadata(config.model, RUN_FILES.model_config)
    run.log_metadata(
        {"train_module": config.train_module, "trainer": config.trainer}, RUN_FILES.trainer_config
    )
    kept = {p: o for p, o in origins.items() if o != "default" and p != "trainer.start_anew"}
    run.log_metadata(kept, RUN_FILES.origins)
    run.set_status(
        "running",
        engine=layout.name,
        world_size=layout.world_size,
        parameters=config.model.num_parameters,
        dp_config=msgspec.to_builtins(layout.dp_config),
        precision=layout.precision,
    )
    run.log_metadata(describe_engine(layout, kernels), RUN_FILES.engine)


def _log_data(train_loader: "TrainLoader") -> None:
    per_epoch = train_loader.steps_per_epoch
    if math.isinf(per_epoch):
        return
    dropped = train_loader.dropped_instances
    log.info(
        "%s of up to %s: %s an epoch%s",
        count(train_loader.num_instances, "instance"),
        count(train_loader.sequence_length, "token"),
        count(int(per_epoch), "step"),
        f", {count(dropped, 'instance')} left out" if dropped else "",
    )


def _log_end(result: "TrainResult", run: RunManager) -> None:
    if result.last_eval is not None:
        evaluation = result.last_eval
        line = f"validation loss {evaluation['loss']:.4f}"
        if "bits_per_byte" in evaluation:
            line += f", {evaluation['bits_per_byte']:.4f} bits per byte"
        log.info("%s (step %d)", line, evaluation["step"])
    if result.reason in GENTLE_STOPS:
        log.info("done at step %d; everything is in %s", result.step, run.folder)
        if result.reason == "hard_stop" and result.saved_step is not None:
            log.info("go on with: toolkit resume %s --trainer.hard_stop=null", run.folder)
        for label, path in (
            ("metrics", RUN_FILES.metrics),
            ("TensorBoard", RUN_FILES.tensorboard),
            ("checkpoints", RUN_FILES.checkpoints),
        ):
            log.info("  %-12s %s", label, run.path(path))
    elif result.saved_step is None:
        log.warning(
            "stopped at step %d (%s); no checkpoint was saved (trainer.no_checkpoints or "
            "trainer.callbacks.checkpointer.enabled), so nothing can be continued",
            result.step, result.reason,
        )  # fmt: skip
    else:
        lost = f", from step {result.saved_step}" if result.saved_step < result.step else ""
        log.info(
            "stopped at step %d (%s); continue with: toolkit resume %s%s",
            result.step, result.reason, run.folder, lost,
        )  # fmt: skip

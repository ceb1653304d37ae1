"""The part of a run that needs torch: from its data to its last line. `run.py` comes before it."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import torch

from toolkit import signals
from toolkit.autotune.choices import Choices
from toolkit.autotune.question import Aspect
from toolkit.config.named import named
from toolkit.data.corpus import open_corpus
from toolkit.data.corpus_info import CorpusInfo
from toolkit.data.loader import TrainLoader, get_dataloaders
from toolkit.distributed.config import PARALLEL_FIELDS
from toolkit.distributed.devices import device_name, usable_gpus
from toolkit.distributed.environment import (
    TrainingEnvironment,
    check_shared_folder,
    prepare_training_environment,
)
from toolkit.distributed.layout import Layout
from toolkit.distributed.logging import add_log_file, log_failure
from toolkit.distributed.tuning import cpu_name
from toolkit.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RunError, TrainingError
from toolkit.experiment.agreement import check_agreement
from toolkit.experiment.changes import config_changes
from toolkit.experiment.checks import rank_microbatch_size
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.continuation import check_continuation
from toolkit.experiment.found_data import started_in
from toolkit.experiment.recorded import (
    EngineRecord,
    kept_origins,
    metadata_of_attempt,
    stored_config,
)
from toolkit.launch.failures import LostPeerError, Peers, name_rank
from toolkit.launch.mirror import Mirror, seconds_left
from toolkit.launch.starting import RunStart, current_launch
from toolkit.models.config import ModuleConfig
from toolkit.runs.config import RunConfig
from toolkit.runs.files import RUN_FILES
from toolkit.runs.manager import RunManager
from toolkit.runs.registry import is_run, resolve_run_folder, start_run
from toolkit.train.progress import nothing_left
from toolkit.train.run_config import log_config
from toolkit.train.scores import check_metrics, results_of
from toolkit.train.telling import log_opening
from toolkit.train.trainer import Trainer

# These lines are the run's own, whichever of its files says them.
log = logging.getLogger("toolkit.experiment.run")

_SECONDS_TO_CLOSE = 30.0
"""How long rank 0 needs at most, after its wait for the mirror, to be where the others are."""


class Training:
    """An experiment whose data is open."""

    def __init__(
        self, config: ExperimentConfig, data: CorpusInfo | None, batch_rank: int, batch_ranks: int
    ) -> None:
        self.config = config
        self.data = data
        self.corpus = open_corpus(config.data, data)
        self.train_loader, evaluation = get_dataloaders(
            config.data,
            batch_rank=batch_rank,
            batch_ranks=batch_ranks,
            vocab_size=config.model.vocab_size,
            corpus=self.corpus,
        )
        check_metrics(config.trainer, evaluation, results=results_of(config.train_module))
        downstream = config.trainer.callbacks.downstream_evaluator
        if downstream.is_wanted:
            named("toolkit.evaluate.tasks.names:check_names")(downstream.tasks)

    def check_continuation(self, folder: Path) -> None:
        """Check that the run in `folder` can go on with this config; see `continuation.py`."""
        check_continuation(self.config, folder, self.train_loader)

    def open_run(self, name: str, *, is_main: bool, where: RunConfig | None = None) -> RunManager:
        """Open the run folder that `where` says (default: the config's); `name` is the run's where
        the config names none."""
        config = where or self.config.run
        run = start_run(
            config.experiment,
            config.name or (None if config.save_folder else name),
            resume=config.save_folder is not None
            and is_run(resolve_run_folder(config, name))
            and is_main,
            root=config.root,
            save_folder=config.save_folder,
            registry_url=config.registry,
            is_main=is_main,
        )
        launch = current_launch() if is_main else None
        run.set_status("running", launch=None if launch is None else msgspec.to_builtins(launch))
        return run

    @staticmethod
    def log_configs(
        config: ExperimentConfig,
        run: RunManager,
        layout: Layout,
        origins: Mapping[str, str],
        kernels: Mapping[str, str] | None = None,
        choices: Choices | None = None,
    ) -> None:
        """Write what a start is made from into the run's metadata/ and status."""
        log_config(run, config.to_dict(), layout, config.model.num_parameters, choices)
        run.metadata.log(kept_origins(origins, run.folder), RUN_FILES.origins)
        run.metadata.log(describe_engine(layout, kernels, choices), RUN_FILES.engine)

    def train(
        self,
        stored: ExperimentConfig,
        run: RunManager | None,
        name: str,
        origins: Mapping[str, str],
        starting: RunStart,
        anew: frozenset[Aspect] = frozenset(),
    ) -> int:
        """Train to the end, or to a stop; returns the exit code. All ranks call it; those other
        than 0 have no `run`, and follow rank 0 to where it writes. `anew`: what `auto` means is
        chosen again for these."""
        environment = prepare_training_environment(
            self.config,
            run_dir=None if run is None else run.folder,
            anew=anew,
        )
        log_file, trainer, train_dl, has_failed = None, None, None, False
        # To the very end: a rank that ends because of another one must say so before a signal ends
        # it.
        until_the_end = contextlib.ExitStack()
        try:
            # Where rank 0 writes is where all do.
            name, where = environment.broadcast((name, self.config.run))
            config = self.config.replace(run=where)
            if run is None:
                run = self.open_run(name, is_main=False, where=where)
            check_shared_folder(environment, run.folder)
            log_file = add_log_file(run.path(RUN_FILES.logs), environment.rank)
            starting.log_file = log_file
            train_dl, eval_dl = get_dataloaders(
                config.data,
                batch_rank=environment.layout.batch_rank(environment.rank),
                batch_ranks=environment.layout.batch_ranks,
                eval_batch_tokens=rank_microbatch_size(config, environment.layout.batch_ranks),
                vocab_size=config.model.vocab_size,
                device=environment.device,
                corpus=self.corpus,
            )
            check_agreement(config, environment, train_dl, eval_dl)
            _log_opening(config, environment, run.folder, train_dl, self.data)
            with _explaining_memory(config, environment, run.folder):
                model = config.model.build(init_device="meta", seed=config.seed)
                train_module = config.train_module.build(model, environment=environment)
                if isinstance(config.model, ModuleConfig):
                    train_module.model_config = config.model
                trainer = Trainer(config.trainer, train_module, train_dl, eval_dl, run=run)
                before = stored_config(run.folder) if environment.is_main else {}
                trainer.restore()
                if environment.is_main:
                    _log_changes(before, stored, run, trainer)
                # Not before: a run that cannot be continued with this config keeps the one it has.
                kept = environment.layout, origins, train_module.kernels, environment.choices
                self.log_configs(stored, run, *kept)
                until_the_end.enter_context(signals.listening(trainer.state.stop_request))
                signals.settle()
                result = trainer.fit()
            if where.mirror is not None:
                _wait_for_mirror(environment, starting.mirror, where.mirror_wait)
            if result.is_gentle:
                return EXIT_DONE
            return EXIT_FAILED if result.saved_step is None else EXIT_STOPPED
        except BaseException as error:
            has_failed = True
            if isinstance(error, signals.Interrupted):
                raise
            signals.settle()
            step = trainer.state.step if trainer is not None else 0
            lost = None
            if run is not None:
                with contextlib.suppress(RunError):  # this host does not see the run folder
                    peers = Peers(
                        run,
                        rank=environment.rank,
                        world_size=environment.world_size,
                        role_of=environment.layout.role,
                    )
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


def _wait_for_mirror(
    environment: TrainingEnvironment, mirror: Mirror | None, seconds: float
) -> None:
    """Rank 0, which has the mirror, waits for it, and the others for rank 0: launchers end the
    ranks that are left soon after the first one is gone."""
    with contextlib.suppress(RuntimeError):  # of a rank that is gone
        seconds = min(environment.gather(seconds_left(seconds)))
    if mirror is not None:
        mirror.close(within=seconds)
    with contextlib.suppress(RuntimeError):
        environment.wait_for_main(seconds + _SECONDS_TO_CLOSE)


@contextlib.contextmanager
def _explaining_memory(
    config: ExperimentConfig, environment: TrainingEnvironment, folder: Path
) -> Iterator[None]:
    """Say what the plan for this layout needs where a device has no memory left."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        device, memory = environment.device, 0
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        explain = named("toolkit.commands.plan.shortage:shortage")
        file = folder / RUN_FILES.config
        message = explain(config, environment.layout, device_name(device), memory, file)
        raise TrainingError(f"rank {environment.rank}: {message}") from error


def describe_engine(
    layout: Layout, kernels: Mapping[str, str] | None = None, choices: Choices | None = None
) -> EngineRecord:
    """The engine of `layout` on this machine, as metadata/engine.json keeps it."""
    return EngineRecord(
        name=layout.name,
        world_size=layout.world_size,
        precision=layout.precision,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if usable_gpus() else cpu_name(),
        **{name: getattr(layout, name) for name in PARALLEL_FIELDS},
        kernels=dict(kernels or {}),
        chosen=choices or Choices(),
    )


def _log_opening(
    config: ExperimentConfig,
    environment: TrainingEnvironment,
    folder: Path,
    train_loader: TrainLoader,
    data: CorpusInfo | None,
) -> None:
    parameters = config.model.shown_parameters
    log_opening(config.trainer, environment, parameters, folder, train_loader)
    lines: list[str] = []
    for name, (_, prepared) in data.parts.items() if data is not None else ():
        if (audit := prepared.manifest.audit) is not None:
            lines += [f"{name}: {line}" if name else line for line in audit.lines()]
    for line in lines:
        log.info("%s", line)


def _log_changes(
    before: dict[str, object], stored: ExperimentConfig, run: RunManager, trainer: Trainer
) -> None:
    command = metadata_of_attempt(run.folder, RUN_FILES.command, run.attempt - 1)
    for change in config_changes(before, stored, started_in(command)):
        log.info("changed since the run's last start: %s", change)
    state = trainer.state
    if state.step >= state.stop_step:
        said = nothing_left(state.config, state.stop_step, state.total_steps, state.step)
        log.warning("%s", said)

"""`toolkit resume --explain`: what a resume would restore, change and refuse. Writes nothing.

It asks the functions that `resume` itself uses. torch is imported only where there is a checkpoint,
whose state it reads; the model is not built.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.checkpoint.folder import (
    INVALID_SUFFIX,
    CheckpointMetadata,
    read_metadata,
    saved_steps,
    step_folder,
)
from toolkit.commands.train import without_gone_sources
from toolkit.commands.verify import check_checkpoint
from toolkit.data.corpus_info import CorpusInfo, data_places, read_corpus
from toolkit.data.prepare.corpus import check_corpus_settings
from toolkit.distributed.layout import Layout
from toolkit.distributed.logging import quieter
from toolkit.distributed.ranks import check_launcher_variables
from toolkit.errors import ConfigError, DataError, ErrorList, RunError, ToolkitError
from toolkit.experiment.changes import config_changes
from toolkit.experiment.checks import (
    batches_of,
    check_corpus,
    check_experiment,
    layout_for,
)
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.found_data import has_data, started_in
from toolkit.experiment.load_checks import check_load_options
from toolkit.experiment.recorded import read_steps, stored_config
from toolkit.experiment.resuming import ResumePlan, plan_resume
from toolkit.experiment.schedules import check_schedule_lengths
from toolkit.runs.environment import installed_version
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import check_run_folder
from toolkit.runs.status import current_state
from toolkit.train.progress import none_saved, nothing_left, reached_step, refusal
from toolkit.train.timeline import Timeline
from toolkit.wording import count, labelled

if TYPE_CHECKING:
    from toolkit.data.loader import TrainLoader
    from toolkit.train.restoring import Start


class Explanation(NamedTuple):
    rows: list[tuple[str, list[str]]]
    """(label, lines), for reading."""
    refused: list[str]
    """Why it would not start; empty: it would."""

    def __str__(self) -> str:
        rows = [*self.rows, ("refused", self.refused or ["nothing: it would start"])]
        return "\n".join(labelled(rows))


def explain_resume(
    run_dir: Path, overrides: Sequence[str], environ: Mapping[str, str]
) -> Explanation:
    """What `toolkit resume run_dir overrides` would do under this launcher."""
    check_launcher_variables()
    plan = plan_resume(run_dir, overrides, environ)
    config, folder, refused = without_gone_sources(plan.config), plan.folder, _Refusals()
    state = current_state(folder, plan.status)
    if state == "running":
        where = f"pid {plan.status.pid} on {plan.status.host}"
        refused.add(RunError(f"another process is writing this run ({where}); stop it first"))
    layout = refused.ask(lambda: layout_for(config, plan.environ))
    if layout is not None:
        refused.ask(lambda: check_experiment(config, layout.batch_ranks, layout=layout))
    corpus = refused.ask(lambda: _corpus(config, 1 if layout is None else layout.batch_ranks))
    refused.ask(lambda: check_run_folder(config.run, ""))
    found = _look(config, folder, corpus, refused)
    batches = batches_of(config, corpus) if found.loader is None else found.loader.batches
    refused.ask(lambda: check_schedule_lengths(config, batches, {}))
    changes = config_changes(
        stored_config(folder), plan.stored, started_in(folder / RUN_FILES.command)
    )
    rows = [
        ("run", [f"{folder}: {state}, attempt {plan.status.attempt}"]),
        ("checkpoint", _checkpoint(plan, found)),
        ("skipped", _skipped(folder, found.saved if found.is_own else None)),
        ("engine", _engine(plan, found.saved, layout)),
        ("optimizer", list(found.retrained)),
        ("config", changes or ["nothing changes"]),
        ("versions", _versions(found.saved)),
        ("data", _data(config, corpus, found)),
        ("goes on", _steps(config, corpus, found)),
    ]
    reasons = [str(error) for error in refused.errors]
    return Explanation([row for row in rows if row[1]], reasons)


class _Refusals(ErrorList):
    """What `resume` would stop at, whatever kind of error it is."""

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        try:
            yield
        except ToolkitError as error:
            self.add(error)


def _corpus(config: ExperimentConfig, ranks: int) -> CorpusInfo | None:
    corpus = read_corpus(config.data)
    if corpus is None:
        if config.dataset.source is None and config.dataset.mix is None:
            raise DataError(
                f"{_places(config)}: no prepared data there, and dataset.source is null; give one "
                "or the other"
            )
        return None
    check_corpus_settings(config.data, corpus)
    check_corpus(config, corpus, ranks)
    return corpus


def _places(config: ExperimentConfig) -> str:
    return ", ".join(str(place) for place in data_places(config.data))


class _Found(NamedTuple):
    """What there is to go on from. Nothing, where nothing was saved or it was refused."""

    start: "Start | None" = None
    saved: CheckpointMetadata | None = None
    loader: "TrainLoader | None" = None
    """None too for data that is not here: it is prepared first."""
    retrained: Sequence[str] = ()
    state_of_data: dict[str, Any] | None = None
    is_own: bool = False
    """Whether the checkpoint is the run's."""

    @property
    def step(self) -> int:
        return self.saved.step if self.saved and self.start and not self.start.weights_only else 0


def _look(
    config: ExperimentConfig, folder: Path, corpus: CorpusInfo | None, refused: _Refusals
) -> _Found:
    """Ask of the checkpoint and the data what training would ask before its first step."""
    trainer, own = config.trainer, folder / RUN_FILES.checkpoints
    start, loader = None, None
    is_saved = saved_steps(own) or trainer.load_path or trainer.callbacks.checkpointer.upload_to
    if not is_saved and not trainer.start_anew and (reached := reached_step(folder)):
        refused.add(refusal(folder, reached, none_saved(folder, trainer.no_checkpoints)))
    if not is_saved and config.dataset.mix is None:
        refused.ask(lambda: check_load_options(config))
        return _Found()
    from toolkit.experiment import continuation
    from toolkit.experiment.training import Training

    if is_saved:
        with quieter(logging.CRITICAL, "toolkit.checkpoint"):
            start = refused.ask(lambda: continuation.start_of(config, folder))
    refused.ask(lambda: check_load_options(config, is_found=start is not None))
    if corpus is not None and (start is not None or config.dataset.mix is not None):
        with quieter(logging.CRITICAL, "toolkit.data"):
            training = refused.ask(lambda: Training(config, corpus, batch_rank=0, batch_ranks=1))
        loader = training.train_loader if training is not None else None
    found = _Found(start, loader=loader)
    if start is not None:
        for check in continuation.continuation_checks(config, folder, start, loader):
            refused.ask(check)
        found = found._replace(
            saved=read_metadata(start.checkpoint),
            retrained=refused.ask(lambda: continuation.changed_training(config, start)) or [],
            state_of_data=None if start.weights_only else continuation.data_state(start),
            is_own=continuation.is_inside(start.checkpoint, own),
        )
    if loader is not None:
        refused.ask(lambda: continuation.check_repetitions(config, loader))
    return found


def _checkpoint(plan: ResumePlan, found: _Found) -> list[str]:
    start, saved = found.start, found.saved
    if start is None or saved is None:
        if reached_step(plan.folder) and not plan.config.trainer.start_anew:
            return ["none that is whole"]
        return ["none: it would start at step 0, from fresh weights"]
    if start.weights_only:
        return [f"{start.checkpoint}: the weights alone, then step 0"]
    lines = [f"{start.checkpoint}: step {saved.step:,}, {count(saved.tokens, 'token')}"]
    if start.base is not None:
        lines.append(f"an adapter, on {start.base}")
    if found.is_own and (last := max(read_steps(plan.folder), default=0)) > saved.step:
        lines.append(f"steps {saved.step + 1} to {last} were recorded, and are done again")
    return lines


def _skipped(folder: Path, used: CheckpointMetadata | None) -> list[str]:
    """Newer checkpoints that are not whole, and why; all, where none is used."""
    root = folder / RUN_FILES.checkpoints
    newer = [step for step in saved_steps(root) if used is None or step > used.step]
    reports = [check_checkpoint(step_folder(root, step)) for step in reversed(newer)]
    return [
        f"{report.folder.name}: {report.problem} (becomes {report.folder.name}{INVALID_SUFFIX})"
        for report in reports
        if report.problem
    ]


def _engine(plan: ResumePlan, saved: CheckpointMetadata | None, layout: Layout | None) -> list[str]:
    recorded = f"{plan.status.engine} x {plan.status.world_size}"
    before = f"{saved.engine} x {saved.world_size}" if saved else recorded
    if layout is None:
        return [f"saved by {before}; what would run is refused"]
    now = f"{layout.description} x {layout.world_size}"
    lines = [f"saved by {before}, goes on with {now} in {layout.precision}"]
    if saved and (saved.engine, saved.world_size) == (layout.description, layout.world_size):
        lines = [f"{now} in {layout.precision}, as saved"]
    precision = plan.status.other.get("precision")
    if precision not in (None, layout.precision):
        lines.append(f"the run's last precision was {precision}")
    if plan.processes is not None:
        lines.append(f"this command launches {count(plan.processes, 'process')}")
        if plan.processes != plan.status.world_size:
            lines.append(f"the run had {plan.status.world_size}; this machine has fewer devices")
    if saved and saved.world_size != layout.world_size:
        lines.append("other number of processes: random states of libraries start anew")
    return [*lines, *layout.notices]


def _versions(saved: CheckpointMetadata | None) -> list[str]:
    if saved is None:
        return []
    then: dict[str, str] = saved.extra.get("versions", {})
    changed = [
        f"{name}: {version} then, {now} now"
        for name, version in then.items()
        if version != (now := installed_version(name))
    ]
    return changed or ["as when it was saved: " + ", ".join(f"{n} {v}" for n, v in then.items())]


def _data(config: ExperimentConfig, corpus: CorpusInfo | None, found: _Found) -> list[str]:
    state = found.state_of_data
    batch = state["batch"] if state else 0
    next_batch = f"next is batch {batch:,} of the run, counted from 0"
    if corpus is None:
        state_now = "refused, see below" if has_data(config) else "not prepared; that is done first"
        return [next_batch, f"{_places(config)}: {state_now}"]
    planned = batches_of(config, corpus)
    before, size = _size_change(config, found)
    if before != size:
        line = f"{next_batch}: {size:,} tokens instead of {before:,}, from the next unseen instance"
    elif not planned.knows_epochs or (state and len(state.get("segments", [])) > 1):
        line = next_batch
    else:
        per_epoch = planned.plan.steps_per_epoch
        epoch, place = divmod(batch, per_epoch)
        line = f"next is batch {place:,} (from 0) of epoch {epoch + 1}, of {per_epoch:,}"
    return [line, corpus.where]


def _size_change(config: ExperimentConfig, found: _Found) -> tuple[int, int]:
    """Tokens of the next batch as the checkpoint has planned them, and as the config asks."""
    state, saved = found.state_of_data, found.saved
    if state is None or saved is None:
        return 0, 0
    before = int(state["global_batch_size"])
    if segments := state.get("segments"):
        last = next(s for s in reversed(segments) if s[0] <= state["batch"])
        before = int(last[2]) * int(state["sequence_length"])
    sizes = config.data_loader.batch_sizes
    return before, next(size for start, size in reversed(sizes) if start <= saved.tokens)


def _steps(config: ExperimentConfig, corpus: CorpusInfo | None, found: _Found) -> list[str]:
    trainer, loader = config.trainer, found.loader
    batches = batches_of(config, corpus) if loader is None else loader.batches
    try:
        timeline = Timeline.of(trainer, batches.steps_of)
    except ConfigError:
        return ["to a step that is known once the data is prepared"]
    last = timeline.stop_step
    if found.step >= last:
        return [nothing_left(trainer, last, timeline.total_steps, found.step)]
    return [f"from step {found.step + 1:,} to {last:,}"]

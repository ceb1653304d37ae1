"""`toolkit resume --explain`: what a resume would restore, change and refuse. Writes nothing.

It asks the functions that `resume` itself uses. torch is imported only where there is a checkpoint,
whose state it reads; the model is not built.
"""

import contextlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolkit.checkpoint.folder import (
    INVALID_SUFFIX,
    CheckpointMetadata,
    saved_steps,
    step_folder,
)
from toolkit.commands.verify import check_checkpoint
from toolkit.config.files import read_json_mapping
from toolkit.data.corpus_info import CorpusInfo, data_places, read_corpus
from toolkit.data.prepare.corpus import check_corpus_settings
from toolkit.data.tokens.prepared import MANIFEST_NAME
from toolkit.distributed.layout import Layout, resolve_layout
from toolkit.errors import DataError, ErrorList, RunError, ToolkitError
from toolkit.experiment.changes import config_changes
from toolkit.experiment.checks import check_corpus, check_experiment
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.preflight import (
    changed_training,
    check_load_options,
    check_repetitions,
    continuation_checks,
)
from toolkit.experiment.recorded import ResumePlan, plan_resume, read_steps
from toolkit.experiment.run_data import started_in
from toolkit.runs.files import RUN_FILES
from toolkit.runs.registry import check_run_folder
from toolkit.runs.status import current_state
from toolkit.train.progress import none_saved, nothing_left, reached_step, refusal
from toolkit.train.scores import check_best_metric
from toolkit.wording import count

if TYPE_CHECKING:
    from toolkit.data.loader import TrainLoader
    from toolkit.train.restoring import Start

_LABEL_WIDTH = 12


class Explanation(NamedTuple):
    """What a resume would do."""

    rows: list[tuple[str, list[str]]]
    """(label, lines), for reading."""
    refused: list[str]
    """Why it would not start; empty: it would."""

    def __str__(self) -> str:
        rows = [*self.rows, ("refused", self.refused or ["nothing: it would start"])]
        lines = []
        for label, (first, *more) in rows:
            lines.append(f"{label:<{_LABEL_WIDTH}}{first}")
            lines += [f"{'':<{_LABEL_WIDTH}}{line}" for line in more]
        return "\n".join(lines)


def explain_resume(
    run_dir: Path, overrides: Sequence[str], environ: Mapping[str, str]
) -> Explanation:
    """What `toolkit resume run_dir overrides` would do under this launcher.

    Raises:
        RunError: not a run folder.
        ConfigError: its config cannot be read, or an override does not fit.
    """
    plan = plan_resume(run_dir, overrides, environ)
    folder, refused = plan.folder, _Refusals()
    state = current_state(folder, plan.status)
    if state == "running":
        where = f"pid {plan.status.pid} on {plan.status.host}"
        refused.add(RunError(f"another process is writing this run ({where}); stop it first"))
    module = plan.config.train_module
    layout = refused.ask(lambda: resolve_layout(module.precision, module.dp_config, plan.environ))
    if layout is not None:
        refused.ask(lambda: check_experiment(plan.config, layout.batch_ranks))
    corpus = refused.ask(lambda: _corpus(plan.config))
    refused.ask(lambda: check_run_folder(plan.config.run, ""))
    start = refused.ask(lambda: _start(plan.config, folder))
    refused.ask(lambda: check_load_options(plan.config, start))
    loader = refused.ask(lambda: _loader(plan, corpus)) if start or _is_mixed(plan) else None
    saved, state_of_data = None, None
    retrained: list[str] = []
    if start is not None:
        from toolkit.checkpoint.load import metadata_of

        saved = metadata_of(start.checkpoint)
        position: Any = loader or _AnyPosition()
        for check in continuation_checks(plan.config, folder, start, position):
            refused.ask(check)
        retrained = refused.ask(lambda: changed_training(plan.config, start)) or []
        state_of_data = None if start.weights_only else _data_state(start)
    if loader is not None and corpus is not None:
        refused.ask(lambda: check_repetitions(plan.config, loader))
    before = read_json_mapping(folder / RUN_FILES.config)
    changes = config_changes(before, plan.stored, started_in(folder / RUN_FILES.command))
    rows = [
        ("run", [f"{folder}: {state}, attempt {plan.status.attempt}"]),
        ("checkpoint", _checkpoint(plan, start, saved)),
        ("skipped", _skipped(folder, saved if _is_own(start, folder) else None)),
        ("engine", _engine(plan, saved, layout)),
        ("optimizer", retrained),
        ("config", changes or ["nothing changes"]),
        ("versions", _versions(saved)),
        ("data", _data(plan.config, corpus, state_of_data)),
        ("goes on", _steps(plan, corpus, loader, saved, start)),
    ]  # fmt: skip
    reasons = [str(error) for error in refused.errors]
    return Explanation([(label, lines) for label, lines in rows if lines], reasons)


class _Refusals(ErrorList):
    """What `resume` would stop at, whatever kind of error it is."""

    def ask(self, check: Callable[[], Any]) -> Any:
        """The answer of `check`; None where it refuses."""
        try:
            return check()
        except ToolkitError as error:
            self.add(error)
            return None


def _corpus(config: ExperimentConfig) -> CorpusInfo | None:
    corpus = read_corpus(config.data)
    if corpus is None:
        if config.dataset.source is None and config.dataset.mix is None:
            raise DataError(
                f"{_places(config)}: no prepared data there, and dataset.source is null; give one "
                "or the other"
            )
        return None
    check_corpus_settings(config.data, corpus)
    check_corpus(config, corpus)
    return corpus


def _places(config: ExperimentConfig) -> str:
    return ", ".join(str(place) for place in data_places(config.data))


def _start(config: ExperimentConfig, folder: Path) -> "Start | None":
    own, trainer = folder / RUN_FILES.checkpoints, config.trainer
    upload_to = trainer.callbacks.checkpointer.upload_to
    if not saved_steps(own) and trainer.load_path is None and upload_to is None:
        reached = reached_step(folder)
        if reached and not trainer.start_anew:
            raise refusal(folder, reached, none_saved(trainer.no_checkpoints))
        return None
    from toolkit.train.restoring import find_start, reached_by

    with _quiet("toolkit.checkpoint"):
        adapts = config.train_module.lora is not None
        reached = reached_by(trainer, folder)
        return find_start(trainer, own, adapts=adapts, reached=reached)


def _loader(plan: ResumePlan, corpus: CorpusInfo | None) -> "TrainLoader | None":
    """The loader that training would use, to ask whether the saved position means something to it.

    Data that is not here (it is prepared first) or was refused already takes any.
    """
    from toolkit.data.corpus import open_corpus
    from toolkit.data.loader import get_dataloaders

    if corpus is None:
        return None
    with _quiet("toolkit.data"):
        train_loader, evaluation = get_dataloaders(
            plan.config.data,
            batch_rank=0,
            batch_ranks=1,
            vocab_size=plan.config.model.vocab_size,
            corpus=open_corpus(plan.config.data, corpus),
        )
    check_best_metric(plan.config.trainer, evaluation)
    return train_loader


def _is_mixed(plan: ResumePlan) -> bool:
    return plan.config.dataset.mix is not None


class _AnyPosition:
    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _is_own(start: "Start | None", folder: Path) -> bool:
    if start is None:
        return False
    from toolkit.train.restoring import is_inside

    return is_inside(start.checkpoint, folder / RUN_FILES.checkpoints)


def _data_state(start: "Start") -> dict[str, Any]:
    from toolkit.checkpoint.load import rank_state_of

    return rank_state_of(start.checkpoint, rank=0)["trainer"]["data"]


def _checkpoint(
    plan: ResumePlan, start: "Start | None", saved: CheckpointMetadata | None
) -> list[str]:
    if start is None or saved is None:
        if reached_step(plan.folder) and not plan.config.trainer.start_anew:
            return ["none that is whole"]
        return ["none: it would start at step 0, from fresh weights"]
    if start.weights_only:
        return [f"{start.checkpoint}: the weights alone, then step 0"]
    lines = [f"{start.checkpoint}: step {saved.step:,}, {count(saved.tokens, 'token')}"]
    if start.base is not None:
        lines.append(f"an adapter, on {start.base}")
    if _is_own(start, plan.folder):
        last = max(read_steps(plan.folder), default=0)
        if last > saved.step:
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
    now = f"{layout.name} x {layout.world_size}"
    lines = [f"saved by {before}, goes on with {now} in {layout.precision}"]
    if saved and (saved.engine, saved.world_size) == (layout.name, layout.world_size):
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
        if version != (now := _installed(name))
    ]
    return changed or ["as when it was saved: " + ", ".join(f"{n} {v}" for n, v in then.items())]


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _data(
    config: ExperimentConfig, corpus: CorpusInfo | None, state: dict[str, Any] | None
) -> list[str]:
    batch = state["batch"] if state else 0
    next_batch = f"next is batch {batch:,} of the run, counted from 0"
    if corpus is None:
        there = all((place / MANIFEST_NAME).is_file() for place in data_places(config.data))
        state_now = "refused, see below" if there else "not prepared; that is done first"
        return [next_batch, f"{_places(config)}: {state_now}"]
    size, per_epoch = config.data_loader.global_batch_size, corpus.steps_per_epoch(config.data)
    if state and state["global_batch_size"] != size:
        before = state["global_batch_size"]
        line = f"{next_batch}: {size:,} tokens instead of {before:,}, from the next unseen instance"
    elif per_epoch is None or (state and len(state.get("segments", [])) > 1):
        line = next_batch
    else:
        epoch, place = divmod(batch, per_epoch)
        line = f"next is batch {place:,} (from 0) of epoch {epoch + 1}, of {per_epoch:,}"
    return [line, corpus.where]


def _steps(
    plan: ResumePlan,
    corpus: CorpusInfo | None,
    loader: "TrainLoader | None",
    saved: CheckpointMetadata | None,
    start: "Start | None",
) -> list[str]:
    trainer, batch = plan.config.trainer, plan.config.data_loader.global_batch_size
    per_epoch = corpus.steps_per_epoch(plan.config.data) if corpus else None
    limits = [trainer.max_duration, *([trainer.hard_stop] if trainer.hard_stop else [])]
    done = saved.step if saved is not None and start is not None and not start.weights_only else 0
    try:
        if loader is None or corpus is None:
            ends = [limit.in_steps(batch, per_epoch) for limit in limits]
        else:
            ends = [loader.steps_of(limit.value, limit.unit) for limit in limits]
    except ValueError:
        return ["to a step that is known once the data is prepared"]
    last = min(ends)
    if done >= last:
        return [nothing_left(trainer, last, ends[0])]
    return [f"from step {done + 1:,} to {last:,}"]


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Warnings of this logger would say what the explanation says."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)

"""What of a config does less than it says: one line each, in a dry run and at the start of a run.

Nothing here is wrong enough to refuse; what is asked for is done, or is said not to be.
"""

import contextlib
from collections.abc import Iterator

from toolkit.data.config import TokenFilesSourceConfig
from toolkit.errors import ConfigError
from toolkit.experiment.config import ExperimentConfig
from toolkit.models.config import ModuleConfig
from toolkit.train.timeline import StepsOf, Timeline
from toolkit.wording import count


def notices(config: ExperimentConfig, steps_of: StepsOf) -> list[str]:
    """The lines, in the order of the config."""
    lines = [*_model(config), *_data(config)]
    with contextlib.suppress(ConfigError):  # epochs of data that is not there yet
        timeline = Timeline.of(config.trainer, steps_of)
        lines += _length(config, timeline)
    return [*lines, *_trainer(config)]


def _model(config: ExperimentConfig) -> Iterator[str]:
    if isinstance(config.model, ModuleConfig):
        return
    model = config.model.to_transformer()
    if model.positions == "learned" and (model.rope_scaling or model.sliding_rope_theta):
        yield "model.rope_scaling and model.sliding_rope_theta do nothing: positions are learned"
    if model.sliding_window is None and model.sliding_rope_theta is not None:
        yield "model.sliding_rope_theta does nothing: no layer has a model.sliding_window"


def _data(config: ExperimentConfig) -> Iterator[str]:
    loader, dataset, store = config.data_loader, config.dataset, config.store
    if loader.num_workers and dataset.custom is None:
        yield (
            f"data_loader.num_workers {loader.num_workers} does nothing: workers read data sets "
            "written in Python, and token files need none"
        )
    if store.max_cache_gb is not None and store.permanent_root is None:
        yield (
            f"store.max_cache_gb {store.max_cache_gb:g} does nothing: without store.permanent_root "
            "the local copies are the only ones, and stay"
        )
    if dataset.source is None and dataset.mix is None and dataset.custom is None:
        ignored = [name for name in ("filters", "instructions") if getattr(dataset, name)]
        ignored += ["deduplicate"] if dataset.deduplicate else []
        if ignored:
            names = " and ".join(f"dataset.{name}" for name in ignored)
            yield f"{names} does nothing: without dataset.source, token files are taken as they are"
    is_tokens = isinstance(dataset.source, TokenFilesSourceConfig)
    if is_tokens and (dataset.filters or dataset.instructions):
        yield "dataset.filters and dataset.instructions do nothing: the source holds ids, not text"


def _length(config: ExperimentConfig, timeline: Timeline) -> Iterator[str]:
    steps, stop = timeline
    scheduler = config.train_module.scheduler
    in_tokens = scheduler.units == "tokens"
    # Never against `hard_stop`, which only tries out the beginning of a run.
    total = steps * config.data_loader.global_batch_size if in_tokens else steps
    if scheduler.warmup > total:
        noun = "token" if in_tokens else "step"
        yield (
            f"train_module.scheduler.warmup is {count(scheduler.warmup, noun)} and the whole run "
            f"(trainer.max_duration) {count(total, noun)}: the rate never gets beyond the warm-up"
        )
    if stop is not None and stop > steps:
        yield (
            f"trainer.hard_stop ({count(stop, 'step')}) does nothing: the run ends before it, "
            f"after {count(steps, 'step')}"
        )


def _trainer(config: ExperimentConfig) -> Iterator[str]:
    trainer = config.trainer
    if trainer.load_path is None:
        for name in ("load_weights_only", "load_key_mapping", "load_in_place"):
            if getattr(trainer, name):
                yield f"trainer.{name} does nothing: there is no trainer.load_path"
    elif trainer.load_in_place and "://" not in trainer.load_path:
        yield "trainer.load_in_place does nothing: trainer.load_path is on this machine"
    if trainer.wall_time_margin is not None and trainer.max_wall_time is None:
        yield "trainer.wall_time_margin does nothing: there is no trainer.max_wall_time"
    saver = trainer.callbacks.checkpointer
    if saver.upload_to is not None and (trainer.no_checkpoints or not saver.enabled):
        yield "trainer.callbacks.checkpointer.upload_to does nothing: no checkpoints are written"

"""What of a config does less than it says: one line each, in a dry run and at the start of a run.

Nothing here is wrong enough to refuse; what is asked for is done, or is said not to be.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from toolkit.data.config import TokenFilesSourceConfig
from toolkit.data.order.plan import Batches
from toolkit.errors import ConfigError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.schedules import schedule_notices
from toolkit.models.config import ModuleConfig
from toolkit.models.parameters import parameter_shapes
from toolkit.optim.base import OPTIM_KEY, is_matched
from toolkit.train.timeline import Timeline
from toolkit.wording import count


def notices(
    config: ExperimentConfig, batches: Batches, origins: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """The lines, in the order of the config; `origins` tell where its values come from."""
    lines = [*_model(config), *_data(config), *_groups(config)]
    lines += schedule_notices(config, batches, origins)
    with contextlib.suppress(ConfigError):  # epochs of data that is not there yet
        timeline = Timeline.of(config.trainer, batches.steps_of)
        lines += [*_length(timeline), *_callbacks(config, timeline.stop_step)]
    lines += _trainer(config)
    if os.environ.get("OLMO_SHARED_FS"):
        lines.append("OLMO_SHARED_FS does nothing: ranks find out whether they see one run folder")
    return lines


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


def _groups(config: ExperimentConfig) -> Iterator[str]:
    """Patterns that come too late: the first entry that matches wins."""
    if isinstance(config.model, ModuleConfig):
        return
    names: list[str] = []
    with contextlib.suppress(ConfigError):  # of an adapter's patterns
        names = list(parameter_shapes(config.model.to_transformer(), config.train_module.lora))
    winner: dict[str, int] = {}
    for index, override in enumerate(config.train_module.optim.group_overrides):
        hits = {p: [n for n in names if is_matched(n, [p])] for p in override.params}
        for pattern, own in hits.items():
            if own and all(name in winner for name in own):
                earlier = sorted({winner[name] for name in own})
                yield (
                    f"{OPTIM_KEY}.group_overrides.{index}: {pattern!r} does nothing: all that it "
                    f"matches is taken by {' and '.join(f'group_overrides.{n}' for n in earlier)} "
                    "before it, and the first entry wins; put this one first"
                )
        for name in (name for own in hits.values() for name in own):
            winner.setdefault(name, index)


def _callbacks(config: ExperimentConfig, steps: int) -> Iterator[str]:
    """Those whose first moment comes after the last step."""
    callbacks = config.trainer.callbacks
    profiler, stability, ema = callbacks.profiler, callbacks.stability_monitor, callbacks.ema
    first = {
        "profiler": profiler.skip_first + profiler.wait + profiler.warmup + 1,
        "stability_monitor": max(2, stability.window // 2) + 1,
        "rank_monitor": callbacks.rank_monitor.interval,
        "gpu_memory_monitor": callbacks.gpu_memory_monitor.interval,
        "ema": ema.start_step + 1,
    }
    for name, evaluator in (
        ("lm_evaluator", callbacks.lm_evaluator),
        ("downstream_evaluator", callbacks.downstream_evaluator),
    ):
        if not (evaluator.at_start or evaluator.at_end):
            first[name] = evaluator.interval
    for name, step in first.items():
        if getattr(callbacks, name).is_wanted and step > steps:
            yield (
                f"trainer.callbacks.{name} does nothing: the first step that it looks at is "
                f"{step:,}, and the run ends after {count(steps, 'step')}"
            )


def _length(timeline: Timeline) -> Iterator[str]:
    steps, stop = timeline
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

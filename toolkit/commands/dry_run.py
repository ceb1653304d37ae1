"""What `--dry-run` shows: the resolved config with origins, and what follows from it.

Nothing heavier than a manifest is read, no device is touched, nothing is written. That files exist
is checked; other machines are not asked.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from toolkit.commands.load import check_data_files
from toolkit.commands.plan.devices import CPU, GIB, find_device
from toolkit.commands.plan.memory import least_memory
from toolkit.commands.plan.plans import Target, job_of
from toolkit.config import DEFAULT_ORIGIN, leaves
from toolkit.config.defaults import differing
from toolkit.config.secrets import mask_secrets
from toolkit.config.yaml_text import dump_yaml
from toolkit.data.corpus_info import CorpusInfo, data_places, read_corpus
from toolkit.data.prepare.text.sources import is_compared
from toolkit.distributed.choosing import foreseen
from toolkit.distributed.layout import Layout
from toolkit.distributed.low_precision import describe_float8
from toolkit.distributed.pipeline import plan_pipeline
from toolkit.distributed.tuning import threads_asked_for
from toolkit.errors import ConfigError, ErrorList, ToolkitError
from toolkit.evaluate.tasks.names import check_names
from toolkit.experiment.checks import (
    batches_of,
    check_corpus,
    check_experiment,
    check_parameters,
    gradient_accumulation_steps,
    layout_for,
)
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import LoadedExperiment
from toolkit.experiment.load_checks import check_load_path
from toolkit.experiment.notices import notices
from toolkit.experiment.schedules import check_schedule_lengths
from toolkit.launch.capacity import capacity_here, free_memory
from toolkit.models.config import ModuleConfig
from toolkit.models.parameters import describe_quantised, flops_per_token, quantised_layers
from toolkit.optim.groups import describe_groups, group_records
from toolkit.runs.registry import check_run_folder, is_run, resolve_run_folder
from toolkit.train.config import Duration
from toolkit.train.trackers.config import check_trackers
from toolkit.wording import count, labelled, prefixed

_PARTS = {"pp": "stages", "cp": "positions", "tp": "matrices", "ep": "experts"}
"""Axis -> what its ranks share."""

_CALLBACKS = "trainer.callbacks"

_RANKS_SHOWN = 16
"""Of a table of ranks, besides the last one."""


def summarize(loaded: LoadedExperiment, environ: Mapping[str, str], *, every: bool = False) -> str:
    """The dry run of an experiment under this launcher, as text for a terminal: with `every` value,
    or those that a flag gave or that differ from their default."""
    config = loaded.config
    layout, corpus = check(config, environ, loaded.origins)
    rows = [
        ("model", _model(config)),
        ("optimizer", _optimizer(config)),
        ("data", _data(config, corpus)),
        ("batch", _batch(config, layout)),
        ("duration", _duration(config, corpus)),
        ("engine", _engine(config, layout, environ)),
        ("ranks", _ranks(config, layout)),
        ("writes", _writes(config)),
        ("note", notices(config, batches_of(config, corpus), loaded.origins)),
        ("here", _problems_here(config, layout) + _shortage_here(config, layout, environ)),
    ]
    title = f"dry run of {loaded.source}" + (
        f": {config.description}" if config.description else ""
    )
    lines = [title, "", *_config_lines(loaded, every=every), "", *labelled(rows), ""]
    lines.append("Nothing was written. Leave out --dry-run to start.")
    return str(mask_secrets("\n".join(lines)))


def as_yaml(config: ExperimentConfig) -> str:
    """`config` as a YAML file that `train` reads."""
    return dump_yaml(config.to_dict()).rstrip("\n")


def check(
    config: ExperimentConfig,
    environ: Mapping[str, str],
    origins: Mapping[str, str],
    *,
    elsewhere: bool = False,
) -> tuple[Layout, CorpusInfo | None]:
    """Check all that can be told before a start; the layout and, where it is prepared, the data.
    `elsewhere`: the run is for other machines, so no file of this one is looked at. Raises
    ConfigError or another error of bad input."""
    found = ErrorList()
    # Without the number of processes nothing else can be told.
    layout = layout_for(config, environ)
    found.ask(check_experiment, config, layout.batch_ranks, layout=layout)
    sound = not found.errors
    corpus = None
    if not elsewhere:
        found.ask(threads_asked_for, environ, config.trainer.num_threads)
        corpus = found.ask(read_corpus, config.data)
        found.ask(check_data_files, config)
        found.ask(check_run_folder, config.run, "<time>")
        found.ask(lambda: check_load_path(config, resolve_run_folder(config.run, "<time>")))
    found.ask(check_trackers, config.trainer.callbacks)
    downstream = config.trainer.callbacks.downstream_evaluator
    if downstream.is_wanted:
        found.ask(check_names, downstream.tasks)
    if sound:
        found.ask(check_schedule_lengths, config, batches_of(config, corpus), origins)
    if corpus is not None and config.dataset.custom is None:
        from toolkit.data.prepare.corpus import check_corpus_settings  # which needs numpy

        found.ask(check_corpus_settings, config.data, corpus)
    if corpus is not None and sound:
        with found.collecting():
            check_corpus(config, corpus, layout.batch_ranks)
            if config.dataset.mix is not None:
                from toolkit.commands.mix import preview_mix

                broken = preview_mix(config, prepare=False).broken_limit
                if broken is not None:
                    raise ConfigError(broken)
    found.raise_any()
    return layout, corpus


def _config_lines(loaded: LoadedExperiment, *, every: bool) -> list[str]:
    found = [(p, v) for p, v in leaves(loaded.stored.to_dict()) if p != "description"]
    wanted = {path for path, _ in found} if every else _worth_showing(loaded)
    values = [(p, _shown(v)) for p, v in found if p in wanted]
    path_width = max((len(path) for path, _ in values), default=0)
    value_width = max((len(v) for p, v in values if len(v) <= 24), default=0)
    lines, section = [], ""
    for path, value in values:
        if path.partition(".")[0] != section:
            lines += [""] if section else []
            section = path.partition(".")[0]
        origin = loaded.origins[path]
        mark = "" if origin == DEFAULT_ORIGIN else f"  < {origin.partition('=')[0]}"
        lines.append(f"  {path:<{path_width}}  {value:<{value_width if mark else 0}}{mark}")
    if len(values) < len(found):
        hidden = count(len(found) - len(values), "value")
        lines += ["", f"  {hidden} more, at their defaults or of callbacks that are off: --all"]
    return lines


def _worth_showing(loaded: LoadedExperiment) -> set[str]:
    """Paths of values that a flag gave, and of those that are not the default, unless of a callback
    that is off."""
    callbacks = loaded.stored.to_dict()["trainer"]["callbacks"]
    is_off = {
        f"{_CALLBACKS}.{name}."
        for name, callback in callbacks.items()
        if isinstance(callback, dict) and callback.get("enabled") is False
    }
    given = {path for path, origin in loaded.origins.items() if origin.startswith("--")}
    return given | {
        path
        for path in differing(loaded.stored)
        if path.endswith(".enabled") or not path.startswith(tuple(is_off))
    }


def _model(config: ExperimentConfig) -> list[str]:
    model = config.model
    if isinstance(model, ModuleConfig):
        return [f"{model.target}: a model of your own, {model.shown_parameters} parameters"]
    flops = model.flops_per_token(config.dataset.sequence_length)
    trained = []
    if config.train_module.freeze or config.train_module.lora:
        chosen = check_parameters(config)
        trained = [str(chosen)]
        quantised = quantised_layers(model.to_transformer(), config.train_module.lora)
        if quantised is not None:
            trained.append(describe_quantised(model.to_transformer(), quantised))
        flops = flops_per_token(model.to_transformer(), chosen, config.dataset.sequence_length)
    parts = [f"{model.num_non_embedding_parameters:,} without embeddings"]
    if model.num_active_parameters != model.num_parameters:
        parts.append(f"{model.num_active_parameters:,} active")
    return [
        f"{model.num_parameters:,} parameters ({', '.join(parts)})",
        *trained,
        f"{prefixed(flops, 'FLOP')} a token to train",
    ]


def _optimizer(config: ExperimentConfig) -> list[str]:
    model = config.model
    if isinstance(model, ModuleConfig):
        return []
    optim = config.train_module.optim.of_model(model.to_transformer().d_model)
    infos = check_parameters(config).infos
    shapes = {name: info.shape for name, info in infos.items()}
    trained = {name for name, info in infos.items() if info.is_trained}
    return describe_groups(optim, group_records(optim, shapes, trained))


def _data(config: ExperimentConfig, corpus: CorpusInfo | None) -> list[str]:
    dataset = config.dataset
    if dataset.custom is not None:
        return [f"{dataset.custom.target}: instances made in Python"]
    if corpus is None:
        places = ", ".join(str(place) for place in data_places(config.data))
        if dataset.source is None and dataset.mix is None:
            return [f"{places}: not prepared, and dataset.source is null; give one or the other"]
        return [f"{places}: not prepared yet; training starts with it"]
    lines = [
        f"{prepared.folder}: {prepared.num_tokens('train'):,} training tokens, "
        f"{prepared.num_tokens('val'):,} validation tokens"
        for _, prepared in corpus.parts.values()
    ] + [
        f"{prepared.folder}: {prepared.num_tokens('train'):,} tokens that are evaluated only"
        for _, prepared in corpus.eval_parts.values()
    ]
    sources = [one.source for one, _ in (*corpus.parts.values(), *corpus.eval_parts.values())]
    if not all(source is None or is_compared(source) for source in sources):
        lines.append("not checked: whether the text on the hub or on another machine has changed")
    if config.store.permanent_root is not None:
        lines.append(f"kept in {config.store.permanent_root}")
    return lines


def _batch(config: ExperimentConfig, layout: Layout) -> list[str]:
    ranks, lines = layout.batch_ranks, []
    shares, each = count(ranks, "rank"), layout.world_size // ranks
    if each > 1:
        shares = f"{count(ranks, 'share')} of {count(each, 'rank')}"
    for start, batch in config.data_loader.batch_sizes:
        passes = gradient_accumulation_steps(config, ranks, batch)
        since = f", from {count(start, 'token')} on" if start else ""
        lines.append(
            f"{batch:,} tokens a step = {shares} x "
            f"{batch // (ranks * passes):,} tokens x {passes} gradient accumulation{since}"
        )
    lengths = config.data_loader.sequence_lengths(config.dataset.sequence_length)
    for start, length in lengths:
        since = f", from {count(start, 'token')} on" if start else ""
        lines.append(f"sequences of {count(length, 'token')}{since}")
    return lines


def _duration(config: ExperimentConfig, corpus: CorpusInfo | None) -> list[str]:
    batches = batches_of(config, corpus)

    def length(duration: Duration) -> str:
        try:
            steps = batches.steps_of(duration.value, duration.unit)
        except ValueError:
            return f"{count(duration.value, 'epoch')}; steps are known once the data is prepared"
        epochs = f", {batches.epochs_done(steps):.2f} epochs" if batches.knows_epochs else ""
        return f"{count(steps, 'step')}, {batches.tokens_done(steps):,} tokens{epochs}"

    stop = config.trainer.hard_stop
    lines = [length(config.trainer.max_duration)]
    return lines if stop is None else [*lines, f"hard stop after {length(stop)}"]


def _engine(config: ExperimentConfig, layout: Layout, environ: Mapping[str, str]) -> list[str]:
    precision: str = layout.precision
    if precision == "auto":
        precision = "auto: bf16 on GPUs that have it, fp32 on CPUs"
        if not capacity_here().gpus:
            precision = foreseen(config, layout, environ) or precision
    mesh = ""
    if layout.dp_replicate > 1 and layout.dp_shard > 1:
        mesh = f", {layout.dp_replicate} replicas x {layout.dp_shard} shards"
    origin = "" if layout.origin == DEFAULT_ORIGIN else f", from {layout.origin}"
    if (float8 := config.train_module.float8_config) is not None:
        precision += f", {describe_float8(config.model.to_transformer(), float8)}"
    return [
        f"{layout.description}{mesh}, {count(layout.world_size, 'process')}{origin}",
        f"precision {precision}",
        *layout.notices,
    ]


def _ranks(config: ExperimentConfig, layout: Layout) -> list[str]:
    """A table of who does what, where ranks differ in more than their rows."""
    pipeline = None
    if layout.pp_config is not None:
        pipeline = plan_pipeline(config.model.to_transformer(), layout.pp_config)
    if max(layout.pp, layout.cp, layout.tp, layout.ep) == 1:
        return []
    heads = ["rank", "rows"]
    heads += [name for axis, name in _PARTS.items() if getattr(layout, axis) > 1]
    rows = [heads]
    shown = [r for r in range(layout.world_size) if r < _RANKS_SHOWN or r == layout.world_size - 1]
    for rank in shown:
        place = layout.place(rank) | layout.place(rank, experts=True)
        row = [f"{rank}", f"{layout.batch_rank(rank) + 1} of {layout.batch_ranks}"]
        row += [
            pipeline.describe(place["pp"])
            if axis == "pp" and pipeline is not None
            else f"{place[axis] + 1} of {getattr(layout, axis)}"
            for axis in _PARTS
            if getattr(layout, axis) > 1
        ]
        rows += [["..."] + [""] * (len(heads) - 1)] if rank > len(rows) - 1 else []
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _writes(config: ExperimentConfig) -> list[str]:
    folder = resolve_run_folder(config.run, "<time>")
    lines = [f"{folder}"]
    if is_run(folder):
        is_resumed = config.run.save_folder is not None
        lines[0] += " (exists: resumed)" if is_resumed else " (exists: nothing was trained there)"
    if (url := config.run.on_this_machine().get("mirror", config.run.mirror)) is not None:
        lines.append(f"{url}, the same (mirrored)")
    if config.dataset.source is not None or config.dataset.mix is not None:
        lines += [str(place.absolute()) for place in data_places(config.data)]
    if config.trainer.no_checkpoints or not config.trainer.callbacks.checkpointer.enabled:
        lines.append("no checkpoints")
    return lines


def _problems_here(config: ExperimentConfig, layout: Layout) -> list[str]:
    """What this machine's device cannot do: the one that will train may be another."""
    module, profiler = config.train_module, config.trainer.callbacks.profiler
    asks_kernel = module.attention_backend != "auto"
    if module.float8_config is None and not asks_kernel and not profiler.enabled:
        return []
    # It needs torch, for which nobody else waits.
    from toolkit.experiment.device_checks import check_device

    found = ErrorList()
    found.ask(check_device, config, layout)
    return [f"refused on this machine: {error}" for error in found.errors]


def _shortage_here(
    config: ExperimentConfig, layout: Layout, environ: Mapping[str, str]
) -> list[str]:
    """Where this machine has no GPU and too little memory for what a run cannot do without."""
    if isinstance(config.model, ModuleConfig):
        return []
    ranks = int(environ.get("LOCAL_WORLD_SIZE", environ.get("WORLD_SIZE", "1")))
    try:
        job = job_of(config, layout, Target(find_device(CPU, ranks), ranks))
        needed, free = ranks * least_memory(job), free_memory()
    except ToolkitError:  # of parts that no plan knows
        return []
    if needed <= free or capacity_here(environ).gpus:  # the latter may wait for torch
        return []
    return [f"needs at least {needed / GIB:.1f} GiB; this machine has {free / GIB:.1f} GiB free"]


def _shown(value: Any) -> str:
    if isinstance(value, str) and value and value == value.strip():
        return value
    return msgspec.json.encode(value).decode()

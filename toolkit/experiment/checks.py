"""Checks across the sections of an experiment that need no device and read no tokens.

Every error names the keys it is about and the nearest values that work.
"""

import contextlib
import os
import shlex
from collections.abc import Mapping

from toolkit.data.config import BPETokenizerConfig, ByteTokenizerConfig
from toolkit.data.corpus_info import (
    VAL,
    CorpusInfo,
    check_batch_schedules,
    planned_batches,
)
from toolkit.data.order.plan import Batches
from toolkit.data.order.resolve import resolve_mix
from toolkit.data.tokens.prepared import require_ids
from toolkit.distributed.launcher import world_size_of
from toolkit.distributed.layout import Layout, fewest_ranks, layout_of
from toolkit.distributed.low_precision import check_float8
from toolkit.distributed.pipeline import check_microbatches, plan_pipeline
from toolkit.distributed.sizes import Besides, check_combination, check_sizes
from toolkit.distributed.tuning import asked_threads
from toolkit.errors import ConfigError, DataError, ErrorList
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.normalized import check_normalized
from toolkit.experiment.objectives import check_objective, check_objective_data
from toolkit.experiment.small_data import sizes_that_fit
from toolkit.models.config import ClassModelConfig, ModuleConfig
from toolkit.models.parameters import (
    TrainedParameters,
    parameter_shapes,
    quantised_layers,
    trained_parameters,
)
from toolkit.train.callbacks.config import TWO_AVERAGES
from toolkit.train.config import NO_BASE, TrainerConfig, check_basic
from toolkit.train.scheduled import check_schedules
from toolkit.train.scores import check_metrics_in, results_of
from toolkit.wording import count

BYTE_VOCAB_SIZE = 257
"""256 byte values and the end of a document."""

SEQUENCE = "dataset.sequence_length"
GLOBAL_BATCH = "data_loader.global_batch_size"
MICROBATCH = "train_module.rank_microbatch_size"
LOADING = tuple(f"trainer.{n}" for n in TrainerConfig.__struct_fields__ if n.startswith("load_"))

_FAR = 100_000
"""How far a number that works is looked for."""


def layout_for(config: ExperimentConfig, environ: Mapping[str, str]) -> Layout:
    """`layout_of` its train module. Raises ConfigError: where no number of processes helps, since
    the model does not divide by the degrees, that is what it says."""
    module = config.train_module
    try:
        return layout_of(module, environ)
    except ConfigError as error:
        refused = error
    fewest = {**environ, "WORLD_SIZE": f"{fewest_ranks(module)}"}
    with contextlib.suppress(ConfigError):
        layout = layout_of(module, fewest)
        try:
            others = layout.tp * layout.cp
            _check_parallelism(config, layout, world_size_of(environ) // others)
        except ConfigError as error:
            refused = error
    raise refused


def check_experiment(
    config: ExperimentConfig,
    batch_ranks: int,
    *,
    layout: Layout | None = None,
    has_model: bool = True,
    has_names: bool = True,
) -> None:
    """Check that the sections of `config` fit each other, on `batch_ranks` ranks with distinct rows
    or as `layout` has it.

    `has_model` and `has_names`: the model and the names of its parameters are those that are meant.
    """
    if layout is not None:
        batch_ranks = layout.batch_ranks
    found = ErrorList()
    found.ask(asked_threads, os.environ)
    if isinstance(config.model, ModuleConfig):
        has_model = False
        if layout is not None:
            found.ask(check_basic, config.train_module, layout.name)
    if has_model:
        found.ask(_check_sequence, config)
        found.ask(_check_vocabulary, config)
        if layout is not None:
            found.ask(_check_parallelism, config, layout)
        found.ask(check_objective, config, layout)
    found.ask(_check_batches, config, batch_ranks)
    found.ask(check_batch_schedules, config.data)
    if has_model and has_names:
        found.ask(check_parameters, config)
    else:
        found.ask(check_schedules, config.train_module)
    found.ask(_check_own_classes, config)
    found.ask(_check_adapter, config)
    found.ask(check_normalized, config)
    found.ask(_check_metrics, config)
    found.ask(_check_averages, config)
    found.ask(_check_eval_names, config)
    found.raise_any()


def check_parameters(config: ExperimentConfig) -> TrainedParameters:
    """Check the patterns of `freeze`, `lora` and `optim.group_overrides` against the model's names;
    which parameters there are, and which of them are trained."""
    module, model, found = config.train_module, config.model.to_transformer(), ErrorList()
    with found.collecting():
        names = parameter_shapes(model, module.lora)
        with found.collecting():
            module.optim.check_groups(names)
        with found.collecting():
            has_adapter = module.lora is not None
            module.optim.check_model(has_tied_head=model.tie_embeddings, has_adapter=has_adapter)
        found.ask(check_schedules, module)
        parameters = trained_parameters(model, freeze=module.freeze, lora=module.lora)
        quantised_layers(model, module.lora)
    found.raise_any()
    return parameters


def besides_layout(config: ExperimentConfig) -> Besides:
    """What of `config` must go with what a layout cuts."""
    module, model = config.train_module, config.model
    return Besides(
        has_frozen=bool(module.freeze),
        has_adapter=module.lora is not None,
        adapts_vocabulary=module.lora is not None and module.lora.adapts_vocabulary,
        has_dropout=module.lora is not None and module.lora.dropout > 0,
        own_model=model.target if isinstance(model, ClassModelConfig) else None,
        optim=module.optim,
        quantize_base=module.lora.quantize_base if module.lora is not None else None,
        compiles_selected_ops=module.compile_model is True
        and module.ac_config is not None
        and module.ac_config.mode == "selected_ops",
        compile_mode=module.compile_mode,
    )


def _check_parallelism(config: ExperimentConfig, layout: Layout, ranks: int | None = None) -> None:
    """`ranks`: those that stages and data parallelism share, if not as many as in `layout`."""
    found, model = ErrorList(), config.model
    found.ask(check_sizes, layout, model.to_transformer())
    found.ask(check_combination, layout, besides_layout(config))
    if (float8 := config.train_module.float8_config) is not None:
        length, adapts = config.dataset.sequence_length, config.train_module.lora is not None
        transformer = model.to_transformer()
        rest = {"sequence_length": length, "has_adapter": adapts}
        found.ask(check_float8, float8, layout, transformer, **rest)
    if (pipeline := layout.pp_config) is not None:
        ranks = layout.pp * layout.batch_ranks if ranks is None else ranks
        found.ask(plan_pipeline, model.to_transformer(), pipeline, ranks=ranks)
        for phase in config.data.phases:
            length = config.dataset.sequence_length // phase.row_split
            share = phase.batch_instances * phase.row_split // layout.batch_ranks
            microbatch = config.train_module.rank_microbatch_size
            rows = share if microbatch is None else microbatch // length
            if share and rows:  # else said of the batch
                schedule, degree = pipeline.schedule, pipeline.degree
                options = {"length": length, "batch_ranks": layout.batch_ranks}
                size = min(share, rows)
                found.ask(check_microbatches, schedule, degree, share, size, **options)
    found.raise_any()


def _check_own_classes(config: ExperimentConfig) -> None:
    is_module = isinstance(config.model, ModuleConfig)
    if isinstance(config.model, ClassModelConfig | ModuleConfig):
        config.model.own_class()
    if config.train_module.target is not None:
        config.train_module.own_class(any_model=is_module)
    elif is_module:
        raise ConfigError(
            "model.type is a model of your own: name its train module, derived from "
            "toolkit.BasicTrainModule",
            key="train_module.type",
        )
    for name, callback in config.trainer.callbacks.custom.items():
        if callback.enabled:
            callback.own_class(name)


def _held_out_sets(config: ExperimentConfig) -> list[str]:
    sets = [VAL]
    if config.dataset.mix is not None:
        with contextlib.suppress(ConfigError):  # said where the data is looked for
            # Any of them may have nothing held out, and one that is left is no total.
            sets += [source.name for source in resolve_mix(config.dataset)]
    return sets


def _check_eval_names(config: ExperimentConfig) -> None:
    """eval.jsonl tells results apart by their names."""
    ema, sets, found = config.trainer.callbacks.ema, config.dataset.eval_sets, ErrorList()
    if ema.enabled and ema.evaluate == "also":
        for name in (*_held_out_sets(config), *sets):
            for suffix in ema.suffixes:
                if name + suffix in sets:
                    problem = f"the evaluation of {name} by trainer.callbacks.ema has this name"
                    key = f"dataset.eval_sets.{name}{suffix}"
                    found.add(ConfigError(f"{problem}; choose another one", key=key))
    found.raise_any()


def _check_metrics(config: ExperimentConfig) -> None:
    # Before hours of preparing; what the data has held out is looked at once it is there.
    sets = _held_out_sets(config)
    others = list(config.dataset.eval_sets)
    known, results = dict.fromkeys([*others, *sets], True), results_of(config.train_module)
    check_metrics_in(known, config.trainer, others, results=results)


def _check_averages(config: ExperimentConfig) -> None:
    has_average = config.train_module.optim.traits().keeps_average
    if config.trainer.callbacks.ema.enabled and has_average:
        raise ConfigError(TWO_AVERAGES, key="trainer.callbacks.ema.enabled")


def _check_adapter(config: ExperimentConfig) -> None:
    trainer = config.trainer
    if config.train_module.lora is not None and (
        trainer.load_path is None or trainer.load_strategy == "never"
    ):
        raise ConfigError(NO_BASE, about=("train_module.lora", *LOADING))


def check_corpus(config: ExperimentConfig, corpus: CorpusInfo, ranks: int = 1) -> None:
    """Check that `config` can train on this data over `ranks` data-parallel ranks, as far as
    manifests tell."""
    is_endless = corpus.rows is None and not corpus.parts
    for name in ("max_duration", "hard_stop"):
        limit = getattr(config.trainer, name)
        if is_endless and limit is not None and limit.unit == "epochs":
            raise ConfigError(
                f"trainer.{name}: {corpus.where} does not say how long an epoch is; use steps or "
                "tokens, or give the class __len__"
            )
    check_objective_data(config, corpus)
    if corpus.vocab_size is not None:
        require_ids(corpus.where, corpus.vocab_size, config.model.vocab_size)
    largest = max(config.data.phases, key=lambda phase: phase.batch_instances).batch_instances
    instances = corpus.epoch_instances(config.data)
    if instances is not None and instances < largest:
        batch, rows = largest * config.dataset.sequence_length, corpus.rows or []
        have = ", ".join(
            f"{count(number, 'instance')} of {length} tokens" for length, number in rows
        )
        needs = f", and needs {batch // rows[0][0]:,}" if len(rows) == 1 else ""
        flags = shlex.join(sizes_that_fit(config, instances, ranks))
        advice = f"these fit: {flags}" if flags else "make one of the two smaller"
        raise DataError(
            f"{corpus.where}: not enough data for one batch: {have or 'no instances'} "
            f"({SEQUENCE} {config.dataset.sequence_length}), {GLOBAL_BATCH} is {batch}{needs}; "
            f"{advice}, or give more text"
        )


def batches_of(config: ExperimentConfig, corpus: CorpusInfo | None) -> Batches:
    """The batches of a run from its beginning, as far as manifests tell."""
    instances = corpus.epoch_instances(config.data) if corpus is not None else None
    return planned_batches(config.data, instances)


def rank_microbatch_size(config: ExperimentConfig, world_size: int) -> int:
    """Tokens per forward on one rank: the configured number, or the rank's share of a batch."""
    configured = config.train_module.rank_microbatch_size
    return configured or config.data_loader.first_batch_size // world_size


def gradient_accumulation_steps(
    config: ExperimentConfig, world_size: int, batch: int | None = None
) -> int:
    """Forward and backward passes per optimizer step on one rank, for a global batch of `batch`
    tokens; default: the first."""
    microbatch = config.train_module.rank_microbatch_size
    if microbatch is None:
        return 1
    return (batch or config.data_loader.first_batch_size) // (microbatch * world_size)


def _check_sequence(config: ExperimentConfig) -> None:
    length, longest = config.dataset.sequence_length, config.model.max_sequence_length
    if length > longest:
        key = "n_positions" if config.model.to_dict()["type"] == "gpt" else "max_sequence_length"
        raise ConfigError(
            f"{SEQUENCE} {length} is longer than model.{key} {longest}; "
            f"use {longest} or less, or raise model.{key}",
            about=(SEQUENCE, f"model.{key}"),
        )


def _check_vocabulary(config: ExperimentConfig) -> None:
    tokenizer, needed = config.dataset.tokenizer, 0
    if isinstance(tokenizer, ByteTokenizerConfig):
        needed = BYTE_VOCAB_SIZE
    elif isinstance(tokenizer, BPETokenizerConfig):
        needed = tokenizer.vocab_size
    if needed > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size {config.model.vocab_size} is too small for dataset.tokenizer, "
            f"which has {needed} ids; set model.vocab_size to {needed} or more",
            about=("dataset.tokenizer", "model.vocab_size"),
        )


def _check_batches(config: ExperimentConfig, world_size: int) -> None:
    sequence, loader, found = config.dataset.sequence_length, config.data_loader, ErrorList()
    microbatch = config.train_module.rank_microbatch_size
    ranks, per_sequence = count(world_size, "rank"), f"{SEQUENCE} {sequence}"
    sizes = list(zip(loader.batch_size_keys, loader.batch_sizes, strict=True))
    for key, (_, batch) in sizes:
        unit = sequence * world_size
        found.ask(_check_multiple, key, batch, unit, f"{per_sequence} x {ranks}")
    largest = max(batch for _, (_, batch) in sizes)
    found.ask(config.train_module.check_graphs, largest // world_size)
    if microbatch is not None:
        found.ask(_check_multiple, MICROBATCH, microbatch, sequence, per_sequence)
        if not found.errors:
            for key, (_, batch) in sizes:
                found.ask(_check_accumulation, key, batch, microbatch, sequence, world_size)
    evaluation = config.data_loader.eval_batch_size
    if evaluation is not None:
        key = "data_loader.eval_batch_size"
        found.ask(_check_multiple, key, evaluation, sequence, per_sequence)
    found.raise_any()


def _check_accumulation(
    key: str, batch: int, microbatch: int, sequence: int, world_size: int
) -> None:
    unit, ranks = microbatch * world_size, count(world_size, "rank")
    if batch % unit:
        works = _around(batch // (sequence * world_size), microbatch // sequence)
        raise ConfigError(
            f"{key} {batch} is not divisible by {MICROBATCH} {microbatch} x {ranks} "
            f"= {unit}; nearest that work: {key} {_nearest_multiples(batch, unit)}, "
            f"or {MICROBATCH} {' or '.join(str(n * sequence) for n in works)}",
            about=(key, MICROBATCH),
        )


def _check_multiple(key: str, value: int, unit: int, meaning: str) -> None:
    if value % unit:
        product = f" = {unit}" if " x " in meaning else ""
        raise ConfigError(
            f"{key} {value} is not divisible by {meaning}{product}; "
            f"nearest that work: {_nearest_multiples(value, unit)}",
            about=(key, SEQUENCE),
        )


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _around(number: int, near: int) -> list[int]:
    """The divisors of `number` next to `near`, one below and one above it; where they are far away,
    what is easily found."""
    start = min(near - 1, number)
    below = (n for n in range(start, max(0, start - _FAR), -1) if number % n == 0)
    above = (n for n in range(near + 1, min(number, near + _FAR) + 1) if number % n == 0)
    return [next(below, 1), *([n] if (n := next(above, None)) else [])]

"""What a model's own files tell about it, for its card: nothing is guessed."""

import contextlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.secrets import mask_secrets
from toolkit.data.config import (
    DatasetConfig,
    DiskSourceConfig,
    FilesSourceConfig,
    HubSourceConfig,
    MixSourceConfig,
    SourceConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.data.tokens.prepared import read_prepared
from toolkit.errors import ToolkitError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.recorded import config_of, engine_of, versions_of
from toolkit.experiment.sources import FINETUNE_FILE
from toolkit.hf.model_card import OLDEST, ModelCard
from toolkit.hf.source import ModelSource
from toolkit.metrics.lines import read_records
from toolkit.runs.facts import RunFacts, run_facts
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import RunStatus, read_status
from toolkit.wording import count

_COMMAND = ("train", "resume")
_MOST_PATHS = 8
_HUB_FILE = re.compile(
    r"(?:hf://datasets/|https://huggingface\.co/datasets/)([\w.-]+/[\w.-]+?)(?:@[^/]+)?/"
)
"""Begins the path of a file of a data set on the hub."""


class _Line(msgspec.Struct):
    """What a card needs of a line of metrics."""

    step: int
    name: str = ""
    loss: float | str | None = None
    ppl: float | str | None = None
    bits_per_byte: float | str | None = None
    accuracy: float | str | None = None


def card_of(
    source: ModelSource,
    *,
    architecture: str,
    dtype: str,
    merged: bool,
    only_newer: str | None,
) -> ModelCard:
    """The card of what is exported from `source`: as the class `architecture` of `transformers`,
    which may need a newer version (`Family.only_newer`); of an adapter alone unless `merged`."""
    run = source.run
    status = read_status(run) if run is not None else None
    facts = run_facts(run) if run is not None and status is not None else None
    config = None
    if run is not None and status is not None:
        with contextlib.suppress(ToolkitError):
            config = config_of(run, status.attempt)
    folder = source.run or (source.checkpoint.parent if source.checkpoint else source.hf_folder)
    title = f"{status.experiment}/{status.name}" if status else (folder or Path()).resolve().name
    tokenizer = load_tokenizer(source.tokenizer_folder) if source.tokenizer_folder else None
    origin = source.origin
    return ModelCard(
        title=title,
        description=_description(facts, config),
        is_adapter=source.lora is not None and not merged,
        base_model=source.hub_name,
        license=origin.get("license"),
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        datasets=hub_data_sets(config.dataset) if config else [],
        model=_model(source, architecture, dtype),
        training=_training(source, config, status),
        results=_results(source),
        command=_command(facts.command if facts is not None else {}),
        versions=_versions(source, status),
        needs=OLDEST if only_newer is None else f"transformers 5 or newer ({only_newer})",
        has_tokenizer=tokenizer is not None,
        has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
    )


def _description(facts: RunFacts | None, config: ExperimentConfig | None) -> str:
    """What whoever trained it wrote. A recipe's own line, or that of a converted model's config,
    was written before anyone knew the data."""
    if facts is None or config is None:
        return ""
    origin = facts.origins.get("description", "recipe")
    if origin.startswith("recipe") or FINETUNE_FILE in origin:
        return ""
    return str(mask_secrets(config.description))


def _model(source: ModelSource, architecture: str, dtype: str) -> dict[str, str]:
    transformer = source.config.to_transformer()
    # Padding rows are not exported.
    rows = transformer.replace(vocab_multiple=1)
    sizes = f"{rows.num_parameters:,}"
    if transformer.moe is not None:
        sizes += f", of which a token uses {rows.num_active_parameters:,}"
    return {
        "Architecture": architecture,
        "Parameters": sizes,
        "Layers x width": f"{transformer.num_layers} x {transformer.d_model}",
        "Vocabulary": f"{transformer.vocab_size:,}",
        "Longest sequence": f"{transformer.max_sequence_length:,} tokens",
        "Weights": dtype,
    }


def _sizes(values: Sequence[tuple[int, int]], tokens: int) -> str:
    """Of those that begin before `tokens` are trained on."""
    begun = [(start, size) for start, size in values if start < tokens]
    since = (f" after {count(start, 'token')}" if start else "" for start, _ in begun)
    sizes = (count(size, "token") for _, size in begun)
    return ", ".join(size + place for size, place in zip(sizes, since, strict=True))


def _training(
    source: ModelSource, config: ExperimentConfig | None, status: RunStatus | None
) -> dict[str, str]:
    metadata, rows = source.metadata, {}
    if name := source.origin.get("name"):
        rows["Started from"] = str(name)
    if metadata is None or metadata.step == 0:
        return rows
    rows["Length"] = f"{metadata.step:,} steps, {metadata.tokens:,} tokens"
    if config is not None:
        dataset, module = config.dataset, config.train_module
        rows["Data"] = data_words(dataset)
        lengths = config.data_loader.sequence_lengths(dataset.sequence_length)
        rows["Sequence length"] = _sizes(lengths, metadata.tokens)
        rows["Batch"] = _sizes(config.data_loader.batch_sizes, metadata.tokens)
        rows["Optimizer"] = _settings(msgspec.to_builtins(module.optim))
        schedule = msgspec.to_builtins(module.scheduler)
        if module.scheduler.decay_span(1) is None:
            del schedule["decay_shape"]
        rows["Schedule"] = _settings(schedule)
        rows["Clipped gradient norm"] = f"{module.max_grad_norm:g}" if module.max_grad_norm else ""
        rows["Not trained"] = ", ".join(f"`{pattern}`" for pattern in module.freeze)
        rows["Seed"] = str(config.seed)
    elif optim := metadata.extra.get("optim"):
        rows["Optimizer"] = _settings(optim)
    if source.lora is not None:
        rows["Adapter"] = _settings({"type": "LoRA", **msgspec.to_builtins(source.lora)})
    engine = engine_of(source.run, status.attempt) if source.run and status else None
    machine = f"{metadata.engine} x {metadata.world_size}"
    if engine is not None and f"{engine.name} x {engine.world_size}" == machine:
        machine = f"{engine} ({engine.device})"
    rows["Engine x processes"] = machine
    return {name: value for name, value in rows.items() if value}


def _settings(values: Mapping[str, Any]) -> str:
    """`adamw, lr 0.003, betas 0.9 0.95`."""
    words = [str(values.get("type", ""))]
    for name, value in values.items():
        if name == "type" or value is None or value in ((), [], {}, 0):
            continue
        if isinstance(value, list | tuple) and all(not isinstance(v, dict) for v in value):
            words.append(f"{name} {' '.join(map(str, value))}")
        elif isinstance(value, dict):
            words.append(f"{name} {_settings(value)}")
        elif not isinstance(value, list | tuple):
            words.append(f"{name} {value}")
    return ", ".join(word for word in words if word)


def _results(source: ModelSource) -> dict[str, str]:
    """Training loss of the checkpoint's step, and the newest evaluation up to it."""
    if source.metadata is None:
        return {}
    step, rows = source.metadata.step, {}
    if source.run is not None:
        for line in _newest(source.run / RUN_FILES.train_metrics, step):
            if line.step == step:
                rows["Training loss (last batch)"] = _scores(line)
        for line in _newest(source.run / RUN_FILES.eval_metrics, step):
            when = "" if line.step == step else f" at step {line.step:,}"
            rows[f"Evaluation `{line.name}`{when}"] = _scores(line)
    elif source.metadata.scores:
        for name, value in source.metadata.scores.items():
            rows[f"Evaluation `{name}`"] = f"{value:.4f}"
    return {name: value for name, value in rows.items() if value}


def _newest(path: Path, step: int) -> list[_Line]:
    """The lines of the last recorded step that is not after `step`."""
    found: dict[str, _Line] = {}
    for line in read_records(path, _Line):
        if line.step <= step:
            same = {name: old for name, old in found.items() if old.step == line.step}
            found = same | {line.name: line}
    return list(found.values())


def _scores(line: _Line) -> str:
    names = {"loss": "loss", "ppl": "perplexity", "bits_per_byte": "bits per byte"}
    values = {name: getattr(line, name) for name in (*names, "accuracy")}
    return ", ".join(
        f"{names.get(name, name)} {f'{value:.4f}' if isinstance(value, float) else value}"
        for name, value in values.items()
        if value is not None
    )


def _command(recorded: Mapping[str, Any]) -> str | None:
    """The command line of the newest attempt, whose secrets were masked when it was recorded."""
    argv = recorded.get("argv")
    if isinstance(argv, list) and len(argv) > 1 and argv[1] in _COMMAND:
        return shlex.join(["toolkit", *(str(word) for word in argv[1:])])
    return None


def _versions(source: ModelSource, status: RunStatus | None) -> dict[str, str]:
    if source.metadata is None or source.metadata.step == 0:
        return {}
    found: Mapping[str, Any] = source.metadata.extra.get("versions") or {}
    if source.run is not None and status is not None:
        found = versions_of(source.run, status.attempt) or found
    return {name: str(version) for name, version in found.items() if version}


def data_words(dataset: DatasetConfig) -> str:
    if dataset.custom is not None:
        return f"`{dataset.custom.target}`"
    name = f"{dataset.dataset_name}/{dataset.dataset_config}"
    if dataset.mix is None:
        source = source_of(dataset)
        return _words(source) if source is not None else f"token files {name}"
    sources = dataset.mix.sources
    total = sum(source.ratio for source in sources.values())
    parts = [f"{n} {s.ratio / total:.1%}: {_words_of_mixed(s, n)}" for n, s in sources.items()]
    return f"a mixture of {'; '.join(parts)}"


def hub_data_sets(dataset: DatasetConfig) -> list[str]:
    """Names on the hub of what the sources name, once each: data sets, and files of them."""
    sources = [source_of(dataset)]
    if dataset.mix is not None:
        sources = [part.source for part in _leaves(dataset.mix.sources)]
    names: list[str] = []
    for source in sources:
        if isinstance(source, HubSourceConfig) and not Path(source.name).exists():
            names.append(source.name)
        elif isinstance(source, FilesSourceConfig | TokenFilesSourceConfig):
            names += [found[1] for path in source.paths if (found := _HUB_FILE.match(path))]
    return list(dict.fromkeys(names))


def source_of(dataset: DatasetConfig) -> SourceConfig | None:
    """What the config says, else what the token files remember of a data set on the hub."""
    if dataset.source is not None:
        return dataset.source
    with contextlib.suppress(ToolkitError, msgspec.ValidationError, AttributeError):
        prepared = read_prepared(dataset)
        kept = prepared.manifest.settings.get("source") if prepared is not None else None
        return msgspec.convert(kept, HubSourceConfig)
    return None


def _leaves(sources: dict[str, MixSourceConfig]) -> Iterator[MixSourceConfig]:
    for source in sources.values():
        if isinstance(source.mix, dict):
            yield from _leaves(source.mix)
        else:
            yield source


def _words_of_mixed(source: MixSourceConfig, name: str) -> str:
    if isinstance(source.mix, dict):
        inner = "; ".join(f"{part}: {_words_of_mixed(s, part)}" for part, s in source.mix.items())
        return f"a mixture ({inner})"
    if source.mix is not None:
        return f"the mixture {source.mix}"
    if source.source is None:
        return f"token files {source.dataset_name or name}"
    return _words(source.source)


def _words(source: Any) -> str:
    match source:
        case HubSourceConfig():
            config = f" ({source.config})" if source.config else ""
            return f"{source.name}{config}, {source.split}"
        case FilesSourceConfig() | TokenFilesSourceConfig():
            shown = [f"`{mask_secrets(path)}`" for path in source.paths[:_MOST_PATHS]]
            more = len(source.paths) - len(shown)
            return ", ".join([*shown, *([f"and {more} more"] if more else [])])
        case DiskSourceConfig():
            return f"`{mask_secrets(source.path)}`, {source.split}"
    return "the standard library of Python"

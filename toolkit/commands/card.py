"""What a model's own files tell about it, for its card: nothing is guessed."""

import contextlib
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.defaults import differing
from toolkit.config.references import names_in
from toolkit.config.secrets import mask_secrets
from toolkit.config.types import join
from toolkit.config.yaml_text import dump_yaml
from toolkit.data.config import (
    BPETokenizerConfig,
    DatasetConfig,
    DiskSourceConfig,
    FilesSourceConfig,
    HFTokenizerConfig,
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
from toolkit.experiment.sources import FINETUNE_FILE, recipe_names
from toolkit.hf.export import generation_of
from toolkit.hf.model_card import OLDEST, ModelCard, scoring_of
from toolkit.hf.source import ModelSource
from toolkit.metrics.lines import read_records
from toolkit.models.parameters import parameter_shapes
from toolkit.runs.facts import RunFacts, run_facts
from toolkit.runs.files import RUN_FILES
from toolkit.runs.status import RunStatus, read_status
from toolkit.wording import count

_COMMAND = ("train", "resume")
_MOST_PATHS = 8
_OF_THE_MACHINE = (
    *("description", "run.", "store.", "dataset.root", "dataset.source", "dataset.num_processes"),
    *("trainer.callbacks.", "trainer.load_path", "data_loader.num_workers"),
)
"""How paths of a config begin that say nothing of the model, or are told by a row of their own."""
_DEFAULT: Any = object()
"""Stands for a value that is left out."""
_HUB_FILE = re.compile(
    r"(?:hf://datasets/|https://huggingface\.co/datasets/)([\w.-]+/[\w.-]+?)(?:@[^/]+)?/"
)
"""Begins the path of a file of a data set on the hub."""


class _Line(msgspec.Struct):
    """What a card needs of a line of metrics."""

    step: int
    name: str = ""
    loss: float | str | None = None
    epoch: float | str | None = None
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
    tells_all = facts is not None and _tells_all(facts)
    appends_end = config is None or config.dataset.append_eos
    scored = tokenizer, generation_of(source), source.config.vocab_size
    return ModelCard(
        title=title,
        description=_description(facts, config),
        is_adapter=source.lora is not None and not merged,
        base_model=source.hub_name,
        base_name=source.base_name if source.lora is not None and not merged else None,
        license=origin.get("license"),
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        datasets=hub_data_sets(config.dataset) if config else [],
        model=_model(source, architecture, dtype, merged=merged),
        training=_training(source, config, status, facts.command if facts is not None else {}),
        results=_results(source),
        command=None if facts is None or not tells_all else _command(facts.command),
        config="" if config is None or tells_all else _config_text(config),
        versions=_versions(source, status),
        needs=OLDEST if only_newer is None else f"transformers 5 or newer ({only_newer})",
        has_tokenizer=tokenizer is not None,
        has_chat_template=tokenizer is not None and tokenizer.chat_template is not None,
        scoring=scoring_of(*scored, append_eos=appends_end),
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


def _model(source: ModelSource, architecture: str, dtype: str, *, merged: bool) -> dict[str, str]:
    transformer = source.config.to_transformer()
    # Padding rows are not exported.
    rows = transformer.replace(vocab_multiple=1)
    sizes = f"{rows.num_parameters:,}"
    if transformer.moe is not None:
        sizes += f", of which a token uses {rows.num_active_parameters:,}"
    base = ""
    if source.lora is not None and not merged:
        shapes = parameter_shapes(transformer, source.lora)
        adapter = sum(math.prod(shape) for name, shape in shapes.items() if ".lora_" in name)
        sizes = f"{adapter:,} of the adapter, beside {sizes} of its base"
        base = source.hub_name or f"{source.base_name or 'a model'}, which is not on the hub"
    elif rows.num_parameters != transformer.num_parameters:
        sizes += (
            f" ({transformer.num_parameters:,} in training, which pads the vocabulary to a "
            f"multiple of {transformer.vocab_multiple})"
        )
    found = {
        "Architecture": architecture,
        "Base": base,
        "Parameters": sizes,
        "Layers x width": f"{transformer.num_layers} x {transformer.d_model}",
        "Vocabulary": f"{transformer.vocab_size:,}",
        "Longest sequence": f"{transformer.max_sequence_length:,} tokens",
        "Weights": dtype,
    }
    return {name: value for name, value in found.items() if value}


def _sizes(values: Sequence[tuple[int, int]], tokens: int) -> str:
    """Of those that begin before `tokens` are trained on."""
    begun = [(start, size) for start, size in values if start < tokens]
    since = (f" after {count(start, 'token')}" if start else "" for start, _ in begun)
    sizes = (count(size, "token") for _, size in begun)
    return ", ".join(size + place for size, place in zip(sizes, since, strict=True))


def _training(
    source: ModelSource,
    config: ExperimentConfig | None,
    status: RunStatus | None,
    command: Mapping[str, Any],
) -> dict[str, str]:
    metadata, rows = source.metadata, {}
    if name := source.origin.get("name"):
        rows["Started from"] = str(name)
    if metadata is None or metadata.step == 0:
        return rows
    rows["Length"] = f"{metadata.step:,} steps, {metadata.tokens:,} tokens{_epochs(source)}"
    if config is not None:
        dataset, module = config.dataset, config.train_module
        # A resume stores paths in full: they are shown as from where the run was started.
        rows["Data"] = data_words(dataset).replace(f"`{command.get('cwd', '')}/", "`")
        rows["Tokenizer"] = _tokenizer(dataset)
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
        rows["Adapter"] = _settings(
            {"type": "DoRA" if source.lora.dora else "LoRA", **msgspec.to_builtins(source.lora)}
        )
    engine = engine_of(source.run, status.attempt) if source.run and status else None
    machine = f"{metadata.engine} x {metadata.world_size}"
    if engine is not None and f"{engine.name} x {engine.world_size}" == machine:
        machine = f"{engine} ({engine.device})"
    rows["Engine x processes"] = machine
    return {name: value for name, value in rows.items() if value}


def _epochs(source: ModelSource) -> str:
    """How often the data was gone through, by the metrics."""
    assert source.metadata is not None
    step, tokens = source.metadata.step, source.metadata.tokens
    lines = _newest(source.run / RUN_FILES.train_metrics, step) if source.run is not None else []
    for line in lines:
        if line.step == step and isinstance(line.epoch, float) and line.epoch > 0:
            once = f", each of about {tokens / line.epoch:,.0f} tokens" if line.epoch > 1 else ""
            return f" ({line.epoch:.2f} epochs{once})"
    return ""


def _tokenizer(dataset: DatasetConfig) -> str:
    match dataset.tokenizer:
        case BPETokenizerConfig(vocab_size=size):
            return f"BPE of {size:,} ids, trained on the data"
        case HFTokenizerConfig(path=path):
            return f"`{Path(str(mask_secrets(path))).name}`"
        case None:
            return ""
        case other:
            return f"{other.to_dict()['type']}"


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


def _tells_all(facts: RunFacts) -> bool:
    """Whether the run's first command says what was trained: of a recipe, which comes along, and
    never changed since."""
    argv = facts.command.get("argv")
    if not isinstance(argv, list) or argv[1:2] != ["train"] or argv[2:3] == []:
        return False
    changed = any(len(resume.get("argv", [])) > 3 for resume in facts.resumes)
    names_variables = any(names_in(str(word)) for word in argv)
    return argv[2] in recipe_names() and not changed and not names_variables


def _config_text(config: ExperimentConfig) -> str:
    """What is not the default and tells how the model came to be: no places, no callbacks."""
    wanted = {path for path in differing(config) if not path.startswith(_OF_THE_MACHINE)}

    def kept(value: Any, path: str) -> Any:
        if isinstance(value, dict) and value:
            inner = {name: kept(one, join(path, name)) for name, one in value.items()}
            return {name: one for name, one in inner.items() if one is not _DEFAULT} or _DEFAULT
        is_given = path in wanted or any(other.startswith(f"{path}.") for other in wanted)
        return value if is_given else _DEFAULT

    return dump_yaml(mask_secrets(kept(config.to_dict(), "")))


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

"""What a model was trained on, in words for its card: sources as they were given."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.secrets import mask_secrets
from toolkit.data.config import (
    DatasetConfig,
    DiskSourceConfig,
    FilesSourceConfig,
    HubSourceConfig,
    SourceConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.order.config import MixSourceConfig
from toolkit.data.tokens.prepared import read_prepared
from toolkit.errors import ToolkitError

_MOST_PATHS = 8


def data_words(dataset: DatasetConfig) -> str:
    """Every source in a line; of files the paths, of mixtures the shares."""
    if dataset.custom is not None:
        return f"`{dataset.custom.target}`"
    name = f"{dataset.dataset_name}/{dataset.dataset_config}"
    if dataset.mix is None:
        source = source_of(dataset)
        return _words(source) if source is not None else f"token files {name}"
    total = sum(source.ratio for source in dataset.mix.sources.values())
    parts = [
        f"{part} {source.ratio / total:.1%}: {_words_of_mixed(source, part)}"
        for part, source in dataset.mix.sources.items()
    ]
    return f"a mixture of {'; '.join(parts)}"


def hub_data_sets(dataset: DatasetConfig) -> list[str]:
    """Names on the hub of everything that was trained on."""
    sources = (
        [source_of(dataset)]
        if dataset.mix is None
        else [part.source for part in _leaves(dataset.mix.sources)]
    )
    names = [source.name for source in sources if isinstance(source, HubSourceConfig)]
    return list(dict.fromkeys(name for name in names if not Path(name).exists()))


def source_of(dataset: DatasetConfig) -> SourceConfig | None:
    """Where the text came from: what the config says, else what the token files remember of a data
    set on the hub; None: it is not known."""
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

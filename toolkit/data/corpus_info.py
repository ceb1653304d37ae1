"""What training data there is, told from manifests in a millisecond, and made where it is missing.

Nothing here needs torch, and nothing but `prepare_corpus` writes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from toolkit.data.config import DataConfig, DatasetConfig, MixSourceConfig, SourceConfig
from toolkit.data.tokens.prepared import PreparedDataset, Split, dataset_folder, read_prepared


class CorpusInfo(NamedTuple):
    """What is known of training data without opening it."""

    parts: dict[str, tuple[DatasetConfig, PreparedDataset]]
    """Token files by the name of their source in the mixture, or under "" where there is one
    corpus; none of a custom data set."""
    rows: list[tuple[int, int]] | None
    """(length in tokens, number) of the training rows of one pass; None where that is not known
    yet."""
    instances: dict[str, int]
    """Training instances of each part, where they are known."""
    vocab_size: int | None
    """Every id is below this; None where a custom data set does not say."""
    where: str
    """For messages: the folder, or what stands for it."""

    def num_tokens(self, split: Split) -> int:
        """Tokens of the split in all parts."""
        return sum(prepared.num_tokens(split) for _, prepared in self.parts.values())

    def epoch_end(self, config: DataConfig, epochs: int) -> int | None:
        """Number of batches of one size until `epochs` passes are done; None where that is not
        known yet."""
        per_epoch = self.steps_per_epoch(config)
        if per_epoch is None or config.dataset.mix is None:
            return None if per_epoch is None else per_epoch * epochs
        # Batches of a mixture go across passes.
        assert self.rows is not None
        size = config.data_loader.global_batch_size // config.dataset.sequence_length
        return epochs * sum(number for _, number in self.rows) // size

    def steps_per_epoch(self, config: DataConfig) -> int | None:
        """Whole global batches in one pass; None where that is not known yet."""
        if self.rows is None:
            return None
        tokens = config.data_loader.global_batch_size
        return sum(number // max(1, tokens // length) for length, number in self.rows)


def prepare_corpus(
    cfg: DataConfig,
    *,
    work_dir: str | None = None,
    progress: bool = True,
    check_text: bool = True,
) -> CorpusInfo:
    """Make what is missing: token files of every source, and the plans of their instances.

    Many processes may call this at once: one prepares, the others wait. Arguments as for
    `ensure_prepared`.

    Raises:
        ConfigError, DataError: text, tokenizer, mixture or existing files cannot be used.
    """
    if cfg.dataset.custom is not None:
        return _custom_info(cfg)
    from toolkit.data.prepare.build.mix import prepare_data

    parts = prepare_data(cfg, work_dir=work_dir, progress=progress, check_text=check_text)
    return _info(cfg, parts)


def read_corpus(cfg: DataConfig) -> CorpusInfo | None:
    """What there is already; None when token files are missing. Prepares nothing.

    Raises:
        ConfigError, DataError: what is there is damaged, or the mixture makes no sense.
    """
    from toolkit.data.prepare.store.store import localize

    dataset = localize(cfg.dataset, cfg.store)
    if dataset.custom is not None:
        return _custom_info(cfg)
    if dataset.mix is not None:
        from toolkit.data.prepare.build.mix import as_prepared

        configs = {source.name: source.dataset for source in as_prepared(dataset)}
    else:
        configs = {"": dataset}
    parts = {}
    for name, config in configs.items():
        prepared = read_prepared(config)
        if prepared is None:
            return None
        parts[name] = (config, prepared)
    return _info(cfg, parts)


def data_places(cfg: DataConfig) -> list[Path]:
    """Folders where the token files of `cfg` are, or will be."""
    return [dataset_folder(dataset) for dataset in datasets_of(cfg)]


def datasets_of(cfg: DataConfig) -> list[DatasetConfig]:
    """The corpora of token files that `cfg` trains on: one, those of a mixture, or none."""
    from toolkit.data.prepare.store.store import localize

    dataset = localize(cfg.dataset, cfg.store)
    if dataset.custom is not None:
        return []
    if dataset.mix is None:
        return [dataset]
    from toolkit.data.order.resolve import resolve_mix

    return [source.dataset for source in resolve_mix(dataset)]


ChangeSource = Callable[[SourceConfig | None], SourceConfig | None]


def without_sources(dataset: DatasetConfig) -> DatasetConfig:
    """`dataset` that takes token files as they are, wherever their text is now."""
    return with_sources(dataset, lambda source: None)


def with_sources(dataset: DatasetConfig, change: ChangeSource) -> DatasetConfig:
    """`dataset` with what `change` makes of every source."""
    if dataset.mix is not None:
        sources = _changed(dataset.mix.sources, change)
        return dataset.replace(mix=dataset.mix.replace(sources=sources))
    return dataset.replace(source=change(dataset.source))


def _changed(
    sources: dict[str, MixSourceConfig], change: ChangeSource
) -> dict[str, MixSourceConfig]:
    return {
        name: source.replace(mix=_changed(source.mix, change))
        if isinstance(source.mix, dict)
        else source.replace(source=change(source.source))
        for name, source in sources.items()
    }


def _info(cfg: DataConfig, parts: dict[str, tuple[DatasetConfig, PreparedDataset]]) -> CorpusInfo:
    rows = {name: _rows(config, prepared) for name, (config, prepared) in parts.items()}
    known = {name: found for name, found in rows.items() if found is not None}
    instances = {name: sum(number for _, number in found) for name, found in known.items()}
    total = None
    if len(known) == len(parts):
        total = [row for found in known.values() for row in found]
        if cfg.dataset.mix is not None:
            from toolkit.data.order.resolve import limited_instances

            total = [(cfg.dataset.sequence_length, limited_instances(cfg.dataset, instances))]
    folders = [str(prepared.folder) for _, prepared in parts.values()]
    where = folders[0] if len(folders) == 1 else f"mixture of {', '.join(parts)}"
    vocab_size = max(prepared.vocab_size for _, prepared in parts.values())
    return CorpusInfo(parts, total, instances, vocab_size, where)


def _rows(config: DatasetConfig, prepared: PreparedDataset) -> list[tuple[int, int]] | None:
    from toolkit.data.instances.open import count_rows

    return count_rows(prepared, "train", config)


def _custom_info(cfg: DataConfig) -> CorpusInfo:
    from toolkit.data.instances.custom import UNKNOWN_LENGTH, open_custom

    assert cfg.dataset.custom is not None
    instances = open_custom(cfg.dataset.custom, "train", cfg.dataset.sequence_length)
    assert instances is not None
    number = instances.num_instances
    rows = [(cfg.dataset.sequence_length, number)] if number != UNKNOWN_LENGTH else None
    return CorpusInfo({}, rows, {}, instances.vocab_size, cfg.dataset.custom.target)

"""Token files for all that a `DataConfig` names: one corpus, or every source of a mixture, which
have one tokenizer."""

import contextlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from toolkit.data.config import (
    BPETokenizerConfig,
    DataConfig,
    DatasetConfig,
    HFTokenizerConfig,
    StoreConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.corpus_info import CorpusInfo, check_same_tokens, corpus_info, custom_info
from toolkit.data.instances.open import ensure_plans
from toolkit.data.order.resolve import ResolvedSource, resolve_mix, resolve_schedule
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.build.settings import check_settings, settings_of
from toolkit.data.prepare.build.vocabulary import sample_texts
from toolkit.data.prepare.store.cache import raw_text_cache
from toolkit.data.prepare.text.sources import plan_source
from toolkit.data.prepare.tokenizers.companions import TOKENIZER_FILE
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_bpe
from toolkit.data.tokens.prepared import PreparedDataset, localize
from toolkit.errors import ConfigError, DataError
from toolkit.storage.atomic import new_folder
from toolkit.storage.locks import locked

TOKENIZERS_FOLDER = ".mix-tokenizers"
"""Below the root of token files: tokenizers that were trained for mixtures."""


def prepare_corpus(
    cfg: DataConfig,
    *,
    work_dir: str | None = None,
    progress: bool = True,
    check_text: bool = True,
) -> CorpusInfo:
    """Make what is missing: token files of every source, and the plans of their instances.

    Many processes may call this at once: one prepares, the others wait. Arguments and errors as for
    `ensure_prepared`.
    """
    if cfg.dataset.custom is not None:
        return custom_info(cfg)
    options: dict[str, Any] = {
        "store": cfg.store, "work_dir": work_dir, "progress": progress, "check_text": check_text,
    }  # fmt: skip
    dataset = localize(cfg.dataset, cfg.store)
    if dataset.mix is None:
        parts = {"": (dataset, ensure_prepared(dataset, **options))}
    else:
        parts = {
            source.name: (source.dataset, prepared)
            for source, prepared in ensure_mix_prepared(dataset, **options)
        }
    for config, prepared in parts.values():
        ensure_plans(prepared, config)
    return corpus_info(cfg, parts)._replace(is_ready=True)


def check_corpus_settings(cfg: DataConfig, info: CorpusInfo) -> None:
    """Check that the token files that are there were built with the settings of `cfg`; an error
    names the first setting that differs."""
    dataset = localize(cfg.dataset, cfg.store)
    sources = {} if dataset.mix is None else {s.name: s.dataset for s in as_prepared(dataset)}
    for name, (config, prepared) in info.parts.items():
        check_settings(prepared, sources.get(name, config))


def ensure_mix_prepared(
    config: DatasetConfig,
    *,
    store: StoreConfig | None = None,
    work_dir: str | None = None,
    progress: bool = True,
    check_text: bool = True,
) -> list[tuple[ResolvedSource, PreparedDataset]]:
    """The prepared data sets of all sources of `config.mix`, sorted by name; those that do not
    exist yet are prepared now. Arguments as for `ensure_prepared`.

    A `bpe` tokenizer is trained once, on text of all sources in proportion to their shares, and
    then used for each as a tokenizer in a folder.

    Raises:
        ConfigError: the mixture makes no sense, or its sources have different tokenizers.
        DataError, StorageError: see `ensure_prepared`.
    """
    store = store or StoreConfig()
    config = localize(config, store)
    sources = resolve_mix(config)
    weights = _tokenizer_weights(config, sources)
    if weights:
        _ensure_tokenizer(config, sources, weights, store)
        sources = as_prepared(config)
    found = []
    for source in sources:
        with _named(source):
            prepared = ensure_prepared(
                source.dataset,
                store=store,
                work_dir=work_dir,
                progress=progress,
                check_text=check_text,
            )
        found.append((source, prepared))
    check_same_tokens({source.name: prepared for source, prepared in found})
    return found


@contextlib.contextmanager
def _named(source: ResolvedSource) -> Iterator[None]:
    """Errors say which source they are about."""
    try:
        yield
    except (ConfigError, DataError) as error:
        kind = DataError if isinstance(error, DataError) else ConfigError
        raise kind(f"dataset.mix: {source.name}: {error}") from error


def as_prepared(config: DatasetConfig) -> list[ResolvedSource]:
    """The sources of `config.mix` as their token files are made: with the tokenizer that is trained
    for this mixture in place of `bpe`. Makes nothing."""
    sources = resolve_mix(config)
    weights = _tokenizer_weights(config, sources)
    if not weights:
        return sources
    tokenizer = HFTokenizerConfig(path=str(_tokenizer_folder(config, sources, weights)))
    return [
        source._replace(dataset=source.dataset.replace(tokenizer=tokenizer)) for source in sources
    ]


def _tokenizer_weights(config: DatasetConfig, sources: list[ResolvedSource]) -> dict[str, Fraction]:
    """How much of each source the mixture's own tokenizer is trained on; none where it has no
    tokenizer of its own."""
    if not isinstance(config.tokenizer, BPETokenizerConfig):
        return {}
    without_text = [
        source.name
        for source in sources
        if isinstance(source.dataset.source, TokenFilesSourceConfig | None)
    ]
    if all(source.dataset.source is None for source in sources):
        return {}  # token files are taken with the tokenizer they were made with
    if without_text:
        raise ConfigError(
            f"dataset.tokenizer: bpe is trained on text, but {', '.join(without_text)} of "
            "dataset.mix holds none; give the tokenizer that made its tokens, as in {type: hf, "
            "path: DATA/tokenizer}"
        )
    return {
        source.name: max(segment.shares[source.name] for segment in resolve_schedule(config))
        for source in sources
    }


def _tokenizer_folder(
    config: DatasetConfig, sources: list[ResolvedSource], weights: dict[str, Fraction]
) -> Path:
    identity = [
        (
            source.name,
            str(weights[source.name]),
            source.dataset.dataset_name,
            source.dataset.dataset_config,
            settings_of(source.dataset),
        )
        for source in sources
    ]
    key = xxhash.xxh3_64_hexdigest(msgspec.json.encode(identity))
    return Path(config.root).expanduser() / TOKENIZERS_FOLDER / key


def _ensure_tokenizer(
    config: DatasetConfig,
    sources: list[ResolvedSource],
    weights: dict[str, Fraction],
    store: StoreConfig,
) -> None:
    folder = _tokenizer_folder(config, sources, weights)
    if (folder / TOKENIZER_FILE).is_file():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not (folder / TOKENIZER_FILE).is_file():
                tokenizer = _made_before(sources, folder.name, store)
                if tokenizer is None:
                    assert isinstance(config.tokenizer, BPETokenizerConfig)
                    num_bytes = config.tokenizer.sample_bytes / sum(weights.values())
                    sizes = {name: int(num_bytes * weight) for name, weight in weights.items()}
                    texts = _samples(sources, sizes, store)
                    tokenizer = train_bpe(texts, config.tokenizer.vocab_size)
                making = folder.with_name(f".{folder.name}.making")
                with new_folder(folder, unfinished=making) as unfinished:
                    tokenizer.save(unfinished)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot keep the mixture's tokenizer: "
            f"{error.strerror or error}"
        ) from error


def _made_before(
    sources: Sequence[ResolvedSource], key: str, store: StoreConfig
) -> Tokenizer | None:
    """The tokenizer `key`, from token files that were made with it (here or in the permanent
    store): their text may be gone."""
    for source in sources:
        as_it_is = source.dataset.replace(source=None)
        # What is there and damaged is reported when it is opened.
        with contextlib.suppress(DataError):
            prepared = ensure_prepared(as_it_is, store=store, progress=False, check_text=False)
            made_with = prepared.manifest.settings.get("tokenizer", {})
            folder = prepared.tokenizer_folder
            if folder is not None and Path(str(made_with.get("path", ""))).name == key:
                return load_tokenizer(folder)
    return None


def _samples(
    sources: Sequence[ResolvedSource], sizes: dict[str, int], store: StoreConfig
) -> Iterator[str]:
    for source in sources:
        dataset = source.dataset
        assert dataset.source is not None
        with _named(source), raw_text_cache(dataset, store) as cache_dir:
            plan = plan_source(
                dataset.source,
                dataset.validation_fraction,
                rows=dataset.instructions is not None,
                cache_dir=cache_dir,
            )
            yield from sample_texts(dataset, plan, sizes[source.name])

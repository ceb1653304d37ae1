"""Token files for all that a `DataConfig` names: one corpus, or every source of a mixture, which
have one tokenizer."""

import contextlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

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
from toolkit.data.corpus_info import (
    CorpusInfo,
    check_eval_sets,
    check_same_tokens,
    corpus_info,
    custom_info,
    eval_set_settings,
    eval_sets_of,
    source_settings,
)
from toolkit.data.instances.open import ensure_plans
from toolkit.data.order.resolve import ResolvedSource, resolve_mix, resolve_schedule
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.build.settings import check_settings, settings_of
from toolkit.data.prepare.build.vocabulary import plan_of_text, sample_texts
from toolkit.data.prepare.store.cache import raw_text_cache
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
        found = ensure_mix_prepared(dataset, **options)
        parts = {source.name: (source.dataset, prepared) for source, prepared in found}
    eval_parts = {}
    for name, config in _eval_sets(cfg, parts).items():
        with eval_set_settings(name):
            eval_parts[name] = (config, ensure_prepared(config, **options))
    for config, prepared in (*parts.values(), *eval_parts.values()):
        ensure_plans(prepared, config)
    info = corpus_info(cfg, parts)._replace(eval_parts=eval_parts, is_ready=True)
    check_eval_sets(info)
    return info


def _eval_sets(
    cfg: DataConfig, parts: dict[str, tuple[DatasetConfig, PreparedDataset]]
) -> dict[str, DatasetConfig]:
    """As their token files are made: with the tokenizer of the training data where that was trained
    on it, or is taken as it is."""
    dataset, sets = cfg.dataset, eval_sets_of(cfg)
    is_given = not isinstance(dataset.tokenizer, BPETokenizerConfig) and (
        dataset.source is not None or dataset.mix is not None
    )
    folder = next(iter(parts.values()))[1].tokenizer_folder
    if is_given or folder is None:
        return sets
    tokenizer = HFTokenizerConfig(path=str(folder))
    return {name: config.replace(tokenizer=tokenizer) for name, config in sets.items()}


def check_corpus_settings(cfg: DataConfig, info: CorpusInfo) -> None:
    """Check that the token files that are there were built with the settings of `cfg`; an error
    names the first setting that differs."""
    dataset = localize(cfg.dataset, cfg.store)
    sources = {} if dataset.mix is None else {s.name: s.dataset for s in as_prepared(dataset)}
    for name, (config, prepared) in info.parts.items():
        with source_settings(name):
            check_settings(prepared, sources.get(name, config))
    for name, config in _eval_sets(cfg, info.parts).items():
        with eval_set_settings(name):
            check_settings(info.eval_parts[name][1], config)


def ensure_mix_prepared(
    config: DatasetConfig, *, store: StoreConfig | None = None, **options: Any
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
    tokenizer = _MixTokenizer.of(config, sources)
    if tokenizer is not None:
        _ensure_tokenizer(tokenizer, sources, store)
    found = []
    for source in as_prepared(config):
        with _named(source):
            found.append((source, ensure_prepared(source.dataset, store=store, **options)))
    check_same_tokens({source.name: prepared for source, prepared in found})
    return found


@contextlib.contextmanager
def _named(source: ResolvedSource) -> Iterator[None]:
    """Errors say which source they are about."""
    try:
        with source_settings(source.name):
            yield
    except (ConfigError, DataError) as error:
        kind = DataError if isinstance(error, DataError) else ConfigError
        raise kind(f"dataset.mix: {source.name}: {error}") from error


def as_prepared(config: DatasetConfig) -> list[ResolvedSource]:
    """The sources of `config.mix` as their token files are made: with the tokenizer that is trained
    for this mixture in place of `bpe`. Makes nothing."""
    sources = resolve_mix(config)
    tokenizer = _MixTokenizer.of(config, sources)
    if tokenizer is None:
        return sources
    shared = HFTokenizerConfig(path=str(tokenizer.folder))
    return [s._replace(dataset=s.dataset.replace(tokenizer=shared)) for s in sources]


class _MixTokenizer(NamedTuple):
    """The tokenizer that is trained for a mixture."""

    config: BPETokenizerConfig
    weights: dict[str, Fraction]
    """How much of each source it is trained on."""
    folder: Path

    @classmethod
    def of(cls, config: DatasetConfig, sources: list[ResolvedSource]) -> "_MixTokenizer | None":
        """None where the mixture has none of its own: another is given, or its token files are
        taken with the tokenizer they were made with."""
        if not isinstance(config.tokenizer, BPETokenizerConfig):
            return None
        if all(source.dataset.source is None for source in sources):
            return None
        without_text = [
            source.name
            for source in sources
            if isinstance(source.dataset.source, TokenFilesSourceConfig | None)
        ]
        if without_text:
            raise ConfigError(
                f"dataset.tokenizer: bpe is trained on text, but {', '.join(without_text)} of "
                "dataset.mix holds none; give the tokenizer that made its tokens, as in {type: hf, "
                "path: DATA/tokenizer}"
            )
        segments = resolve_schedule(config)
        weights = {s.name: max(segment.shares[s.name] for segment in segments) for s in sources}
        identity = [
            (name, str(weights[name]), one.dataset_name, one.dataset_config, settings_of(one))
            for name, one in ((source.name, source.dataset) for source in sources)
        ]
        key = xxhash.xxh3_64_hexdigest(msgspec.json.encode(identity))
        folder = Path(config.root).expanduser() / TOKENIZERS_FOLDER / key
        return cls(config.tokenizer, weights, folder)


def _ensure_tokenizer(
    wanted: _MixTokenizer, sources: Sequence[ResolvedSource], store: StoreConfig
) -> None:
    folder = wanted.folder
    if (folder / TOKENIZER_FILE).is_file():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if not (folder / TOKENIZER_FILE).is_file():
                tokenizer = _made_before(sources, folder.name, store)
                if tokenizer is None:
                    texts = _samples(wanted, sources, store)
                    tokenizer = train_bpe(texts, wanted.config.vocab_size)
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
    wanted: _MixTokenizer, sources: Sequence[ResolvedSource], store: StoreConfig
) -> Iterator[str]:
    num_bytes = wanted.config.sample_bytes / sum(wanted.weights.values())
    for source in sources:
        dataset = source.dataset
        with _named(source), raw_text_cache(dataset, store) as cache_dir:
            plan = plan_of_text(dataset, cache_dir)
            yield from sample_texts(dataset, plan, int(num_bytes * wanted.weights[source.name]))

"""Token files for every source of a mixture, made with one tokenizer: `ensure_mix_prepared`."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import filelock
import msgspec

from toolkit.data.config import (
    BPETokenizerConfig,
    DatasetConfig,
    HFTokenizerConfig,
    StoreConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.corpus_info import check_same_tokens
from toolkit.data.order.resolve import ResolvedSource, resolve_mix, resolve_schedule
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.build.settings import settings_of
from toolkit.data.prepare.store.cache import raw_text_cache
from toolkit.data.prepare.tokenizers.companions import TOKENIZER_FILE
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.data.tokens.prepared import PreparedDataset, localize
from toolkit.errors import ConfigError, DataError
from toolkit.storage.atomic import fsync_folder, fsync_tree, remove_tree

TOKENIZERS_FOLDER = ".mix-tokenizers"
"""Below the root of token files: tokenizers that were trained for mixtures."""


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
    return Path(config.root).expanduser() / TOKENIZERS_FOLDER / _hash(identity)


def _ensure_tokenizer(
    config: DatasetConfig,
    sources: list[ResolvedSource],
    weights: dict[str, Fraction],
    store: StoreConfig,
) -> None:
    folder = _tokenizer_folder(config, sources, weights)
    if not (folder / TOKENIZER_FILE).is_file():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
                if not (folder / TOKENIZER_FILE).is_file():
                    _make_tokenizer(config, sources, weights, folder, store)
        except OSError as error:
            raise DataError(
                f"{error.filename or folder}: cannot keep the mixture's tokenizer: "
                f"{error.strerror or error}"
            ) from error


def _make_tokenizer(
    config: DatasetConfig,
    sources: Sequence[ResolvedSource],
    weights: dict[str, Any],
    folder: Path,
    store: StoreConfig,
) -> None:
    choice = config.tokenizer
    assert isinstance(choice, BPETokenizerConfig)
    tokenizer = None
    for source in sources:
        made_before = _tokenizer_of(source, folder.name, store)
        if made_before is not None:
            tokenizer = load_tokenizer(made_before)
            break
    if tokenizer is None:
        from toolkit.data.prepare.tokenizers.bpe import train_bpe

        total = sum(weights.values())
        sizes = {name: int(choice.sample_bytes * w / total) for name, w in weights.items()}
        tokenizer = train_bpe(_samples(sources, sizes, store), choice.vocab_size)
    making = folder.with_name(f".{folder.name}.making")
    if making.exists():
        remove_tree(making)
    tokenizer.save(making)
    fsync_tree(making)
    os.rename(making, folder)
    fsync_folder(folder.parent)


def _tokenizer_of(source: ResolvedSource, key: str, store: StoreConfig) -> Path | None:
    """Folder of the tokenizer `key`, from token files that were made with it (here or in the
    permanent store): their text may be gone."""
    as_it_is = source.dataset.replace(source=None)
    try:
        prepared = ensure_prepared(as_it_is, store=store, progress=False, check_text=False)
    except DataError:
        return None  # not there; what is there and damaged is reported when it is opened
    made_with = prepared.manifest.settings.get("tokenizer", {})
    if Path(str(made_with.get("path", ""))).name != key:
        return None
    return prepared.tokenizer_folder


def _samples(
    sources: Sequence[ResolvedSource], sizes: dict[str, int], store: StoreConfig
) -> Iterator[str]:
    from toolkit.data.prepare.build.sample import sample_texts
    from toolkit.data.prepare.text.sources import plan_source

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


def _hash(identity: object) -> str:
    import xxhash

    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(identity))

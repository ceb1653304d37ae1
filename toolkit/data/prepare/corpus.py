"""`prepare_corpus`: token files for all that a `DataConfig` names, and plans of their rows."""

from typing import Any

from toolkit.data.config import DataConfig
from toolkit.data.corpus_info import CorpusInfo, corpus_info, custom_info
from toolkit.data.instances.open import ensure_plans
from toolkit.data.prepare.build.mix import as_prepared, ensure_mix_prepared
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.build.settings import check_settings
from toolkit.data.tokens.prepared import localize


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
    return corpus_info(cfg, parts)


def check_corpus_settings(cfg: DataConfig, info: CorpusInfo) -> None:
    """Check that the token files that are there were built with the settings of `cfg`.

    Raises:
        ConfigError, DataError: names the first setting that differs.
    """
    dataset = localize(cfg.dataset, cfg.store)
    sources = {} if dataset.mix is None else {s.name: s.dataset for s in as_prepared(dataset)}
    for name, (config, prepared) in info.parts.items():
        check_settings(prepared, sources.get(name, config))

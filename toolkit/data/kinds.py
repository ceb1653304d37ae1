"""Does the data suit what is trained? Told from the config, or from manifests that are there."""

from toolkit.data.config import DataConfig
from toolkit.data.corpus_info import CorpusInfo, datasets_of, eval_sets_of
from toolkit.data.tokens.units import TRAINED_BY, UNIT_OF, UnitKind, name_of
from toolkit.errors import ConfigError

_KIND_OF = {unit: kind for kind, unit in UNIT_OF.items()}


def check_data_kind(
    cfg: DataConfig, wanted: UnitKind | None, *, trains: str, info: CorpusInfo | None = None
) -> None:
    """Raise ConfigError unless all data of `cfg`, evaluation sets included, is what is trained on.

    Args:
        wanted: the unit that is needed; None: text, or conversations.
        trains: what needs it, for the message, as "train_module.objective dpo".
        info: of the data, once it is prepared; without it, the config tells.
    """
    if cfg.dataset.custom is not None:
        if wanted is not None:
            raise ConfigError(
                f"{trains} needs {name_of(wanted)}, which dataset.custom cannot give; prepare "
                f"rows with dataset.instructions.kind={_KIND_OF[wanted]}"
            )
        return
    for where, found, is_trained in _units(cfg, info):
        if found == wanted:
            continue
        rows = "plain text or conversations (dataset.instructions.kind=conversations)"
        if wanted is not None:
            rows = f"rows for dataset.instructions.kind={_KIND_OF[wanted]}"
        advice = f"set {TRAINED_BY[found]}, or give {rows}" if is_trained else f"give it {rows}"
        raise ConfigError(
            f"{trains} needs {name_of(wanted)}, and {where} holds {name_of(found)}; {advice}"
        )


def _units(cfg: DataConfig, info: CorpusInfo | None) -> list[tuple[str, UnitKind | None, bool]]:
    """Every corpus, for a message, the unit of its documents, and whether it is trained on."""
    if info is not None:
        parts = [(prepared, True) for _, prepared in info.parts.values()]
        parts += [(prepared, False) for _, prepared in info.eval_parts.values()]
        return [(str(prepared.folder), prepared.unit, trained) for prepared, trained in parts]
    corpora = [
        (f"dataset.mix.sources.{name}" if name else "dataset", config, True)
        for name, config in datasets_of(cfg).items()
    ]
    sets = eval_sets_of(cfg).items()
    corpora += [(f"dataset.eval_sets.{name}", config, False) for name, config in sets]
    # Without a source the token files are taken as they are, whatever is said of rows.
    return [(where, one.unit, trained) for where, one, trained in corpora if one.source is not None]

"""The prepared data of a run, found again where it is now, and opened."""

from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.data.corpus_info import data_places, read_corpus, without_sources
from toolkit.data.tokens.prepared import MANIFEST_NAME
from toolkit.errors import DataError, RunError
from toolkit.experiment.config import ExperimentConfig
from toolkit.runs.files import RUN_FILES
from toolkit.storage.foreign import read_json
from toolkit.storage.remote import is_url

if TYPE_CHECKING:
    from toolkit.data.corpus import Corpus


def find_data(config: ExperimentConfig, run_dir: Path) -> ExperimentConfig:
    """`config` with its prepared data found: `dataset.root` and `store.tokenized_cache_dir` may be
    relative to the folder that the run was started from."""
    if _has_data(config):
        return config
    try:
        started_in = str(read_json(run_dir / RUN_FILES.command, RunError)["cwd"])
    except (FileNotFoundError, RunError, KeyError):
        return config
    # An absolute path stays what it is.
    root = str(Path(started_in) / Path(config.dataset.root).expanduser())
    store = config.store
    for field in ("tokenized_cache_dir", "hf_cache_dir", "permanent_root"):
        place = getattr(store, field)
        if place is not None and not is_url(place):
            store = store.replace(**{field: str(Path(started_in) / Path(place).expanduser())})
    moved = config.replace(dataset=config.dataset.replace(root=root), store=store)
    return moved if _has_data(moved) else config


def open_run_data(config: ExperimentConfig) -> "Corpus":
    """The data of a run as it is here, for reading: nothing is prepared or fetched.

    Args:
        config: from `find_data`.

    Raises:
        DataError: it is not here.
    """
    from toolkit.data.corpus import open_corpus

    data = config.data.replace(store=config.store.replace(permanent_root=None))
    if read_corpus(data) is None:
        places = ", ".join(str(place) for place in data_places(data))
        raise DataError(
            f"{places}: the run's prepared data is not there; restore it, or make it again with "
            "`toolkit prepare`"
        )
    return open_corpus(data.replace(dataset=without_sources(data.dataset)), check_text=False)


def _has_data(config: ExperimentConfig) -> bool:
    return all((place / MANIFEST_NAME).is_file() for place in data_places(config.data))

"""The prepared data of a run, found again where it is now, and opened."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.config.interpolation import fill, fill_text
from toolkit.data.config import (
    DiskSourceConfig,
    FilesSourceConfig,
    SourceConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.corpus_info import data_places, read_corpus, with_sources, without_sources
from toolkit.data.prepare.text.sources import is_gone
from toolkit.data.tokens.prepared import MANIFEST_NAME
from toolkit.errors import DataError, RunError
from toolkit.experiment.config import ExperimentConfig
from toolkit.runs.files import RUN_FILES
from toolkit.storage.foreign import read_json
from toolkit.storage.remote import is_url

if TYPE_CHECKING:
    from toolkit.data.corpus import Corpus

_PLACES = ("--dataset.root", "--data-root", "--store.", "--dataset=", "--store=")


def find_data(
    config: ExperimentConfig,
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    is_filled: bool = True,
) -> ExperimentConfig:
    """`config` with its prepared data found: `dataset.root` and the folders of `store` are relative
    to the folder that the run was started from. Where nothing is there, the run may have moved with
    its data: then they are relative to the current folder.

    Args:
        overrides: flags of the command line; folders that they give are relative to the current
            folder.
        is_filled: whether its texts are; else they stay, and what they stand for is looked for.
    """
    if any(flag.startswith(_PLACES) for flag in overrides):
        return config
    started = started_in(run_dir / RUN_FILES.command)
    if started is None:
        return config

    def there(path: str) -> str:
        meant = path if is_filled else fill_text(path)
        if is_url(meant) or (meant != path and Path(meant).expanduser().is_absolute()):
            return path
        # An absolute path stays what it is.
        return str(Path(started) / Path(path).expanduser())

    def source_there(source: SourceConfig | None) -> SourceConfig | None:
        if isinstance(source, FilesSourceConfig | TokenFilesSourceConfig):
            return source.replace(paths=[there(path) for path in source.paths])
        if isinstance(source, DiskSourceConfig):
            return source.replace(path=there(source.path))
        return source

    store = config.store
    for field in ("tokenized_cache_dir", "hf_cache_dir", "permanent_root"):
        place = getattr(store, field)
        if place is not None:
            store = store.replace(**{field: there(place)})
    dataset = with_sources(config.dataset, source_there)
    dataset = dataset.replace(root=there(dataset.root))
    recorded = config.replace(dataset=dataset, store=store)
    return recorded if _has_data(recorded if is_filled else fill(recorded)) else config


def started_in(command: Path) -> str | None:
    """The folder that the command of a run was given in, which a file of its metadata tells."""
    try:
        return str(read_json(command, RunError)["cwd"])
    except (FileNotFoundError, RunError, KeyError):
        return None


def without_gone_sources(config: ExperimentConfig) -> ExperimentConfig:
    """`config` that takes prepared data as it is where its text is not on this machine: a run moves
    with its prepared data alone."""
    if not _has_data(config) and config.store.permanent_root is None:
        return config
    gone: list[bool] = []

    def look(source: SourceConfig | None) -> SourceConfig | None:
        gone.append(is_gone(source))
        return source

    with_sources(config.dataset, look)
    # All of a mixture: what its own tokenizer was trained on is told by its sources together.
    return config.replace(dataset=without_sources(config.dataset)) if any(gone) else config


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
    return open_corpus(data.replace(dataset=without_sources(data.dataset)))


def _has_data(config: ExperimentConfig) -> bool:
    return all((place / MANIFEST_NAME).is_file() for place in data_places(config.data))

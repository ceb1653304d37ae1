"""The prepared data of a run, found again where it is now."""

from collections.abc import Sequence
from pathlib import Path

from toolkit.config.interpolation import fill, fill_text
from toolkit.data.config import (
    DiskSourceConfig,
    FilesSourceConfig,
    SourceConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.corpus_info import data_places, with_sources
from toolkit.data.tokens.prepared import MANIFEST_NAME
from toolkit.errors import RunError
from toolkit.experiment.config import ExperimentConfig
from toolkit.runs.files import RUN_FILES
from toolkit.storage.foreign import read_json
from toolkit.storage.remote import is_url

_PLACES = ("--dataset.root", "--data-root", "--store.", "--dataset=", "--store=")
"""Flags that say where data is."""


def find_data(
    config: ExperimentConfig,
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    is_filled: bool = True,
) -> ExperimentConfig:
    """`config` with its prepared data found: `dataset.root` and the folders of `store` are relative
    to the folder that the run was started from. Where nothing is there, the run may have moved with
    its data: then they are relative to the current folder, as folders of `overrides` are.

    Without `is_filled`, its texts hold `${NAME}` and stay; what they stand for is looked for.
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
    return recorded if has_data(recorded if is_filled else fill(recorded)) else config


def started_in(command: Path) -> str | None:
    """The folder that the command of a run was given in, which a file of its metadata tells."""
    try:
        return str(read_json(command, RunError)["cwd"])
    except (FileNotFoundError, RunError, KeyError):
        return None


def has_data(config: ExperimentConfig) -> bool:
    """Whether token files are there for all that `config` names."""
    return all((place / MANIFEST_NAME).is_file() for place in data_places(config.data))

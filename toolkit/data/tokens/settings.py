"""Do the token files on disk hold what the config asks for?"""

import logging
from typing import Any

from toolkit.data.config import (
    DatasetConfig,
    HubSourceConfig,
    SourceConfig,
)
from toolkit.data.tokens.prepared import PreparedDataset
from toolkit.errors import DataError

logger = logging.getLogger(__name__)


def settings_of(config: DatasetConfig) -> dict[str, Any]:
    """The settings that decide what the token files hold, as stored in dataset.json.

    Paths are left out: text is identified by its content, so that folders may move.
    """
    tokenizer = config.tokenizer.to_dict()
    if "path" in tokenizer:
        from toolkit.data.tokens.tokenizer_choice import tokenizer_files_hash

        tokenizer["files_hash"] = tokenizer_files_hash(config.tokenizer)
    source = config.source.to_dict() if config.source is not None else {}
    source.pop("paths", None)
    source.pop("streaming", None)
    return {
        "tokenizer": tokenizer,
        "append_eos": config.append_eos,
        "validation_fraction": config.validation_fraction,
        "source": source,
    }


def check_settings(
    prepared: PreparedDataset, config: DatasetConfig, *, check_text: bool = True
) -> None:
    """Raise DataError when `prepared` was built with other settings or from other text.

    With `source: null` the files are taken as they are. A source that cannot be read any more is
    taken to be the one they were built from, and `check_text=False` does not look at it.
    """
    if config.source is None:
        return
    differences = _setting_differences(prepared.manifest.settings, settings_of(config))
    if not differences and check_text and _source_changed(prepared, config.source):
        differences = ["the text of dataset.source has changed"]
    if differences:
        raise DataError(
            f"{prepared.folder}: its token files were built with other settings "
            f"({'; '.join(differences)}); give another dataset.dataset_config name, delete the "
            "folder to build it anew, or use it as it is with dataset.source=null"
        )


def _setting_differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    stored, wanted = _leaves(stored, "dataset"), _leaves(wanted, "dataset")
    stored_hash = stored.pop("dataset.tokenizer.files_hash", None)
    wanted_hash = wanted.pop("dataset.tokenizer.files_hash", None)
    if stored_hash and wanted_hash:
        same = stored_hash == wanted_hash
        path = "dataset.tokenizer.path"
        stored[path] = "the same files" if same else f"{stored[path]} ({stored_hash})"
        wanted[path] = "the same files" if same else f"{wanted[path]} ({wanted_hash})"
    return [
        f"{name}: {stored.get(name)} there, {wanted.get(name)} now"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]


def _leaves(data: dict[str, Any], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        here = f"{path}.{name}"
        found.update(_leaves(value, here) if isinstance(value, dict) else {here: value})
    return found


def _source_changed(prepared: PreparedDataset, source: SourceConfig) -> bool:
    from toolkit.data.text.sources import fingerprint_files, list_files

    if isinstance(source, HubSourceConfig):
        # Asking the hub would make every start depend on the network.
        return False
    try:
        fingerprint = fingerprint_files(list_files(source))
    except (DataError, OSError) as error:
        logger.info("using %s as it is: its source is gone (%s)", prepared.folder, error)
        return False
    return fingerprint != prepared.manifest.source_fingerprint

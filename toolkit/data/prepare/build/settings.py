"""Do the token files on disk hold what the config asks for?"""

import contextlib
from pathlib import Path
from typing import Any

from toolkit.data.config import (
    DatasetConfig,
    FiltersConfig,
    InstructionsConfig,
    SourceConfig,
)
from toolkit.data.tokens.prepared import PreparedDataset
from toolkit.errors import DataError
from toolkit.storage.foreign import read_bytes


def settings_of(config: DatasetConfig) -> dict[str, Any]:
    """The settings that decide what the token files hold, as stored in dataset.json.

    Paths (and which endings are taken from folders) are left out: text is identified by its
    content, so that folders may move. So are settings that came later and have their defaults:
    data sets that were built without them stay what they are.
    """
    tokenizer: dict[str, Any] = {"type": "none"}
    if config.tokenizer is not None:
        tokenizer = config.tokenizer.to_dict()
    if config.tokenizer is not None and "path" in tokenizer:
        from toolkit.data.prepare.tokenizers.choice import templates_hash, tokenizer_files_hash

        tokenizer["files_hash"] = tokenizer_files_hash(config.tokenizer)
        if config.instructions is not None and config.instructions.chat_template is None:
            templates = templates_hash(config.tokenizer)
            if templates is not None:
                tokenizer["templates_hash"] = templates
    source = config.source.to_dict() if config.source is not None else {}
    for name in ("paths", "path", "streaming", "suffixes", "max_line_bytes"):
        source.pop(name, None)
    if source.get("json_files") == "rows":
        del source["json_files"]
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "append_eos": config.append_eos,
        "validation_fraction": config.validation_fraction,
        "source": source,
    }
    if config.filters is not None and config.filters != FiltersConfig():
        settings["filters"] = config.filters.to_dict()
    if config.instructions is not None:
        settings["instructions"] = _instructions(config.instructions)
    if config.deduplicate:
        settings["deduplicate"] = True
    if config.prepend_bos:
        settings["prepend_bos"] = True
    return settings


def _instructions(config: InstructionsConfig) -> dict[str, Any]:
    """A template in a file is known by its content, too."""
    import xxhash

    defaults, settings = InstructionsConfig().to_dict(), config.to_dict()
    for name in ("context_roles", "train_keys", "mask_keys", "ignored_keys"):
        if settings[name] == defaults[name]:
            del settings[name]
    template = config.chat_template
    if template is not None and "\n" not in template and "{" not in template:
        with contextlib.suppress(OSError, ValueError, RuntimeError, DataError):
            data = read_bytes(Path(template).expanduser(), DataError)
            settings["chat_template"] = f"file with hash {xxhash.xxh3_64_hexdigest(data)}"
    return settings


def check_settings(
    prepared: PreparedDataset, config: DatasetConfig, *, check_text: bool = True
) -> None:
    """Raise DataError when `prepared` was built with other settings or from other text.

    With `source: null` the files are taken as they are, and `check_text=False` does not look at the
    source. One that is missing is an error: nobody knows whether these files are of it.
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
    stored.pop("dataset.source.suffixes", None)  # stored once
    for side, other in ((stored, wanted), (wanted, stored)):
        if "dataset.tokenizer.templates_hash" not in other:  # stored since it came, or not to see
            side.pop("dataset.tokenizer.templates_hash", None)
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
    from toolkit.data.prepare.text.sources import source_fingerprint

    try:
        fingerprint = source_fingerprint(source)
    except (DataError, OSError) as error:
        raise DataError(
            f"{error}; {prepared.folder} holds token files of this name, perhaps of other text: to "
            "use them as they are, set dataset.source=null"
        ) from None
    return fingerprint is not None and fingerprint != prepared.manifest.source_fingerprint

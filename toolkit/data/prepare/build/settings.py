"""Which settings decide what token files hold, and whether those on disk were built with them."""

import contextlib
import shlex
from pathlib import Path
from typing import Any

from toolkit.config.layers import leaves
from toolkit.data.config import (
    BPETokenizerConfig,
    DatasetConfig,
    FiltersConfig,
    InstructionsConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.prepare.text.sources import REMOTE_MARK, source_fingerprint
from toolkit.data.prepare.tokenizers.choice import templates_hash, tokenizer_files_hash
from toolkit.data.tokens.prepared import MANIFEST_NAME, PreparedDataset
from toolkit.errors import DataError
from toolkit.storage.foreign import read_bytes

_ELSEWHERE = ("paths", "path", "streaming", "suffixes", "max_line_bytes")
"""Settings of a source that say where its text is, not which: folders may move."""
_LATER_KEYS = ("kind", "context_roles", "train_keys", "mask_keys", "ignored_keys")


def settings_of(config: DatasetConfig) -> dict[str, Any]:
    """The settings that decide what the token files hold, as stored in dataset.json.

    Text is identified by its content. Settings that came later are left out where they have their
    defaults: data sets that were built without them stay what they are.
    """
    tokenizer: dict[str, Any] = {"type": "none"}
    if config.tokenizer is not None:
        tokenizer = config.tokenizer.to_dict()
        if "path" in tokenizer:
            tokenizer["files_hash"] = tokenizer_files_hash(config.tokenizer)
            if config.instructions is not None and config.instructions.chat_template is None:
                templates = templates_hash(config.tokenizer)
                if templates is not None:
                    tokenizer["templates_hash"] = templates
    source = config.source.to_dict() if config.source is not None else {}
    source = {name: value for name, value in source.items() if name not in _ELSEWHERE}
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
    for name in _LATER_KEYS:
        if settings[name] == defaults[name]:
            del settings[name]
    template = config.chat_template
    if template is not None and "\n" not in template and "{" not in template:
        with contextlib.suppress(OSError, ValueError, RuntimeError, DataError):
            data = read_bytes(Path(template).expanduser(), DataError)
            settings["chat_template"] = f"file with hash {xxhash.xxh3_64_hexdigest(data)}"
    return settings


def check_source(config: DatasetConfig) -> None:
    """Raise DataError for settings that need text or rows, given for a source of tokens."""
    if not isinstance(config.source, TokenFilesSourceConfig):
        return
    for name in ("filters", "instructions"):
        if getattr(config, name) is not None:
            raise DataError(
                f"dataset.{name}: needs text, but dataset.source holds tokens; leave it out"
            )
    for name in ("vocab_size", "eos_id"):
        if config.tokenizer is None and getattr(config.source, name) is None:
            raise DataError(f"dataset.source.{name}: must be given where dataset.tokenizer is null")
    if isinstance(config.tokenizer, BPETokenizerConfig):
        raise DataError(
            "dataset.tokenizer: bpe is trained on text, but dataset.source holds tokens; give the "
            "tokenizer that made them, or null"
        )


def not_a_dataset(folder: Path) -> DataError:
    """The error for a folder that holds something else."""
    return DataError(
        f"{folder}: exists, but is no prepared data set (it has no {MANIFEST_NAME}); give another "
        "dataset.dataset_name or dataset.dataset_config"
    )


def check_settings(
    prepared: PreparedDataset, config: DatasetConfig, *, check_text: bool = True
) -> None:
    """Raise DataError when `prepared` was built with other settings or from other text.

    With `source: null` the files are taken as they are, and `check_text=False` does not look at the
    source. One that is missing is an error: nobody knows whether these files are of it.
    """
    if config.source is None:
        return
    differences = _differences(prepared.manifest.settings, settings_of(config))
    if not differences and check_text:
        try:
            fingerprint = source_fingerprint(config.source)
        except (DataError, OSError) as error:
            raise DataError(
                f"{error}; {prepared.folder} holds token files of this name, perhaps of other "
                "text: to use them as they are, set dataset.source=null"
            ) from None
        stored = prepared.manifest.source_fingerprint
        is_older = not stored.endswith(REMOTE_MARK) and str(fingerprint).endswith(REMOTE_MARK)
        if fingerprint not in (None, stored) and not is_older:
            differences = ["the text of dataset.source has changed"]
    if differences:
        raise DataError(
            f"{prepared.folder}: to build its token files anew, remove them "
            f"(rm -r {shlex.quote(str(prepared.folder))}) and repeat this command: they were built "
            f"with other settings ({'; '.join(differences)}). To keep them, give another "
            "dataset.dataset_config, or use them as they are with dataset.source=null"
        )


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    stored, wanted = dict(leaves(stored, "dataset")), dict(leaves(wanted, "dataset"))
    stored.pop("dataset.source.suffixes", None)  # stored once
    for side, other in ((stored, wanted), (wanted, stored)):
        if "dataset.tokenizer.templates_hash" not in other:  # stored since it came, or not to see
            side.pop("dataset.tokenizer.templates_hash", None)
    hashes = [side.pop("dataset.tokenizer.files_hash", None) for side in (stored, wanted)]
    if all(hashes):
        path = "dataset.tokenizer.path"
        for side, files_hash in zip((stored, wanted), hashes, strict=True):
            is_same = hashes[0] == hashes[1]
            side[path] = "the same files" if is_same else f"{side[path]} ({files_hash})"
    return [
        f"{name}: {stored.get(name)} there, {wanted.get(name)} now"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]

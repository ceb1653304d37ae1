"""A name for data of one's own, given to a config that names other data.

`toolkit train sft_chat --dataset.source=...` trains on the text of the flag. Its token files must
not lie under the name that the recipe gives to its own: they would be taken for these later, and
the other way round. So they get a name of their own, which the source decides, and all else that
changes tokens: the same text by another chat template or tokenizer lies elsewhere.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

from toolkit.config import ConfigLayers
from toolkit.config.check import check
from toolkit.data.config import DatasetConfig
from toolkit.errors import ToolkitError
from toolkit.storage.remote import is_url

_ORIGIN = "--dataset.source"
_PATHS = ("paths", "path")
_NAMES = ("type", "name", "config", "split")
_LONGEST = 40


def name_own_data(layers: ConfigLayers[Any], before: Any, overrides: Sequence[str]) -> None:
    """Set `dataset.dataset_name` where flags gave another source and no name.

    Args:
        before: `dataset` as it was without the flags.
    """
    dataset: Any = layers.data.get("dataset")
    source = dataset.get("source") if isinstance(dataset, dict) else None
    if not isinstance(source, dict) or any("dataset_name" in flag for flag in overrides):
        return
    before = before if isinstance(before, dict) else {}
    given, named = _identity(before.get("source")), before.get("dataset_name")
    if _identity(source) == given:
        return
    # A file of one's own may name the data that a flag gives.
    if given is None and named not in (None, DatasetConfig().dataset_name):
        return
    layers.set("dataset.dataset_name", own_name(source, _settings(dataset)), _ORIGIN)


def own_name(source: dict[str, Any], settings: dict[str, Any]) -> str:
    """What `source` is called: a word of it, and a hash of all that it and `settings` say."""
    import xxhash

    own = sorted((name, value) for name, value in source.items() if name not in _PATHS)
    identity = _identity(source), own, settings
    digest = xxhash.xxh3_64_hexdigest(repr(identity).encode("utf-8", "surrogateescape"))
    word = str(source.get("name") or next(iter(_paths(source)), "") or source.get("type", "data"))
    word = os.path.basename(word.rstrip("/")).partition(".")[0]
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-")[:_LONGEST]
    return f"{word or 'data'}-{digest[:8]}"


def _settings(dataset: dict[str, Any]) -> dict[str, Any]:
    """What of `dataset` decides its tokens; empty where that cannot be told, which is an error
    soon."""
    from toolkit.data.prepare.build.settings import settings_of

    config = check(dataset, DatasetConfig).config
    if config is None:
        return {}
    try:
        return settings_of(config)
    except (ToolkitError, OSError):
        return {}


def _identity(source: Any) -> tuple[Any, ...] | None:
    if not isinstance(source, dict):
        return None
    paths = sorted(
        p if is_url(p) else os.path.abspath(os.path.expanduser(p)) for p in _paths(source)
    )
    return (*(source.get(name) for name in _NAMES), paths)


def _paths(source: dict[str, Any]) -> list[str]:
    """Those that are text; what else stands there is refused when the config is resolved."""
    found = source.get("paths") if "paths" in source else [source.get("path")]
    return [path for path in found if isinstance(path, str)] if isinstance(found, list) else []

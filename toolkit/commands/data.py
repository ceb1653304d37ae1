"""`toolkit prepare` and `toolkit data`: token files made by hand, and looked at."""

from collections.abc import Sequence
from typing import Any

from toolkit.config.paths import local_path
from toolkit.data.prepare.build.tokenize import tokenize_files
from toolkit.data.prepare.corpus import prepare_corpus
from toolkit.data.prepare.store.store import describe_stored
from toolkit.data.prepare.tools.inspect import inspect_path
from toolkit.data.prepare.tools.rewrite import merge_datasets, split_parts, split_validation
from toolkit.data.prepare.tools.show import find_instances
from toolkit.data.tokens.prepared import PreparedDataset
from toolkit.errors import ConfigError

__all__ = [
    "describe_stored", "find_instances", "inspect_path", "merge", "prepare_corpus", "split",
    "tokenize",
]  # fmt: skip


def tokenize(paths: Sequence[str], out: str, **options: Any) -> PreparedDataset:
    """Turn text files into token files; see `tokenize_files`."""
    return tokenize_files(paths, str(local_path(out, "--out")), **options)


def merge(folders: Sequence[str], out: str) -> PreparedDataset:
    """Join prepared data sets; see `merge_datasets`."""
    return merge_datasets(folders, str(local_path(out, "--out")))


def split(
    folder: str, out: str, validation_fraction: float | None, parts: int | None
) -> list[PreparedDataset]:
    """Cut a prepared data set anew."""
    out = str(local_path(out, "--out"))
    if validation_fraction is not None and parts is None:
        return [split_validation(folder, out, validation_fraction)]
    if parts is not None and validation_fraction is None:
        return split_parts(folder, out, parts)
    raise ConfigError("give either --validation-fraction F or --parts N")

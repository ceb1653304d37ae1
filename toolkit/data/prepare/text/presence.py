"""Are the files that a data set names there? Nothing is read, and no other machine is asked."""

import contextlib
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from toolkit.data.config import (
    BPETokenizerConfig,
    ByteTokenizerConfig,
    DatasetConfig,
    DiskSourceConfig,
    FilesSourceConfig,
    HFTokenizerConfig,
    InstructionsConfig,
    SourceConfig,
    TokenFilesSourceConfig,
    TokenizerConfig,
)
from toolkit.errors import ConfigError, DataError, ErrorList

_SOURCE = "dataset.source"
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
"""How the files of all formats begin that `transformers` can load."""


def check_presence(dataset: DatasetConfig, *, is_prepared: bool) -> None:
    """Check the local files of source, chat template and tokenizer of one corpus.

    Args:
        is_prepared: its token files are there, which need tokenizer and template no more.

    Raises:
        DataError: one is missing, or rows that are conversations have no chat template.
        ConfigError: the chat template is no text, and no file either.
    """
    found = ErrorList()
    with found.collecting():
        _check_source(dataset.source)
    if not is_prepared:
        with found.collecting():
            _check_tokenizer(dataset.tokenizer)
        with found.collecting():
            _check_template(dataset.instructions, dataset.tokenizer)
        if not found.errors and dataset.instructions is not None:
            from toolkit.data.prepare.text.template_need import check_template_need

            check_template_need(dataset)
    found.raise_any()


def _check_source(source: SourceConfig | None) -> None:
    if isinstance(source, FilesSourceConfig):
        _check_paths(source.paths, source.suffixes)
    elif isinstance(source, TokenFilesSourceConfig):
        local = [path for path in source.paths if "://" not in path]
        if local:
            _check_paths(local, source.suffixes)
    elif isinstance(source, DiskSourceConfig):
        from toolkit.data.prepare.text.hub import disk_files

        disk_files(source)


def _check_paths(paths: Sequence[str], suffixes: Sequence[str]) -> None:
    """Each path is there, and at least one leads to a file."""
    endings, found, any_file = tuple(s.lower() for s in suffixes), ErrorList(), False
    for text in paths:
        path = Path(text).expanduser()
        if path.is_dir():
            any_file = any_file or _holds(path, endings)
        elif path.is_file():
            any_file = True
            if not path.stat().st_size:
                found.add(DataError(f"{_SOURCE}.paths: {path}: the file is empty"))
        elif glob.has_magic(text):
            if any(os.path.isfile(match) for match in glob.iglob(str(path), recursive=True)):
                any_file = True
            else:
                found.add(DataError(f"{_SOURCE}.paths: {text}: matches no file"))
        else:
            found.add(DataError(f"{_SOURCE}.paths: {text}: no such file or folder"))
    if not any_file and not found.errors:
        named = ", ".join(paths) or "empty list"
        looked = f"looked for {', '.join(suffixes)} in folders"
        found.add(DataError(f"{_SOURCE}.paths: {named}: no file to read ({looked})"))
    found.raise_any()


def _holds(folder: Path, endings: tuple[str, ...]) -> bool:
    for _, _, names in os.walk(folder):
        if any(name.lower().endswith(endings) for name in names):
            return True
    # Perhaps behind links, which need care.
    from toolkit.data.prepare.text.files import find_files

    with contextlib.suppress(DataError):
        return bool(find_files([str(folder)], endings).files)
    return False


def _check_tokenizer(config: TokenizerConfig | None) -> None:
    if config is None or isinstance(config, ByteTokenizerConfig | BPETokenizerConfig):
        return
    path, where = Path(config.path).expanduser(), f"dataset.tokenizer.path: {config.path}"
    if not isinstance(config, HFTokenizerConfig):
        if not path.is_file():
            raise DataError(f"{where}: no such file; give the tokenizer's own file")
    elif path.is_dir():
        names = [entry.name for entry in path.iterdir()]
        if not any(name.startswith(_TOKENIZER_FILES) or name.endswith(".model") for name in names):
            raise DataError(f"{where}: holds no tokenizer; give a folder with a tokenizer.json")
    elif not path.is_file() and config.is_local:
        raise DataError(
            f"{where}: no such file or folder; give a tokenizer.json, a folder that holds one, or "
            "a hub name"
        )


def _check_template(config: InstructionsConfig | None, tokenizer: TokenizerConfig | None) -> None:
    if config is None or config.chat_template is None:
        return
    from toolkit.data.prepare.text.instructions.template import read_chat_template
    from toolkit.data.prepare.tokenizers.companions import chat_templates, companions_of

    try:
        read_chat_template(config.chat_template)
    except ConfigError:
        if not isinstance(tokenizer, HFTokenizerConfig):
            raise
        path = Path(tokenizer.path).expanduser()
        if not path.exists():
            return  # of the hub, or refused already
        named = chat_templates(companions_of(path if path.is_dir() else path.parent))
        if config.chat_template not in named:
            raise

"""Are the files that a data set names there? Nothing is prepared, and no other machine is asked."""

import contextlib
from pathlib import Path
from typing import Any

import msgspec

from toolkit.data.config import (
    BPETokenizerConfig,
    ByteTokenizerConfig,
    DatasetConfig,
    FilesSourceConfig,
    HFTokenizerConfig,
    InstructionsConfig,
    TokenFilesSourceConfig,
    TokenizerConfig,
)
from toolkit.data.prepare.text.files import list_files
from toolkit.data.prepare.text.instructions.conversations import shape_of
from toolkit.data.prepare.text.instructions.template import read_chat_template
from toolkit.data.prepare.text.reading import Counts, Reading, read_shard
from toolkit.data.prepare.text.sources import plan_source
from toolkit.data.prepare.tokenizers.choice import check_tokenizer_path
from toolkit.data.prepare.tokenizers.companions import chat_templates, companions_of
from toolkit.data.tokens.units import COLUMNS
from toolkit.errors import ConfigError, DataError, ErrorList

_CONVERSATIONS = ("messages", "sharegpt")
"""Shapes that no tokenizer joins without a template."""


def check_presence(dataset: DatasetConfig, *, is_prepared: bool) -> None:
    """Check the local files of source, chat template and tokenizer of one corpus; where its token
    files are there (`is_prepared`), those of the source alone.

    Raises:
        DataError: one is missing, or rows that are conversations have no chat template.
        ConfigError: the chat template is no text, and no file either.
    """
    found = ErrorList()
    with found.collecting():
        if dataset.source is not None:
            list_files(dataset.source, holding="to read")
    if not is_prepared:
        with found.collecting():
            check_tokenizer_path(dataset.tokenizer)
        with found.collecting():
            _check_template(dataset.instructions, dataset.tokenizer)
        if not found.errors and dataset.instructions is not None:
            _check_template_need(dataset, dataset.instructions)
    found.raise_any()


def _check_template(config: InstructionsConfig | None, tokenizer: TokenizerConfig | None) -> None:
    if config is None or config.chat_template is None:
        return
    try:
        read_chat_template(config.chat_template)
    except ConfigError:
        named = _templates_of(tokenizer) if isinstance(tokenizer, HFTokenizerConfig) else {}
        if named is not None and config.chat_template not in named:
            raise


def _templates_of(tokenizer: TokenizerConfig | None) -> dict[str, str] | None:
    """The chat templates of a tokenizer, by its small files; None: they do not tell."""
    if isinstance(tokenizer, ByteTokenizerConfig | BPETokenizerConfig):
        return {}
    if not isinstance(tokenizer, HFTokenizerConfig):
        return None
    path = Path(tokenizer.path).expanduser()
    if not path.exists():
        return None  # of the hub, which is not asked, or refused already
    return chat_templates(companions_of(path if path.is_dir() else path.parent))


def _check_template_need(dataset: DatasetConfig, config: InstructionsConfig) -> None:
    """Rows that are conversations have a template, as far as the tokenizer's small files and the
    first row tell it."""
    source, tokenizer = dataset.source, dataset.tokenizer
    if config.chat_template is not None or isinstance(source, TokenFilesSourceConfig | None):
        return
    need, told = False, ""
    with contextlib.suppress(DataError, OSError):  # which is said when it is read
        if _templates_of(tokenizer) != {}:
            return
        need = config.shape in _CONVERSATIONS
        told = f"dataset.instructions.shape is {config.shape}"
        if config.shape == "auto":
            if not isinstance(source, FilesSourceConfig):
                return
            first = list_files(source).files[0].path
            row = _first_row(msgspec.structs.replace(source, paths=[first]))
            if config.kind == "conversations":
                need = shape_of(row, config) in _CONVERSATIONS
            else:
                need = any(isinstance(row.get(column), list) for column in COLUMNS[config.kind])
            told = f"so is the first one of {first}"
    if need:
        path = getattr(tokenizer, "path", None)
        where = "dataset.tokenizer" if path is None else f"dataset.tokenizer.path: {path}"
        raise DataError(
            f"{where}: the tokenizer has no chat template, and the rows are conversations ({told});"
            " give one in dataset.instructions.chat_template (Jinja text or a file)"
        )


def _first_row(source: FilesSourceConfig) -> dict[str, Any]:
    plan = plan_source(source, 0.0, rows=True)
    pieces = read_shard(plan.shards[0], Reading(source=source, rows=True), Counts())
    return next((piece.row for piece in pieces if piece.row is not None), {})

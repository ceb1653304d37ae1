"""Are the files that a data set names there? Nothing is prepared, and no other machine is asked."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.files import read_json_mapping
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
from toolkit.data.prepare.text.files import check_any_file, check_path, disk_files, list_files
from toolkit.data.prepare.text.instructions.shapes import shape_of
from toolkit.data.prepare.text.instructions.template import read_chat_template
from toolkit.data.prepare.tokenizers.companions import (
    CHAT_TEMPLATE_FILE,
    TEMPLATES_FOLDER,
    TOKENIZER_CONFIG_FILE,
    chat_templates,
    companions_of,
)
from toolkit.errors import BadInputError, ConfigError, DataError, ErrorList

_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
"""How the files of all formats begin that `transformers` can load."""
_CONVERSATIONS = ("messages", "sharegpt")
"""Shapes that no tokenizer joins without a template."""
_LONGEST_ROW = 1 << 20


def check_presence(dataset: DatasetConfig, *, is_prepared: bool) -> None:
    """Check the local files of source, chat template and tokenizer of one corpus; where its token
    files are there (`is_prepared`), those of the source alone.

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
            _check_template_need(dataset, dataset.instructions)
    found.raise_any()


def _check_source(source: SourceConfig | None) -> None:
    if isinstance(source, FilesSourceConfig):
        _check_paths(source.paths, source.suffixes)
    elif isinstance(source, TokenFilesSourceConfig):
        local = [path for path in source.paths if "://" not in path]
        if local:
            _check_paths(local, source.suffixes)
    elif isinstance(source, DiskSourceConfig):
        disk_files(source)


def _check_paths(paths: Sequence[str], suffixes: Sequence[str]) -> None:
    found = ErrorList()
    for text in paths:
        with found.collecting():
            check_path(text)
    if not found.errors:
        check_any_file(paths, suffixes)
    found.raise_any()


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


def _check_template_need(dataset: DatasetConfig, config: InstructionsConfig) -> None:
    """Rows that are conversations have a template, as far as the tokenizer's small files and the
    first row tell it."""
    source, tokenizer = dataset.source, dataset.tokenizer
    if source is None or isinstance(source, TokenFilesSourceConfig):
        return
    if config.chat_template is not None or not _has_no_template(tokenizer):
        return
    shape: str | None = config.shape
    told = f"dataset.instructions.shape is {shape}"
    if shape == "auto":
        if not isinstance(source, FilesSourceConfig):
            return
        shape, told = _shape_of_first_row(source, config)
    if shape in _CONVERSATIONS:
        path = getattr(tokenizer, "path", None)
        where = "dataset.tokenizer" if path is None else f"dataset.tokenizer.path: {path}"
        raise DataError(
            f"{where}: the tokenizer has no chat template, and the rows are conversations ({told});"
            " give one in dataset.instructions.chat_template (Jinja text or a file)"
        )


def _has_no_template(tokenizer: TokenizerConfig | None) -> bool:
    """Whether it certainly has none."""
    if isinstance(tokenizer, ByteTokenizerConfig | BPETokenizerConfig):
        return True
    if not isinstance(tokenizer, HFTokenizerConfig):
        return False
    path = Path(tokenizer.path).expanduser()
    folder = path if path.is_dir() else path.parent
    if not path.exists() or (folder / CHAT_TEMPLATE_FILE).exists():
        return False  # the hub's are not asked for
    if any((folder / TEMPLATES_FOLDER).glob("*.jinja")):
        return False
    settings = folder / TOKENIZER_CONFIG_FILE
    try:
        return not settings.is_file() or not read_json_mapping(settings).get("chat_template")
    except BadInputError:
        return False  # which is said when it is read


def _shape_of_first_row(
    source: FilesSourceConfig, config: InstructionsConfig
) -> tuple[str | None, str]:
    """The shape of the first row of a file that is quickly looked into, and where that is told."""
    with contextlib.suppress(BadInputError, OSError, msgspec.MsgspecError):
        for file in list_files(source).files:
            row = _first_row(file.path)
            if row is not None:
                return shape_of(row, config, file.path), f"so is the first one of {file.path}"
    return None, ""


def _first_row(path: str) -> dict[str, Any] | None:
    if path.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        return dict.fromkeys(pq.read_schema(path).names, "")
    if not path.lower().endswith((".jsonl", ".ndjson")):
        return None
    with open(path, "rb") as file:
        line = file.readline(_LONGEST_ROW).removeprefix(b"\xef\xbb\xbf")
    row = msgspec.json.decode(line)
    return row if isinstance(row, dict) else None

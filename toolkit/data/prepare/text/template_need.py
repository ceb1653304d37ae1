"""Is a chat template needed that the tokenizer does not have? Told from the tokenizer's small files
and the first row, before anything is prepared."""

import contextlib
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.files import read_json_mapping
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
from toolkit.data.prepare.text.instructions.shapes import shape_of
from toolkit.data.prepare.tokenizers.tokenizer import (
    CHAT_TEMPLATE_FILE,
    TEMPLATES_FOLDER,
    TOKENIZER_CONFIG_FILE,
)
from toolkit.errors import BadInputError, DataError

_CONVERSATIONS = ("messages", "sharegpt")
"""Shapes that no tokenizer joins without a template."""
_LONGEST_ROW = 1 << 20


def check_template_need(dataset: DatasetConfig) -> None:
    """Check that rows which are conversations have a template, as far as that can be told here.

    Raises:
        DataError: they have none.
    """
    config, source, tokenizer = dataset.instructions, dataset.source, dataset.tokenizer
    if config is None or config.chat_template is not None:
        return
    if source is None or isinstance(source, TokenFilesSourceConfig) or not _has_none(tokenizer):
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


def _has_none(tokenizer: TokenizerConfig | None) -> bool:
    """Whether it certainly has no template."""
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

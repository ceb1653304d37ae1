"""Text files to a data set without a config: the common choices of `DatasetConfig`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from toolkit.data.config import (
    BPETokenizerConfig,
    ByteTokenizerConfig,
    DatasetConfig,
    FilesSourceConfig,
    HFTokenizerConfig,
    SentencePieceTokenizerConfig,
    TiktokenTokenizerConfig,
    TokenizerConfig,
)
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.tokens.prepared import PreparedDataset
from toolkit.errors import ConfigError, ToolkitError

_PATTERN_OF = {
    "gpt2": "gpt2",
    "r50k_base": "gpt2",
    "p50k_base": "gpt2",
    "cl100k_base": "cl100k_base",
    "o200k_base": "o200k_base",
    "llama3": "llama3",
}
"""Patterns of published rank files, by their names."""

_OPTION_OF = {
    "dataset.source": "PATHS",
    "dataset.source.paths": "PATHS",
    "dataset.source.text_field": "--text-field",
    "dataset.source.encoding_errors": "--encoding-errors",
    "dataset.tokenizer": "--tokenizer",
    "dataset.tokenizer.path": "--tokenizer",
    "dataset.tokenizer.sample_bytes": "--tokenizer",
    "dataset.tokenizer.type": "--tokenizer",
    "dataset.tokenizer.vocab_size": "--tokenizer",
    "dataset.validation_fraction": "--validation-fraction",
    "validation_fraction": "--validation-fraction",
    "dataset.num_processes": "--processes",
    "num_processes": "--processes",
    "dataset.deduplicate": "--deduplicate",
    "dataset.dataset_name or dataset.dataset_config": "--out",
    "dataset.dataset_config": "--out",
    "dataset.root": "--out",
}
"""Names of settings in messages, and what asks for them here."""
_SETTING = re.compile(
    r"dataset\.dataset_name or dataset\.dataset_config"
    r"|\bdataset\.(?!json\b|source=null)[a-z_.]*[a-z_]|^(validation_fraction|num_processes)\b"
)
_WITH_PATTERN = (
    "`toolkit prepare` with --dataset.tokenizer='{type: tiktoken, path: ..., pattern: ...}'"
)


def tokenize_files(
    paths: Sequence[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str = "byte",
    text_field: str = "text",
    encoding_errors: str = "strict",
    validation_fraction: float = 0.05,
    num_processes: int | None = None,
    deduplicate: bool = False,
    progress: bool = True,
) -> PreparedDataset:
    """The data set `output` of the text in `paths`; what `toolkit prepare` does with a config.

    `paths` are files, folders or globs; `tokenizer`: see `tokenizer_choice`.

    Raises:
        ConfigError: a value cannot be used.
        DataError: the text or the tokenizer cannot be used, or `output` holds something else.
    """
    folder = Path(output).expanduser().resolve()
    if not folder.parent.name:
        raise ConfigError(
            f"--out: {output}: give a folder that is not directly below {folder.anchor}"
        )
    if encoding_errors not in ("strict", "replace"):
        raise ConfigError(f"--encoding-errors: {encoding_errors!r} is none of strict, replace")
    try:
        config = DatasetConfig(
            root=str(folder.parent.parent),
            dataset_name=folder.parent.name,
            dataset_config=folder.name,
            source=FilesSourceConfig(
                paths=list(paths),
                text_field=text_field,
                encoding_errors="replace" if encoding_errors == "replace" else "strict",
            ),
            tokenizer=tokenizer_choice(tokenizer),
            validation_fraction=validation_fraction,
            num_processes=num_processes,
            deduplicate=deduplicate,
        )
    except ValueError as error:
        raise ConfigError(_with_options(str(error))) from None
    try:
        return prepare_dataset(config, progress=progress)
    except ToolkitError as error:
        raise type(error)(_with_options(str(error))) from error


def _with_options(message: str) -> str:
    """`message` with options in place of the settings that it names."""
    named = {match.group() for match in _SETTING.finditer(message)}
    message = _SETTING.sub(lambda match: _OPTION_OF.get(match.group(), match.group()), message)
    message = message.replace("--encoding-errors=", "--encoding-errors ")
    return (
        message if named <= _OPTION_OF.keys() else f"{message} (such settings: `toolkit prepare`)"
    )


def tokenizer_choice(text: str) -> TokenizerConfig:
    """The tokenizer that one word names.

    `byte`; `bpe` or `bpe:8000` (trained on the text); a `.tiktoken` rank file whose name tells its
    pattern; a SentencePiece `.model`; else a folder, a tokenizer.json or a name on the hub.

    Raises:
        ConfigError: for a word that names none of them.
    """
    if text == "byte":
        return ByteTokenizerConfig()
    kind, _, size = text.partition(":")
    if kind == "bpe":
        try:
            return BPETokenizerConfig(vocab_size=int(size)) if size else BPETokenizerConfig()
        except ValueError as error:
            raise ConfigError(
                f"--tokenizer {text}: give bpe:SIZE with a whole number ({error})"
            ) from None
    path = Path(text).expanduser()
    if path.suffix == ".tiktoken":
        if path.stem not in _PATTERN_OF:
            raise ConfigError(
                f"--tokenizer {text}: its name tells no pattern (known: {', '.join(_PATTERN_OF)}); "
                f"use {_WITH_PATTERN}"
            )
        return TiktokenTokenizerConfig(path=text, pattern=_PATTERN_OF[path.stem])
    if path.suffix == ".model":
        if path.is_file() and _is_rank_file(path):
            raise ConfigError(
                f"--tokenizer {text}: a rank file of tiktoken, not a SentencePiece model; use "
                f"{_WITH_PATTERN}"
            )
        return SentencePieceTokenizerConfig(path=text)
    return HFTokenizerConfig(path=text)


def _is_rank_file(path: Path) -> bool:
    with path.open("rb") as file:
        words = file.readline(200).split()
    return len(words) == 2 and words[0].isascii() and words[1].isdigit()

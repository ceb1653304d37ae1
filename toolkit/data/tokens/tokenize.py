"""Text files to a data set without a config: the common choices of `DatasetConfig`."""

import os
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
from toolkit.data.tokens.prepare import prepare_dataset
from toolkit.data.tokens.prepared import PreparedDataset
from toolkit.errors import ConfigError

_PATTERN_OF = {
    "gpt2": "gpt2",
    "r50k_base": "gpt2",
    "p50k_base": "gpt2",
    "cl100k_base": "cl100k_base",
    "o200k_base": "o200k_base",
    "llama3": "llama3",
}
"""Patterns of published rank files, by their names."""


def tokenize_files(
    paths: Sequence[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str = "byte",
    text_field: str = "text",
    validation_fraction: float = 0.05,
    num_processes: int | None = None,
    deduplicate: bool = False,
    progress: bool = True,
) -> PreparedDataset:
    """The data set `output` of the text in `paths`; what `toolkit prepare` does with a config.

    Args:
        paths: files, folders or globs.
        tokenizer: see `tokenizer_choice`.
        num_processes: default: all cores.

    Raises:
        ConfigError: a value cannot be used.
        DataError: the text or the tokenizer cannot be used, or `output` holds something else.
    """
    folder = Path(output).expanduser().resolve()
    if not folder.parent.name:
        raise ConfigError(
            f"--out: {output}: give a folder that is not directly below {folder.anchor}"
        )
    try:
        config = DatasetConfig(
            root=str(folder.parent.parent),
            dataset_name=folder.parent.name,
            dataset_config=folder.name,
            source=FilesSourceConfig(paths=list(paths), text_field=text_field),
            tokenizer=tokenizer_choice(tokenizer),
            validation_fraction=validation_fraction,
            num_processes=num_processes,
            deduplicate=deduplicate,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return prepare_dataset(config, progress=progress)


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
                "use `toolkit prepare` with --dataset.tokenizer='{type: tiktoken, path: ..., "
                "pattern: ...}'"
            )
        return TiktokenTokenizerConfig(path=text, pattern=_PATTERN_OF[path.stem])
    if path.suffix == ".model":
        if path.is_file() and _is_rank_file(path):
            raise ConfigError(
                f"--tokenizer {text}: a rank file of tiktoken, not a SentencePiece model; use "
                "`toolkit prepare` with --dataset.tokenizer='{type: tiktoken, path: ..., "
                "pattern: ...}'"
            )
        return SentencePieceTokenizerConfig(path=text)
    return HFTokenizerConfig(path=text)


def _is_rank_file(path: Path) -> bool:
    with path.open("rb") as file:
        words = file.readline(200).split()
    return len(words) == 2 and words[0].isascii() and words[1].isdigit()

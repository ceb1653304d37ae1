"""The tokenizer that a config asks for."""

from collections.abc import Callable, Iterable
from pathlib import Path

from toolkit.data.prepare.tokenizers.backend import MAX_TOKENIZER_BYTES
from toolkit.data.prepare.tokenizers.companions import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    companions,
)
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.data.tokenizer_config import (
    BPETokenizerConfig,
    ByteTokenizerConfig,
    HFTokenizerConfig,
    SentencePieceTokenizerConfig,
    TiktokenTokenizerConfig,
    TokenizerConfig,
)
from toolkit.errors import DataError
from toolkit.storage.foreign import read_bytes


def build_tokenizer(
    config: TokenizerConfig, sample: Callable[[int], Iterable[str]] | None = None
) -> Tokenizer:
    """Load, convert or train a tokenizer.

    Args:
        sample: gives training text of about so many bytes; only asked where one is trained.

    Raises:
        ConfigError: a library is missing, or settings do not fit together.
        DataError: its files are missing or damaged.
    """
    match config:
        case ByteTokenizerConfig():
            from toolkit.data.prepare.tokenizers.byte import ByteTokenizer

            return ByteTokenizer()
        case BPETokenizerConfig():
            from toolkit.data.prepare.tokenizers.bpe import train_bpe

            assert sample is not None, "a tokenizer cannot be trained without text"
            return train_bpe(sample(config.sample_bytes), config.vocab_size)
        case TiktokenTokenizerConfig():
            from toolkit.data.prepare.tokenizers.tiktoken_file import load_tiktoken

            return load_tiktoken(config)
        case SentencePieceTokenizerConfig():
            from toolkit.data.prepare.tokenizers.sentencepiece_model import load_sentencepiece

            return load_sentencepiece(config)
        case HFTokenizerConfig():
            from toolkit.data.prepare.tokenizers.hf import load_hf_tokenizer

            return load_hf_tokenizer(config)


def tokenizer_files_hash(config: TokenizerConfig) -> str | None:
    """xxh3_64 of the local files a tokenizer is made from; None where there are none (it is made
    here, or comes from the hub, or its files are gone)."""
    import xxhash

    if isinstance(config, ByteTokenizerConfig | BPETokenizerConfig):
        return None
    path = Path(config.path).expanduser()
    folder = path if path.is_dir() else path.parent
    digest = xxhash.xxh3_64()
    file = path / TOKENIZER_FILE if path.is_dir() else path
    try:
        digest.update(read_bytes(file, DataError, max_bytes=MAX_TOKENIZER_BYTES))
    except (FileNotFoundError, DataError):
        return None
    if isinstance(config, HFTokenizerConfig) and (folder / TOKENIZER_CONFIG_FILE).is_file():
        digest.update(read_bytes(folder / TOKENIZER_CONFIG_FILE, DataError))
    return digest.hexdigest()


def templates_hash(config: TokenizerConfig) -> str | None:
    """xxh3_64 of the files beside a local tokenizer that hold nothing but its chat templates; None
    where there are none."""
    import xxhash

    if not isinstance(config, HFTokenizerConfig):
        return None
    path = Path(config.path).expanduser()
    folder = path if path.is_dir() else path.parent
    names = [name for name in companions(folder) if name.endswith(".jinja")]
    digest = xxhash.xxh3_64()
    try:
        for name in names:
            digest.update(name.encode() + b"\0" + read_bytes(folder / name, DataError) + b"\0")
    except (OSError, DataError):
        return None
    return digest.hexdigest() if names else None

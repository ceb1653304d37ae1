"""The tokenizer that a config asks for: made here, converted, or in Hugging Face format (a folder,
a tokenizer.json, or a name on the hub)."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from toolkit.data.config import (
    BPETokenizerConfig,
    ByteTokenizerConfig,
    HFTokenizerConfig,
    SentencePieceTokenizerConfig,
    TiktokenTokenizerConfig,
    TokenizerConfig,
)
from toolkit.data.prepare.tokenizers.backend import MAX_TOKENIZER_BYTES, check_small_files
from toolkit.data.prepare.tokenizers.companions import (
    CHAT_TEMPLATE_FILE,
    COMPANION_FILES,
    TEMPLATES_FOLDER,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Files,
    companions,
)
from toolkit.data.prepare.tokenizers.converted import load_sentencepiece, load_tiktoken
from toolkit.data.prepare.tokenizers.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    fast_config,
    load_file,
    train_bpe,
)
from toolkit.errors import DataError
from toolkit.storage.foreign import guard, read_bytes, reason_of


def build_tokenizer(
    config: TokenizerConfig, sample: Callable[[int], Iterable[str]] | None = None
) -> Tokenizer:
    """Load, convert or train a tokenizer; `sample` gives training text of about so many bytes.

    Raises:
        ConfigError: a library is missing, or settings do not fit together.
        DataError: its files are missing or damaged.
    """
    match config:
        case ByteTokenizerConfig():
            return ByteTokenizer()
        case BPETokenizerConfig():
            assert sample is not None, "a tokenizer cannot be trained without text"
            return train_bpe(sample(config.sample_bytes), config.vocab_size)
        case TiktokenTokenizerConfig():
            return load_tiktoken(config)
        case SentencePieceTokenizerConfig():
            return load_sentencepiece(config)
        case HFTokenizerConfig():
            return load_hf_tokenizer(config)


def load_hf_tokenizer(config: HFTokenizerConfig) -> Tokenizer:
    """A tokenizer from a folder, a tokenizer.json file or the hub; DataError when it cannot be
    found, or exists in no form that `tokenizers` can run."""
    path = Path(config.path).expanduser()
    file: Path | None = path / TOKENIZER_FILE if path.is_dir() else path
    if path.is_dir() and not (path / TOKENIZER_FILE).is_file():
        file = None
    elif not path.exists():
        if config.is_local:
            raise DataError(
                f"dataset.tokenizer.path: {config.path}: no such file or folder; "
                "give a tokenizer.json, a folder that holds one, or a hub name"
            )
        file = _download(config.path)
    if file is None:
        return _load_with_transformers(config)
    return load_file(file, eos_token=config.eos_token, bos_token=config.bos_token)


def _download(name: str) -> Path | None:
    """The tokenizer.json of a name on the hub; None: it has none."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(name, TOKENIZER_FILE))
        for other in COMPANION_FILES[:4]:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(name, other)
        # Beside the others: both lie in the folder of one revision.
        snapshot_download(name, allow_patterns=[f"{TEMPLATES_FOLDER}/*.jinja"])
    except Exception as error:
        # The local kind means that the hub could not be asked, not that it has no such file.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise DataError(
            f"dataset.tokenizer.path: {name}: no such local folder, and the hub gave none: "
            f"{reason_of(error)}"
        ) from None
    return file


def _load_with_transformers(config: HFTokenizerConfig) -> Tokenizer:
    """For folders that hold only an older format (vocab.json + merges.txt, ...)."""
    from transformers import AutoTokenizer

    path, where = Path(config.path).expanduser(), f"dataset.tokenizer.path: {config.path}"
    if path.is_dir():
        check_small_files(path, DataError)
    with guard(where, DataError, problem="no tokenizer that can be loaded"):
        name = str(path) if path.is_dir() else config.path
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{where}: exists only as Python code, without a tokenizer.json; convert it first, or "
            "use another tokenizer"
        )
    eos_token = config.eos_token or loaded.eos_token
    bos_token = config.bos_token or loaded.bos_token
    files: Files = {TOKENIZER_CONFIG_FILE: fast_config(eos_token, bos_token)}
    templates = loaded.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    for name, text in templates.items():
        is_default = name == "default"
        files[CHAT_TEMPLATE_FILE if is_default else f"{TEMPLATES_FOLDER}/{name}.jinja"] = text
    return Tokenizer(backend, eos_token, files, bos_token=bos_token)


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

"""The tokenizer that a config asks for: made here, converted, or in Hugging Face format (a folder,
a tokenizer.json, or a name on the hub)."""

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
from toolkit.data.prepare.text.reading import at
from toolkit.data.prepare.tokenizers.auto import load_auto_tokenizer
from toolkit.data.prepare.tokenizers.backend import MAX_TOKENIZER_BYTES
from toolkit.data.prepare.tokenizers.companions import (
    CHAT_TEMPLATE_FILE,
    COMPANION_FILES,
    TEMPLATES_FOLDER,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Files,
    companions_of,
    has_tokenizer,
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
from toolkit.storage.foreign import guard, read_bytes


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


def check_tokenizer_path(config: TokenizerConfig | None) -> None:
    """Raise DataError when the files that a tokenizer is made from are not there; the hub is not
    asked."""
    if config is None or isinstance(config, ByteTokenizerConfig | BPETokenizerConfig):
        return
    path, where = Path(config.path).expanduser(), f"dataset.tokenizer.path: {config.path}"
    if not isinstance(config, HFTokenizerConfig):
        if not path.is_file():
            raise DataError(f"{where}: no such file; give the tokenizer's own file")
    elif path.is_dir():
        if not has_tokenizer(path):
            raise DataError(f"{where}: holds no tokenizer; give a folder with a tokenizer.json")
    elif not path.is_file() and config.is_local:
        raise DataError(
            f"{where}: no such file or folder; give a tokenizer.json, a folder that holds one, or "
            "a hub name"
        )


def load_hf_tokenizer(config: HFTokenizerConfig) -> Tokenizer:
    """A tokenizer from a folder, a tokenizer.json file or the hub; DataError when it cannot be
    found, or exists in no form that `tokenizers` can run."""
    check_tokenizer_path(config)
    path = Path(config.path).expanduser()
    folder = path if path.exists() else _download(config.path)
    file = folder / TOKENIZER_FILE if folder.is_dir() else folder
    if not file.is_file():
        return _load_older(config, path if path.exists() else config.path)
    return load_file(file, eos_token=config.eos_token, bos_token=config.bos_token)


def _download(name: str) -> Path:
    """The folder of a name on the hub, with its tokenizer.json, if it has one, and what belongs
    to it."""
    from huggingface_hub import snapshot_download

    wanted = [TOKENIZER_FILE, *COMPANION_FILES[:4], f"{TEMPLATES_FOLDER}/*.jinja"]
    with guard(
        f"dataset.tokenizer.path: {name}",
        DataError,
        problem="no such local folder, and the hub gave none",
    ):
        return Path(snapshot_download(name, allow_patterns=wanted))


def _load_older(config: HFTokenizerConfig, source: Path | str) -> Tokenizer:
    """For folders and names that hold only an older format (vocab.json + merges.txt, ...)."""
    with at("dataset.tokenizer.path"):
        loaded = load_auto_tokenizer(source)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"dataset.tokenizer.path: {config.path}: exists only as Python code, without a "
            "tokenizer.json; convert it first, or use another tokenizer"
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
    file = path / TOKENIZER_FILE if path.is_dir() else path
    settings = file.with_name(TOKENIZER_CONFIG_FILE)
    try:
        digest = xxhash.xxh3_64(read_bytes(file, DataError, max_bytes=MAX_TOKENIZER_BYTES))
    except (FileNotFoundError, DataError):
        return None
    if isinstance(config, HFTokenizerConfig) and settings.is_file():
        digest.update(read_bytes(settings, DataError))
    return digest.hexdigest()


def templates_hash(config: TokenizerConfig) -> str | None:
    """xxh3_64 of the files beside a local tokenizer that hold nothing but its chat templates; None
    where there are none."""
    import xxhash

    if not isinstance(config, HFTokenizerConfig):
        return None
    path = Path(config.path).expanduser()
    files = companions_of(path if path.is_dir() else path.parent)
    digest, names = xxhash.xxh3_64(), [name for name in files if name.endswith(".jinja")]
    try:
        for name in names:
            data = read_bytes(Path(str(files[name])), DataError)
            digest.update(name.encode() + b"\0" + data + b"\0")
    except (OSError, DataError):
        return None
    return digest.hexdigest() if names else None

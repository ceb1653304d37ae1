"""Tokenizers behind one small interface: bytes, BPE trained on the spot, and Hugging Face ones.

Every tokenizer is stored as a folder with `tokenizer.json` and `tokenizer_config.json`, which both
`load_tokenizer` and `transformers.AutoTokenizer` read. Text is always encoded as ordinary text: the
characters `<|endoftext|>` inside a document never become the control token.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.data.config import HFTokenizerConfig
from toolkit.errors import DataError
from toolkit.storage.atomic import write_json_atomic

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer as BackendTokenizer

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
EOS_TOKEN = "<|endoftext|>"
_BYTE_MARK = "is_byte_tokenizer"
_COMPANION_FILES = (
    TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


class Tokenizer:
    """Text to ids and back.

    Attributes:
        eos_token, eos_id: the token that ends a document; None when the tokenizer has none.
        vocab_size: every id is below this.
    """

    def __init__(
        self, backend: "BackendTokenizer", eos_token: str | None, files: dict[str, Any]
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._files = files
        self.eos_token = eos_token
        self.eos_id = backend.token_to_id(eos_token) if eos_token is not None else None
        if eos_token is not None and self.eos_id is None:
            raise DataError(
                f"dataset.tokenizer.eos_token: the tokenizer has no token {eos_token!r}; "
                "give one of its special tokens"
            )
        # The largest id, not the number of entries: published vocabularies have gaps.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=0) + 1

    @property
    def fingerprint(self) -> str:
        """Identifies the mapping from text to ids and the end-of-document token."""
        import xxhash

        content = f"{self.eos_token}\n{self._backend.to_str()}"
        return xxhash.xxh3_64_hexdigest(content.encode())

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """Ids of each text, without any special token; uint32 arrays."""
        import numpy as np

        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: "Iterable[int]") -> str:
        """The text of `ids`; the end-of-document token is shown by its name."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and what belongs to them into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                write_json_atomic(folder / name, content)
        self._backend.save(str(folder / TOKENIZER_FILE))


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer as BackendTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
        backend = BackendTokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([EOS_TOKEN])
        super().__init__(backend, EOS_TOKEN, {TOKENIZER_CONFIG_FILE: _fast_config(byte=True)})

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """Bytes of each text; uint8 arrays."""
        import numpy as np

        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; GPT-2's byte alphabet and word pattern).

    The same texts give the same tokenizer. Little text may give fewer than `vocab_size` ids.
    """
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, EOS_TOKEN, {TOKENIZER_CONFIG_FILE: _fast_config()})


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`, or any Hugging Face folder.

    Raises:
        DataError: when there is no usable tokenizer.json.
    """
    config = _read_json(Path(folder) / TOKENIZER_CONFIG_FILE)
    if config.get(_BYTE_MARK):
        return ByteTokenizer()
    return _load_file(Path(folder) / TOKENIZER_FILE, eos_token=None)


def load_hf_tokenizer(config: HFTokenizerConfig) -> Tokenizer:
    """A tokenizer from a folder, a tokenizer.json file or the hub.

    Raises:
        DataError: when it cannot be found, or exists in no form that `tokenizers` can run.
    """
    path = Path(config.path).expanduser()
    if path.is_file():
        return _load_file(path, config.eos_token)
    if (path / TOKENIZER_FILE).is_file():
        if _read_json(path / TOKENIZER_CONFIG_FILE).get(_BYTE_MARK):
            return ByteTokenizer()
        return _load_file(path / TOKENIZER_FILE, config.eos_token)
    if path.is_dir():
        return _load_with_transformers(str(path), config)
    if path.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") > 1:
        raise DataError(
            f"dataset.tokenizer.path: {config.path}: no such file or folder; "
            "give a tokenizer.json, a folder that holds one, or a hub name"
        )
    return _load_from_hub(config)


def hf_files_hash(path_text: str) -> str | None:
    """Hash of a local tokenizer's files; None for one that is not there (or on the hub)."""
    import xxhash

    path = Path(path_text).expanduser()
    folder = path if path.is_dir() else path.parent
    file = folder / TOKENIZER_FILE if path.is_dir() else path
    digest = xxhash.xxh3_64()
    try:
        digest.update(file.read_bytes())
    except OSError:
        return None
    with contextlib.suppress(OSError):
        digest.update((folder / TOKENIZER_CONFIG_FILE).read_bytes())
    return digest.hexdigest()


def _load_file(path: Path, eos_token: str | None) -> Tokenizer:
    from tokenizers import Tokenizer as BackendTokenizer

    if not path.is_file():
        raise DataError(f"{path}: no such file; a tokenizer folder needs {TOKENIZER_FILE}")
    try:
        backend = BackendTokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception for a file it cannot read
        raise DataError(f"{path}: not a tokenizer that can be read: {error}") from None
    files: dict[str, Any] = {
        name: path.with_name(name) for name in _COMPANION_FILES if path.with_name(name).is_file()
    }
    return _with_eos(backend, path.parent, files, eos_token)


def _with_eos(
    backend: "BackendTokenizer", folder: Path, files: dict[str, Any], eos_token: str | None
) -> Tokenizer:
    config = _read_json(folder / TOKENIZER_CONFIG_FILE)
    own = config.get("eos_token") or _read_json(folder / "special_tokens_map.json").get("eos_token")
    if isinstance(own, dict):
        own = own.get("content")
    chosen = eos_token or own
    if not config or chosen != own:
        files = {
            **files,
            TOKENIZER_CONFIG_FILE: {**(config or _fast_config()), "eos_token": chosen},
        }
    return Tokenizer(backend, chosen, files)


def _load_from_hub(config: HFTokenizerConfig) -> Tokenizer:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(config.path, TOKENIZER_FILE))
        for name in _COMPANION_FILES[:4]:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(config.path, name)
    except Exception as error:
        # The local kind means that the hub could not be asked, not that it has no such file.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return _load_with_transformers(config.path, config)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"dataset.tokenizer.path: {config.path}: no such local folder, and the hub gave none: "
            f"{reason}"
        ) from None
    return _load_file(file, config.eos_token)


def _load_with_transformers(name: str, config: HFTokenizerConfig) -> Tokenizer:
    """For folders that hold only an older format (sentencepiece, vocab.json + merges.txt)."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"dataset.tokenizer.path: {config.path}: no tokenizer that can be loaded: {reason}"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"dataset.tokenizer.path: {config.path}: exists only as Python code, without a "
            "tokenizer.json; convert it first, or use another tokenizer"
        )
    eos_token = config.eos_token or loaded.eos_token
    return Tokenizer(
        backend, eos_token, {TOKENIZER_CONFIG_FILE: {**_fast_config(), "eos_token": eos_token}}
    )


def _fast_config(*, byte: bool = False) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    return {**config, _BYTE_MARK: True} if byte else config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the order of the bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters, next_free = [], 256
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(next_free))
            next_free += 1
    return characters

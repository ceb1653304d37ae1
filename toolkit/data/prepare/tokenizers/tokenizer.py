"""Tokenizers behind one small interface, and the folder they are stored in.

Every tokenizer, whatever it was made from, is stored as a folder with `tokenizer.json` and
`tokenizer_config.json`, which both `load_tokenizer` and `transformers.AutoTokenizer` read. Text is
encoded as ordinary text: the characters `<|endoftext|>` inside a document never become the control
token (`backend.py`). Only what a chat template has rendered is read with its control tokens.
"""

import copy
import functools
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.prepare.tokenizers import backend as backends
from toolkit.data.prepare.tokenizers.companions import (
    CHAT_TEMPLATE_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATES_FOLDER,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Files,
    chat_templates,
    companions_of,
    read_json,
    settings_of,
)
from toolkit.data.prepare.tokenizers.fast_bpe import FastBPE, byte_characters, fast_bpe
from toolkit.errors import DataError
from toolkit.storage.atomic import write_atomic, write_json_atomic
from toolkit.storage.foreign import guard

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer as BackendTokenizer

EOS_TOKEN = "<|endoftext|>"
"""End of a document, in tokenizers made here."""
BYTE_MARK = "is_byte_tokenizer"

_CANNOT_ENCODE = "the tokenizers library fails at a text"


class Tokenizer:
    """Text to ids and back.

    DataError when `eos_token` or `bos_token` is no token of the backend.

    Attributes:
        eos_token, eos_id: the token that ends a document; None when the tokenizer has none.
        bos_token, bos_id: the token that starts a document; None when the tokenizer has none.
        vocab_size: every id is below this.
    """

    def __init__(
        self,
        backend: "BackendTokenizer",
        eos_token: str | None,
        files: Files,
        *,
        bos_token: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.eos_token, self.bos_token = eos_token, bos_token
        self.eos_id = backends.control_id(backend, "eos_token", eos_token)
        self.bos_id = backends.control_id(backend, "bos_token", bos_token)
        self._backend = backend
        self._ordinary = backends.ordinary_backend(
            backend, [t for t in (eos_token, bos_token) if t]
        )
        self._files = files
        self.vocab_size = backends.largest_id(backend) + 1

    @property
    def fingerprint(self) -> str:
        """Identifies the mapping from text to ids and the end-of-document token."""
        import xxhash

        content = f"{self.eos_token}\n{self._backend.to_str()}"
        return xxhash.xxh3_64_hexdigest(content.encode())

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """Ids of the special tokens, by name. No ordinary text becomes one of them."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    @functools.cached_property
    def added_tokens(self) -> frozenset[int]:
        """Ids of tokens that no merging makes: `control_tokens`, and others of their own."""
        return frozenset(self._backend.get_added_tokens_decoder())

    @property
    def pad_id(self) -> int | None:
        """The token that fills up rows of a batch; None when the tokenizer names none."""
        for name in (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE):
            content = self._files.get(name)
            settings = read_json(content) if isinstance(content, Path) else content
            token = settings.get("pad_token") if isinstance(settings, dict) else None
            if token is not None:
                return self.control_tokens.get(str(_token_text(token)))
        return None

    def id_of(self, token: str) -> int | None:
        """The id of an entry of the vocabulary, by its name; None: there is no such entry."""
        return self._backend.token_to_id(token)

    @functools.cached_property
    def token_bytes(self) -> "np.ndarray":
        """UTF-8 bytes of the text of each id; see `backend.token_bytes`."""
        return backends.token_bytes(self._backend)

    @property
    def chat_templates(self) -> dict[str, str]:
        """Jinja texts that render conversations, by name; the only one of most tokenizers is
        called `default`. Files go before tokenizer_config.json, as in `transformers`."""
        return chat_templates(self._files)

    @property
    def chat_template(self) -> str | None:
        """The one of `chat_templates` that is called `default`; None: there is none."""
        return self.chat_templates.get("default")

    def with_chat_template(self, text: str) -> "Tokenizer":
        """The same tokenizer with `text` as its only chat template; `save` stores it."""
        config = {k: v for k, v in self._config().items() if k != "chat_template"}
        changed = copy.copy(self)
        changed._files = {
            name: content
            for name, content in self._files.items()
            if Path(name).parent.name != TEMPLATES_FOLDER
        } | {TOKENIZER_CONFIG_FILE: config, CHAT_TEMPLATE_FILE: text}
        return changed

    @property
    def prepends_bos(self) -> bool:
        """Whether texts start with the start-of-document token, as the documents of the data did
        that this tokenizer is stored with."""
        return self.bos_id is not None and self._config().get("add_bos_token") is True

    @property
    def adds_bos(self) -> bool:
        """Whether `transformers` puts the start-of-document token before a text: tokenizer.json
        says so, by itself or because data was made so (`with_bos_policy`)."""
        return self.bos_id is not None and self._backend.encode("a").ids[:1] == [self.bos_id]

    def with_bos_policy(self, prepend_bos: bool) -> "Tokenizer":
        """The same tokenizer, which remembers whether documents start with the start-of-document
        token. `transformers` then does so too: by what tokenizer.json does after encoding."""
        if self.bos_id is None:
            return self
        from tokenizers import Tokenizer as BackendTokenizer
        from tokenizers.processors import TemplateProcessing

        backend = BackendTokenizer.from_str(self._backend.to_str())
        bos = str(self.bos_token)
        if prepend_bos:
            backend.post_processor = TemplateProcessing(
                single=[bos, "$A"],
                pair=[bos, "$A", f"{bos}:1", "$B:1"],
                special_tokens=[(bos, self.bos_id)],
            )
        elif backend.num_special_tokens_to_add(False):
            backend.post_processor = None
        config = {**self._config(), "add_bos_token": prepend_bos}
        files: Files = {**self._files, TOKENIZER_CONFIG_FILE: config}
        return Tokenizer(backend, self.eos_token, files, bos_token=self.bos_token)

    def prompt_ids(self, text: str) -> list[int]:
        """What a model continues as documents of its data do: `text`, after the start-of-document
        token where they start with it; without both, the end-of-document token, if there is one."""
        ids = self.encode_batch([text])[0].tolist() if text else []
        if self.prepends_bos:
            return [self.bos_id, *ids]
        return ids or ([self.eos_id] if self.eos_id is not None else [])

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """Ids of each text as ordinary text, without any control token; uint32 arrays."""
        found = self._fast.encode_batch(texts) if self._fast is not None else None
        return self.plain_ids(texts) if found is None else found

    def plain_ids(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """What `encode_batch` gives, made by `tokenizers` alone."""
        import numpy as np

        with guard("dataset.tokenizer", DataError, problem=_CANNOT_ENCODE):
            encodings = self._ordinary.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_offsets(
        self, texts: Sequence[str], *, special_tokens: bool
    ) -> "list[tuple[np.ndarray, np.ndarray]]":
        """Ids of each text, `(n,)` uint32, and which characters each of them stands for, `(n, 2)`
        int64: the first, and one past the last. Tokens of parts of one character share it.

        Args:
            special_tokens: the names of control tokens in the texts become these tokens. For text
                that a trusted template has rendered; never for documents.
        """
        import numpy as np

        backend = self._with_controls if special_tokens else self._without_controls
        with guard("dataset.tokenizer", DataError, problem=_CANNOT_ENCODE):
            encodings = backend.encode_batch(list(texts), add_special_tokens=False)
        ids = (np.array(encoding.ids, dtype=np.uint32) for encoding in encodings)
        offsets = (np.array(e.offsets, dtype=np.int64).reshape(-1, 2) for e in encodings)
        return list(zip(ids, offsets, strict=True))

    @property
    def ordinary_backend(self) -> "BackendTokenizer":
        """What encodes ordinary text; not to be changed."""
        return self._ordinary

    def decode(self, ids: "Iterable[int]") -> str:
        """The text of `ids`; control tokens are shown by their names."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and what belongs to them into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            elif isinstance(content, str):
                write_atomic(folder / name, content.encode())
            else:
                write_json_atomic(folder / name, content)
        self._backend.save(str(folder / TOKENIZER_FILE))

    def _config(self) -> dict[str, Any]:
        return settings_of(self._files)

    @functools.cached_property
    def _fast(self) -> FastBPE | None:
        return fast_bpe(self._ordinary)

    @functools.cached_property
    def _with_controls(self) -> "BackendTokenizer":
        return backends.offsets_backend(self._backend, encode_special_tokens=False)

    @functools.cached_property
    def _without_controls(self) -> "BackendTokenizer":
        return backends.offsets_backend(self._ordinary, encode_special_tokens=True)


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    def __init__(self, files: Files | None = None) -> None:
        from tokenizers import Tokenizer as BackendTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        backend = BackendTokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([EOS_TOKEN])
        own: Files = {TOKENIZER_CONFIG_FILE: {**fast_config(), BYTE_MARK: True}}
        super().__init__(backend, EOS_TOKEN, files or own)

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """Bytes of each text; uint8 arrays."""
        import numpy as np

        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def is_outgrown_by(self, backend: "BackendTokenizer") -> bool:
        """Whether `backend` is this one with added tokens, which this kind does not have."""
        ours, theirs = (b.get_vocab(with_added_tokens=True) for b in (self._backend, backend))
        return ours.items() < theirs.items()


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
        initial_alphabet=byte_characters(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, EOS_TOKEN, {TOKENIZER_CONFIG_FILE: fast_config()})


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`, or any Hugging Face folder.
    DataError when there is no usable tokenizer.json."""
    return load_file(Path(folder) / TOKENIZER_FILE)


def load_file(
    path: Path, *, eos_token: str | None = None, bos_token: str | None = None
) -> Tokenizer:
    """The tokenizer of a tokenizer.json and the files beside it; DataError where it is missing or
    cannot be read. `eos_token` and `bos_token` replace those that tokenizer_config.json names."""
    files = companions_of(path.parent)
    config = read_json(path.with_name(TOKENIZER_CONFIG_FILE))
    if config.get(BYTE_MARK):
        plain = ByteTokenizer(files)
        if not path.is_file() or not plain.is_outgrown_by(backends.read_backend(path, config)):
            return plain
    if not path.is_file():
        raise DataError(f"{path}: no such file; a tokenizer folder needs {TOKENIZER_FILE}")
    backend = backends.read_backend(path, config)
    tokens_map = read_json(path.with_name(SPECIAL_TOKENS_FILE))
    own = {
        key: _token_text(config.get(key) or tokens_map.get(key))
        for key in ("eos_token", "bos_token")
    }
    chosen = {"eos_token": eos_token or own["eos_token"], "bos_token": bos_token}
    if bos_token is None:
        # Some configs name a start token that the vocabulary lacks; nobody has asked for it.
        is_token = own["bos_token"] and backend.token_to_id(own["bos_token"]) is not None
        chosen["bos_token"] = own["bos_token"] if is_token else None
    if not config or chosen != own:
        files[TOKENIZER_CONFIG_FILE] = {**(config or fast_config()), **chosen}
    return Tokenizer(backend, chosen["eos_token"], files, bos_token=chosen["bos_token"])


def fast_config(eos_token: str | None = EOS_TOKEN, bos_token: str | None = None) -> dict[str, Any]:
    """Content of a tokenizer_config.json for a tokenizer.json that says all else."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "clean_up_tokenization_spaces": False,
    }
    return config if bos_token is None else {**config, "bos_token": bos_token}


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token

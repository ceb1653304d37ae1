"""What is asked of a tokenizer of the `tokenizers` library that may come from elsewhere.

Ordinary text stays ordinary: no text becomes a control token because it spells its name. The
library can leave such names alone when it looks for added tokens (`encode_special_tokens`). That is
enough where the model itself cannot make them, as in byte-level BPE. Others can: a unigram or
word-level vocabulary holds `</s>` as an entry like any other. For them, text is encoded by a twin
of the tokenizer whose control tokens have names that no text has; ids stay what they are.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.errors import DataError, ToolkitError
from toolkit.storage.foreign import check_regular, decode_json, guard, read_bytes

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer as BackendTokenizer

MAX_TOKENIZER_BYTES = 1 << 29
"""Of a tokenizer.json; those of 256,000 tokens have 33 MB."""
MAX_VOCAB_SIZE = 10_000_000
MAX_PADDING = 1 << 20
_DESCRIBING = (".json", ".jinja", ".txt", ".model", ".bpe", ".tiktoken")
"""Endings of files that describe a model or a tokenizer."""
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def read_backend(path: Path, config: Mapping[str, Any]) -> "BackendTokenizer":
    """The tokenizer of a tokenizer.json; DataError where it holds something else. Tokens that only
    `config`, the tokenizer_config.json beside it, lists (`added_tokens_decoder`) are added, as
    `transformers` does, where they get the ids that it gives them."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as BackendTokenizer

    data = check_tokenizer_file(path)
    with guard(path, DataError, problem="not a tokenizer that can be read"):
        backend = BackendTokenizer.from_str(data.decode())
        # Some files are read without an error and make native code panic at the first text.
        backend.decode(backend.encode("a A1\n").ids)
        largest = largest_id(backend)
        if largest >= MAX_VOCAB_SIZE:
            raise DataError(
                f"{path}: a token has id {largest:,}, which is larger than any vocabulary (at most "
                f"{MAX_VOCAB_SIZE:,} ids)"
            )
    with guard(path.with_name("tokenizer_config.json"), DataError, problem="added_tokens_decoder"):
        listed = config.get("added_tokens_decoder") or {}
        for number in sorted(map(int, listed)):
            entry = listed[str(number)]
            is_next = number == backend.get_vocab_size(with_added_tokens=True)
            if is_next and backend.token_to_id(entry["content"]) is None:
                flags = {name: entry[name] for name in _TOKEN_FLAGS if name in entry}
                backend.add_tokens([AddedToken(entry["content"], **flags)])
    return backend


class _Padded(msgspec.Struct):
    """The part of a tokenizer.json that decides how much memory a text takes."""

    padding: Any = None


def check_tokenizer_file(path: Path) -> bytes:
    """The content of a tokenizer.json, before a library makes anything of it.

    Raises:
        FileNotFoundError: there is none.
        DataError: it cannot be read, or pads texts to a length that ends the process.
    """
    data = read_bytes(path, DataError, max_bytes=MAX_TOKENIZER_BYTES)
    found = decode_json(data, path, DataError, _Padded)
    for number in _whole_numbers(found.padding):
        if number > MAX_PADDING:
            raise DataError(f"{path}: pads texts to {number:,} tokens; remove its padding")
    return data


def _whole_numbers(value: Any) -> list[int]:
    if isinstance(value, dict):
        return [number for inner in value.values() for number in _whole_numbers(inner)]
    return [value] if isinstance(value, int) else []


def check_size(path: Path, kind: type[ToolkitError]) -> None:
    """Raise `kind` unless `path` is a file of a size that can be read."""
    size = check_regular(path, kind)
    if size > MAX_TOKENIZER_BYTES:
        raise kind(f"{path}: has {size:,} bytes, which no such file needs")


def check_small_files(folder: Path, kind: type[ToolkitError]) -> None:
    """Check, before another library opens them, that the files of a folder that describe a model
    or a tokenizer are no pipes or devices, and of a size that can be read; else raise `kind`."""
    with guard(folder, kind):
        for path in sorted(folder.iterdir()):
            if path.suffix in _DESCRIBING and not path.is_dir():
                check_size(path, kind)


def largest_id(backend: "BackendTokenizer") -> int:
    """Published vocabularies have gaps: it may be more than the number of entries."""
    return max(backend.get_vocab(with_added_tokens=True).values(), default=0)


def control_id(backend: "BackendTokenizer", key: str, token: str | None) -> int | None:
    """The id of `token`, a control token from now on; DataError, for the setting `key`, where there
    is no such token."""
    if token is None:
        return None
    token_id = backend.token_to_id(token)
    if token_id is None:
        raise DataError(
            f"dataset.tokenizer.{key}: the tokenizer has no token {token!r}; "
            "give one of its special tokens"
        )
    # An entry of the vocabulary that no list of special tokens names: it keeps its id.
    backend.add_special_tokens([token])
    return token_id


def ordinary_backend(backend: "BackendTokenizer", more: Sequence[str]) -> "BackendTokenizer":
    """What encodes documents: `backend` itself where that is safe, or a twin of it. The tokens
    `more` count as control tokens whether they are marked so or not."""
    backend.encode_special_tokens = True
    added = backend.get_added_tokens_decoder().values()
    names = sorted({token.content for token in added if token.special}.union(more))
    ids = {backend.token_to_id(name) for name in names}
    texts = [text for name in names for text in (name, f" {name}", f"{name}a", f"a{name}b")]
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    if any(not ids.isdisjoint(encoding.ids) for encoding in encodings):
        return _twin(backend, set(names))
    return backend


def _twin(backend: "BackendTokenizer", names: set[str]) -> "BackendTokenizer":
    from tokenizers import Tokenizer as BackendTokenizer

    # Made up anew in every process, so that no document can be written to hold it.
    mark = secrets.token_hex(16)
    data: dict[str, Any] = msgspec.json.decode(backend.to_str())
    model = data["model"]

    def renamed(name: str) -> str:
        return f"{name}{mark}" if name in names else name

    for token in data["added_tokens"]:
        token["content"] = renamed(token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed(name): number for name, number in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed(name), score] for name, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed(model["unk_token"])
    if "merges" in model:
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.isdisjoint([*pair, "".join(pair)])]
    data["post_processor"] = None
    twin = BackendTokenizer.from_str(msgspec.json.encode(data).decode())
    twin.encode_special_tokens = True
    return twin


def offsets_backend(
    backend: "BackendTokenizer", *, encode_special_tokens: bool
) -> "BackendTokenizer":
    """A copy that gives offsets. Whether control tokens are read is a property of the whole
    backend, and other threads may be encoding documents."""
    from tokenizers import Tokenizer as BackendTokenizer

    own = BackendTokenizer.from_str(backend.to_str())
    # A byte-level one takes the spaces out of the offsets.
    own.post_processor = None
    own.encode_special_tokens = encode_special_tokens
    return own


def token_bytes(backend: "BackendTokenizer") -> "np.ndarray":
    """UTF-8 bytes of each id's text, int32 of shape `(vocab_size,)`; 0 for control tokens and ids
    that are none.

    Exact for byte-level vocabularies, whose tokens have one character for each byte. Elsewhere a
    space that the tokenizer puts before a text counts too, and normalisation does not.
    """
    import numpy as np

    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    decoder = backend.decoder
    is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
    sizes = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=np.int32)
    for token, number in vocabulary.items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(token.encode())
        elif is_byte_level:
            sizes[number] = len(token)
        elif _BYTE.fullmatch(token):
            sizes[number] = 1
        else:
            text = token.removeprefix("##").replace("▁", " ")
            sizes[number] = len(text.encode("utf-8", "surrogatepass"))
    return sizes

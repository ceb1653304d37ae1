"""What `tokenizers` makes of a tokenizer.json that may come from elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.errors import DataError, ToolkitError
from toolkit.storage.foreign import check_regular, decode_json, guard, read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

MAX_TOKENIZER_BYTES = 1 << 29
"""Of a tokenizer.json; those of 256,000 tokens have 33 MB."""
MAX_VOCAB_SIZE = 10_000_000
MAX_PADDING = 1 << 20
_DESCRIBING = (".json", ".jinja", ".txt", ".model", ".bpe", ".tiktoken")
"""Endings of files that describe a model or a tokenizer."""
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_backend(path: Path, config: Mapping[str, Any]) -> "BackendTokenizer":
    """The tokenizer of a tokenizer.json.

    Args:
        config: content of the tokenizer_config.json beside it. Tokens that only this lists
            (`added_tokens_decoder`) are added, as `transformers` does, where they get the ids that
            it gives them.

    Raises:
        DataError: one of the two holds something else.
    """
    from tokenizers import Tokenizer as BackendTokenizer

    data = check_tokenizer_file(path)
    with guard(path, DataError, problem="not a tokenizer that can be read"):
        backend = BackendTokenizer.from_str(data.decode())
        # Some files are read without an error and make native code panic at the first text.
        backend.decode(backend.encode("a A1\n").ids)
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= MAX_VOCAB_SIZE:
            raise DataError(
                f"{path}: a token has id {largest:,}, which is larger than any vocabulary (at most "
                f"{MAX_VOCAB_SIZE:,} ids)"
            )
    with guard(path.with_name("tokenizer_config.json"), DataError, problem="added_tokens_decoder"):
        _add_listed(backend, config.get("added_tokens_decoder") or {})
    return backend


def _add_listed(backend: "BackendTokenizer", listed: Mapping[str, Any]) -> None:
    from tokenizers import AddedToken

    for number in sorted(map(int, listed)):
        entry = listed[str(number)]
        is_next = number == backend.get_vocab_size(with_added_tokens=True)
        if is_next and backend.token_to_id(entry["content"]) is None:
            flags = {name: entry[name] for name in _TOKEN_FLAGS if name in entry}
            backend.add_tokens([AddedToken(entry["content"], **flags)])


def check_tokenizer_file(path: Path) -> bytes:
    """The content of a tokenizer.json, before a library makes anything of it.

    Raises:
        FileNotFoundError: there is none.
        DataError: it cannot be read, or pads texts to a length that ends the process.
    """
    data = read_bytes(path, DataError, max_bytes=MAX_TOKENIZER_BYTES)
    found = decode_json(data, path, DataError, _Padded)
    numbers = [number for number in _whole_numbers(found.padding) if number > MAX_PADDING]
    if numbers:
        raise DataError(f"{path}: pads texts to {numbers[0]:,} tokens; remove its padding")
    return data


class _Padded(msgspec.Struct):
    """The part of a tokenizer.json that decides how much memory a text takes."""

    padding: Any = None


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
    or a tokenizer are files, and of a size that can be read.

    Raises:
        kind: one is a pipe, a device, or too large.
    """
    with guard(folder, kind):
        for path in sorted(folder.iterdir()):
            if path.suffix not in _DESCRIBING or path.is_dir():
                continue
            check_size(path, kind)

"""What `tokenizers` makes of a tokenizer.json that may come from elsewhere."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import DataError
from toolkit.storage.foreign import guard, read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

MAX_TOKENIZER_BYTES = 1 << 29
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

    data = read_bytes(path, DataError, max_bytes=MAX_TOKENIZER_BYTES)
    with guard(path, DataError, problem="not a tokenizer that can be read"):
        backend = BackendTokenizer.from_str(data.decode())
        # Some files are read without an error and make native code panic at the first text.
        backend.decode(backend.encode("a A1\n").ids)
        backend.get_vocab_size()
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

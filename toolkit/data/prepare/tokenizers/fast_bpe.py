"""Byte-level BPE of GPT-2's kind through `tiktoken`, which is two to three times as fast as
`tokenizers`; the ids are the same.

They are the same because of three facts that are checked for each tokenizer, and one that is tested
for every Unicode character (how both libraries cut text into words by GPT-2's pattern):

- All 256 bytes are tokens, and every other token is made by exactly one merge. `tokenizers` joins
  pairs in the order of merges, `tiktoken` in the order of their results: one order.
- `tiktoken` may join any two neighbours whose bytes together are a token; `tokenizers` only the
  pair of a merge. Merges that do not cross the ends of a token go on as if it stood alone, so if a
  token, encoded alone, becomes itself, no other pair of neighbours can ever make it up. Tokens for
  which that is not so are never made, and are left out of the table.
- Nothing else touches the text: no normalizer, no added tokens that are not control tokens, no
  dropout.

Where one of these does not hold, or `tiktoken` is not installed, there is no fast way and
`tokenizers` is used.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from toolkit.threads import ThreadPool

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer as BackendTokenizer

GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"
"""GPT-2's words. What needs no look ahead stands in one group, which the library then matches at
once and not one alternative after the other; the last alternative only ever meets one character.
"""
_NOBODYS_TOKEN = "\U0010ffff"
"""A control token that is never asked for. Where there is none, the library looks for the empty
text at every byte. It is no character, and one is found fast."""
_PLAIN_MODEL = {
    "type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False,
    "ignore_merges": False,
}  # fmt: skip


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the order of the bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class FastBPE:
    """Encodes ordinary text."""

    def __init__(self, ranks: dict[bytes, int], ids: "np.ndarray") -> None:
        """`ranks`: order of merging by the bytes of each token; `ids`: the id of each rank."""
        import tiktoken

        self._encoding = tiktoken.Encoding(
            "toolkit",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={_NOBODYS_TOKEN: len(ids)},
        )
        self._ids = ids
        # As for `tokenizers`: one thread where many processes share the cores.
        is_parallel = os.environ.get("TOKENIZERS_PARALLELISM", "true") != "false"
        threads = int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count() or 1)
        self._pool = ThreadPool(threads) if is_parallel and threads > 1 else None

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray] | None":
        """Ids of each text, uint32; None where the library gives up (its patterns have limits)."""
        run: Any = self._pool.map if self._pool is not None and len(texts) > 1 else map
        try:
            return list(run(self._encode, texts))
        except BaseException as error:
            # The library is written in Rust, whose panics are no `Exception` in Python.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                return None
            raise

    def _encode(self, text: str) -> "np.ndarray":
        return self._ids[self._encoding.encode_to_numpy(text, disallowed_special=())]


def fast_bpe(backend: "BackendTokenizer") -> FastBPE | None:
    """The fast way for a tokenizer, where there is one."""
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        return None
    content = msgspec.json.decode(backend.to_str().encode())
    if not _is_plain(content):
        return None
    table = _ranks(content["model"], backend)
    return None if table is None else FastBPE(*table)


def _is_plain(content: dict[str, Any]) -> bool:
    model, cutting = content["model"], content["pre_tokenizer"] or {}
    return (
        content["normalizer"] is None
        and is_plain_model(model)
        and cutting.get("type") == "ByteLevel"
        and not cutting.get("add_prefix_space", True)
        and cutting.get("use_regex", True)
        and all(token["special"] for token in content["added_tokens"])
    )


def is_plain_model(model: dict[str, Any]) -> bool:
    """Whether the model of a tokenizer.json merges pairs of its tokens and does nothing else.
    GPT-2's own file has empty prefixes and suffixes, which change nothing."""
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    return not any(model.get(name) for name in affixes) and all(
        model.get(name) == value for name, value in _PLAIN_MODEL.items()
    )


def _ranks(
    model: dict[str, Any], backend: "BackendTokenizer"
) -> "tuple[dict[bytes, int], np.ndarray] | None":
    import numpy as np

    vocabulary: dict[str, int] = model["vocab"]
    characters = byte_characters()
    as_latin = {ord(character): byte for byte, character in enumerate(characters)}
    merged = [
        "".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)
        for merge in model["merges"]
    ]
    order = characters + merged
    if len(set(order)) != len(order) or not vocabulary.keys() >= set(order):
        return None
    ranks: dict[bytes, int] = {}
    for rank, token in enumerate(order):
        # Joined alone, a token that can be made at all becomes itself.
        if len(token) > 1 and len(backend.model.tokenize(token)) != 1:
            continue
        ranks[token.translate(as_latin).encode("latin-1")] = rank
    return ranks, np.array([vocabulary[token] for token in order], dtype=np.uint32)

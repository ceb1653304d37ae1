"""Byte-level BPE of much text through `fastokens` (optional), which is 4 to 30 times as fast as the
ways that need no such library; the ids are the same.

It is taken only for tokenizers of the kinds whose ids were compared, for every Unicode character
and for strings made to be hard: GPT-2's pattern and `KNOWN_PATTERNS`. In every process its ids for
the first documents are compared with those of `tokenizers` once more (`IdsDiffer`). It remembers
words, with no bound that it promises, so it is made anew when the process has grown.
"""

import importlib.metadata
import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from toolkit.data.prepare.tokenizers.converted import PATTERNS
from toolkit.data.prepare.tokenizers.fast_bpe import byte_characters, is_plain_model
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.errors import ToolkitError
from toolkit.threads import ThreadPool

if TYPE_CHECKING:
    import numpy as np

RELEASES = ("0.3.5",)
"""Of the library, whose ids were compared. A longer list needs the same comparisons."""
CHECKED_CHARACTERS = 1 << 17
"""Of the first documents of a process; takes some hundredths of a second."""
MAX_GROWTH = 128 << 20
"""Bytes by which the process may grow before the library's tokenizer is made anew."""
LOOK_CHARACTERS = 1 << 24
"""Characters between two looks at the size of the process: making a tokenizer anew takes as long as
encoding three times as many."""

KNOWN_PATTERNS = {
    "cl100k": PATTERNS["cl100k_base"],  # and Llama 3's
    "o200k": PATTERNS["o200k_base"],
    "qwen2": PATTERNS["cl100k_base"].replace(r"\p{N}{1,3}", r"\p{N}"),
}
"""Beside GPT-2's, by name."""
NFC = {"type": "NFC"}
LONG_S = "\N{LATIN SMALL LETTER LONG S}"
"""An `s` where case is ignored. By `o200k` the library does not take it for one."""


class IdsDiffer(ToolkitError):
    """`fastokens` gives other ids than `tokenizers`."""


class BulkEncoder:
    """Ids of documents as `Tokenizer.encode_batch` gives them, faster."""

    def __init__(self, tokenizer: Tokenizer, content: str, left_alone: str | None = None) -> None:
        """`content`: the tokenizer.json of what encodes ordinary text, without a normalizer;
        `left_alone`: a character whose texts the library does not get."""
        self._tokenizer, self._content, self._left_alone = tokenizer, content, left_alone
        # Releases of Unicode differ in it, so the library does not do it.
        self._normalizer = tokenizer.ordinary_backend.normalizer
        self._to_check = CHECKED_CHARACTERS
        # As for `tokenizers`: one thread where many processes share the cores. Those of the library
        # cut a long text, and are left alone.
        os.environ["FASTOKENS_BPE_THREADS"] = "1"
        is_parallel = os.environ.get("TOKENIZERS_PARALLELISM", "true") != "false"
        self._threads = int(os.environ.get("RAYON_NUM_THREADS") or os.cpu_count() or 1)
        self._pool = ThreadPool(self._threads) if is_parallel and self._threads > 1 else None
        self._library: Any = None
        self._to_look = self._allowed = 0
        self._renew()

    def __call__(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """Raises IdsDiffer, or DataError where no library encodes a text."""
        if not texts:
            return []
        if self._left_alone is not None and any(self._left_alone in text for text in texts):
            return self._tokenizer.encode_batch(texts)
        if self._to_check > 0:
            self._check(texts)
        self._to_look -= sum(map(len, texts))
        if self._to_look <= 0:
            if psutil.Process().memory_info().rss > self._allowed:
                self._renew()
            self._to_look = LOOK_CHARACTERS
        found = self._encode(texts)
        return self._tokenizer.encode_batch(texts) if found is None else found

    def _renew(self) -> None:
        import fastokens

        self._library = None  # else there are two for a moment
        self._library = fastokens.Tokenizer.from_json_str(self._content)
        self._to_look = LOOK_CHARACTERS
        self._allowed = psutil.Process().memory_info().rss + MAX_GROWTH

    def _encode(self, texts: Sequence[str]) -> "list[np.ndarray] | None":
        """None where the library gives up."""
        try:
            if self._pool is None or len(texts) < self._threads:
                return self._encode_some(texts)
            share = -(-len(texts) // self._threads)
            shares = [texts[n : n + share] for n in range(0, len(texts), share)]
            return list(itertools.chain(*self._pool.map(self._encode_some, shares)))
        except BaseException as error:
            # The library is written in Rust, whose panics are no `Exception` in Python.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                return None
            raise

    def _encode_some(self, texts: Sequence[str]) -> "list[np.ndarray]":
        import numpy as np

        library, normalizer = self._library, self._normalizer
        if normalizer is not None:
            texts = [t if t.isascii() else normalizer.normalize_str(t) for t in texts]
        data, ends = library.encode_batch_flat(list(texts), split_special_tokens=True)
        ids = np.frombuffer(data, dtype="<u4")
        return np.split(ids, np.frombuffer(ends, dtype="<u8")[1:-1].astype(np.int64))

    def _check(self, texts: Sequence[str]) -> None:
        some = []
        for text in texts:
            if self._to_check <= 0:
                break
            some.append(text[: self._to_check])
            self._to_check -= len(some[-1])
        found = self._encode(some)
        if found is None:
            return
        wanted = self._tokenizer.plain_ids(some)
        if any(a.tolist() != b.tolist() for a, b in zip(found, wanted, strict=True)):
            raise IdsDiffer(
                "fastokens gives other ids than tokenizers for this text; it is left alone, which "
                "takes longer"
            )


def bulk_encoder(tokenizer: Tokenizer) -> BulkEncoder | None:
    """The fast way for a tokenizer; None where there is none, or the library is not installed."""
    try:
        import fastokens  # noqa: F401

        release = importlib.metadata.version("fastokens")
    except ImportError:
        return None
    if release not in RELEASES:
        return None
    data = tokenizer.ordinary_backend.to_str()
    content = msgspec.json.decode(data.encode(), type=_Content)
    if not _is_known(content) or any(tokenizer.id_of(c) is None for c in byte_characters()):
        return None
    if content.normalizer is not None:
        data = msgspec.json.encode(msgspec.json.decode(data) | {"normalizer": None}).decode()
    left_alone = LONG_S if _pattern(content) == "o200k" else None
    try:
        return BulkEncoder(tokenizer, data, left_alone)
    except Exception:  # the library does not read it
        return None


class _Content(msgspec.Struct):
    """The part of a tokenizer.json that decides whether its ids are known to be equal."""

    model: dict[str, Any]
    normalizer: Any = None
    pre_tokenizer: Any = None
    added_tokens: list[dict[str, Any]] = []


def _is_known(content: _Content) -> bool:
    model = content.model | {"ignore_merges": False}  # either way
    return (
        content.normalizer in (None, NFC)
        and is_plain_model(model)
        and all(token["special"] for token in content.added_tokens)
        and (_is_byte_level(content.pre_tokenizer, cuts=True) or _pattern(content) is not None)
    )


def _is_byte_level(step: Any, *, cuts: bool) -> bool:
    """Whether GPT-2's stand-ins for bytes are made, and text is cut by GPT-2's pattern or not."""
    return (
        isinstance(step, dict)
        and step.get("type") == "ByteLevel"
        and not step.get("add_prefix_space", True)
        and step.get("use_regex", True) == cuts
    )


def _pattern(content: _Content) -> str | None:
    """The name of the pattern that cuts text, where it is one of `KNOWN_PATTERNS`."""
    match content.pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": pattern},
                last,
            ],
        } if _is_byte_level(last, cuts=False):
            for name, known in KNOWN_PATTERNS.items():
                if pattern == {"Regex": known}:
                    return name
    return None

"""Rank files of tiktoken as byte-level BPE that `tokenizers` runs, with the same ids.

tiktoken merges the neighbours whose bytes together have the lowest rank, the leftmost first, and
takes a whole piece of text that has a rank as it is. `tokenizers` wants the two parts of every
merge. They follow from the ranks: encode a token's bytes with the ranks below its own, and what is
left just before the last merge are its parts. Tokens that leave more than two only ever appear as
whole pieces (`ignore_merges`).
"""

import base64
import binascii
import itertools
from pathlib import Path

from toolkit.data.prepare.tokenizers.byte import byte_characters
from toolkit.data.prepare.tokenizers.companions import TOKENIZER_CONFIG_FILE
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, fast_config
from toolkit.data.tokenizer_config import TiktokenTokenizerConfig
from toolkit.errors import ConfigError, DataError
from toolkit.storage.foreign import read_bytes

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "gpt2": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    "cl100k_base": _LLAMA3,
    "o200k_base": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama3": _LLAMA3,
}
"""How published rank files cut text before merging."""


def load_tiktoken(config: TiktokenTokenizerConfig) -> Tokenizer:
    """The tokenizer of a rank file.

    Special tokens get the ids after the last rank.

    Raises:
        ConfigError: the pattern or a special token cannot be used.
        DataError: the file is missing or damaged; names the line.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as BackendTokenizer

    ranks = read_ranks(Path(config.path).expanduser())
    characters = byte_characters()

    def spelled(token: bytes) -> str:
        return "".join([characters[byte] for byte in token])

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    first_special = max(ranks.values()) + 1
    for number, name in enumerate(config.special_tokens):
        if name in vocabulary:
            raise ConfigError(
                f"dataset.tokenizer.special_tokens: {name!r} is an ordinary token of "
                f"{config.path}, or given twice; choose another name"
            )
        vocabulary[name] = first_special + number
    pattern = PATTERNS.get(config.pattern, config.pattern)
    if pattern is config.pattern and config.pattern.replace("_", "").replace("-", "").isalnum():
        raise ConfigError(
            f"dataset.tokenizer.pattern: no pattern is called {config.pattern!r}; known: "
            f"{', '.join(PATTERNS)}; or give a regular expression"
        )
    try:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    except Exception as error:  # `tokenizers` raises bare Exception
        raise ConfigError(f"dataset.tokenizer.pattern: not a regular expression: {error}") from None
    merges = [(spelled(left), spelled(right)) for left, right in _merges(ranks)]
    backend = BackendTokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(config.special_tokens))
    files = fast_config(config.eos_token, config.bos_token)
    return Tokenizer(
        backend, config.eos_token, {TOKENIZER_CONFIG_FILE: files}, bos_token=config.bos_token
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of each token and its rank, in the order of ranks.

    Raises:
        DataError: the file is missing, a line is damaged, or one of the 256 bytes has no rank.
    """
    try:
        lines = read_bytes(path, DataError).splitlines()
    except FileNotFoundError:
        raise DataError(
            f"dataset.tokenizer.path: {path}: No such file or directory; give a rank file of "
            "tiktoken"
        ) from None
    ranks: dict[bytes, int] = {}
    seen: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"dataset.tokenizer.path: {path}, line {number}"
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            shown = line[:40].decode(errors="replace")
            raise DataError(
                f"{where}: not base64 bytes and a rank: {shown!r}; get the file again"
            ) from None
        if not token or rank < 0:
            raise DataError(f"{where}: an empty token or a negative rank; get the file again")
        if token in ranks or rank in seen:
            raise DataError(
                f"{where}: token or rank {rank} was there before "
                f"(line {seen.get(rank, number)}); get the file again"
            )
        ranks[token], seen[rank] = rank, number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(
            f"dataset.tokenizer.path: {path}: {len(missing)} of the 256 bytes have no rank "
            f"(first: {missing[0]}); the file is cut off, or no rank file of tiktoken"
        )
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The parts of every token that is made by merging, in the order of ranks."""
    merges = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = _encode_below(ranks, token, rank)
        canonical = (parts[0], parts[1]) if len(parts) == 2 else None
        if canonical is not None:
            merges.append(canonical)
        # Files that were not trained as BPE may merge tokens of higher ranks into a lower one.
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            highest = max(ranks.get(part, -1) for part in pair)
            if pair != canonical and highest > rank and all(part in ranks for part in pair):
                merges.append(pair)
    return merges


def _encode_below(ranks: dict[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """BPE of `token` with the ranks below `limit`: lowest rank first, then leftmost."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        found = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        lowest = min(found)
        if lowest >= limit:
            break
        place = found.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts

"""Rank files of tiktoken and SentencePiece models as tokenizers that `tokenizers` runs, with the
same ids as the libraries that they were made for.

tiktoken merges the neighbours whose bytes together have the lowest rank, the leftmost first, and
takes a whole piece of text that has a rank as it is. `tokenizers` wants the two parts of every
merge. They follow from the ranks: encode a token's bytes with the ranks below its own, and what is
left just before the last merge are its parts. Tokens that leave more than two only ever appear as
whole pieces (`ignore_merges`).

What a SentencePiece model (BPE or unigram) says and what becomes of it:

- Its table of characters, removal of extra spaces, the space before the first word ("dummy
  prefix") and U+2581 in place of spaces: normalizers, in this order.
- Unigram: its pieces and scores. BPE: all ways to make a piece of two others, by score.
- Where no piece goes on after a space, text is cut there, which changes no id and lets `tokenizers`
  remember words.
- Byte fallback: characters without a piece become bytes; without it, one unknown token.
- Control pieces (`<s>`, `</s>`) are control tokens. Symbols that users defined stay pieces that
  always win.

The converters of `transformers` do the same for the models of known families; for others their ids
differ from those of the two libraries.
"""

import base64
import binascii
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.config import SentencePieceTokenizerConfig, TiktokenTokenizerConfig
from toolkit.data.prepare.tokenizers.companions import TOKENIZER_CONFIG_FILE, Files
from toolkit.data.prepare.tokenizers.fast_bpe import byte_characters
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, fast_config
from toolkit.errors import ConfigError, DataError
from toolkit.storage.foreign import read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

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
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)
UNIGRAM, BPE = 1, 2


def load_tiktoken(config: TiktokenTokenizerConfig) -> Tokenizer:
    """The tokenizer of a rank file; special tokens get the ids after the last rank.

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
    for number, name in enumerate(config.special_tokens, start=max(ranks.values()) + 1):
        if name in vocabulary:
            raise ConfigError(
                f"dataset.tokenizer.special_tokens: {name!r} is an ordinary token of "
                f"{config.path}, or given twice; choose another name"
            )
        vocabulary[name] = number
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
    files: Files = {TOKENIZER_CONFIG_FILE: fast_config(config.eos_token, config.bos_token)}
    return Tokenizer(backend, config.eos_token, files, bos_token=config.bos_token)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of each token and its rank, in the order of ranks. DataError where the file is missing,
    a line is damaged, or one of the 256 bytes has no rank."""
    ranks: dict[bytes, int] = {}
    seen: dict[int, int] = {}
    for number, line in enumerate(_read(path, "a rank file of tiktoken").splitlines(), start=1):
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


def _read(path: Path, kind: str) -> bytes:
    try:
        return read_bytes(path, DataError)
    except FileNotFoundError:
        raise DataError(
            f"dataset.tokenizer.path: {path}: No such file or directory; give {kind}"
        ) from None


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


def load_sentencepiece(config: SentencePieceTokenizerConfig) -> Tokenizer:
    """The tokenizer of a SentencePiece model.

    Raises:
        ConfigError: the library is not installed.
        DataError: the file is missing, damaged, or of a kind that `tokenizers` cannot run.
    """
    proto = _read_model(Path(config.path).expanduser())
    where = f"dataset.tokenizer.path: {config.path}"
    spec = proto.trainer_spec
    kinds = {UNIGRAM: _unigram, BPE: _bpe}
    if spec.model_type not in kinds or not proto.pieces:
        raise DataError(f"{where}: not a BPE or unigram model; these two can be read")
    if spec.treat_whitespace_as_suffix:
        raise DataError(f"{where}: puts spaces after words, which cannot be converted exactly")
    if any(piece.type == UNUSED for piece in proto.pieces):
        raise DataError(f"{where}: has pieces marked as unused, which cannot be converted exactly")
    backend = kinds[spec.model_type](proto)
    _add_text_rules(backend, proto)
    backend.add_special_tokens([p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN)])
    eos_token = config.eos_token or _piece(proto, spec.eos_id)
    bos_token = config.bos_token or _piece(proto, spec.bos_id)
    settings = {**fast_config(eos_token, bos_token), "unk_token": _piece(proto, spec.unk_id)}
    return Tokenizer(backend, eos_token, {TOKENIZER_CONFIG_FILE: settings}, bos_token=bos_token)


def _read_model(path: Path) -> Any:
    data = _read(path, "a SentencePiece model")
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ConfigError(
            "dataset.tokenizer: type sentencepiece needs the sentencepiece library; install "
            "toolkit[sentencepiece] (pip install sentencepiece protobuf)"
        ) from None
    except Exception as error:  # its protobuf is newer than the installed one
        raise ConfigError(
            f"dataset.tokenizer: type sentencepiece: importing the library fails: {error}; "
            "install a protobuf that goes with it (pip install -U sentencepiece protobuf)"
        ) from None
    # The module makes its classes when it is imported, unseen by type checkers.
    proto = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's class of errors differs between its implementations
        raise DataError(
            f"dataset.tokenizer.path: {path}: not a SentencePiece model, or damaged ({error}); "
            "get the file again"
        ) from None
    return proto


def _unigram(proto: Any) -> "BackendTokenizer":
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers import models

    best = max((piece.score for piece in proto.pieces if piece.type == NORMAL), default=0.0)
    # SentencePiece's own rule for a user's symbol makes it win over any other pieces.
    vocabulary = [
        (p.piece, len(p.piece.encode()) * best - 0.1 if p.type == USER_DEFINED else p.score)
        for p in proto.pieces
    ]
    spec = proto.trainer_spec
    model = models.Unigram(vocabulary, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    return BackendTokenizer(model)


def _bpe(proto: Any) -> "BackendTokenizer":
    from tokenizers import Tokenizer as BackendTokenizer
    from tokenizers import models

    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = [
        (-score, vocabulary[text], text[:cut], text[cut:])
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    model = models.BPE(
        vocab=vocabulary,
        merges=[(left, right) for *_, left, right in sorted(merges)],
        unk_token=_piece(proto, proto.trainer_spec.unk_id),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
        # Users' symbols are cut out as whole words; no merges make them.
        ignore_merges=any(piece.type == USER_DEFINED for piece in proto.pieces),
    )
    return BackendTokenizer(model)


def _add_text_rules(backend: "BackendTokenizer", proto: Any) -> None:
    """Normalizer, cuts and decoder."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = proto.normalizer_spec
    space = SPACE if spec.escape_whitespaces else " "
    rules: list[Any] = []
    if spec.precompiled_charsmap:
        rules.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        rules.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        rules.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        rules.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        rules.append(normalizers.Replace(" ", SPACE))
    if rules:
        backend.normalizer = normalizers.Sequence(rules)

    cuts: list[Any] = []
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    is_unigram = proto.trainer_spec.model_type == UNIGRAM
    if symbols and not is_unigram:
        longest_first = sorted(symbols, key=len, reverse=True)
        pattern = "|".join(re.escape(symbol) for symbol in longest_first)
        cuts.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    inside = re.compile(f"[^{space}]{space}")
    if not any(inside.search(p.piece) for p in proto.pieces if p.type in (NORMAL, USER_DEFINED)):
        words = Regex(f"{space}+[^{space}]*|[^{space}]+")
        cuts.append(pre_tokenizers.Split(words, "isolated"))
    if is_unigram and proto.trainer_spec.byte_fallback:
        # The name of a byte in a text is six characters, not that byte.
        cuts.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
    if cuts:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)

    parts: list[Any] = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)


def _piece(proto: Any, number: int) -> str | None:
    return proto.pieces[number].piece if 0 <= number < len(proto.pieces) else None

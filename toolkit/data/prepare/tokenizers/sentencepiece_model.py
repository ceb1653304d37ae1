"""SentencePiece models (BPE and unigram) as tokenizers that `tokenizers` runs, with the same ids.

What a model says and what becomes of it:

- Its table of characters, removal of extra spaces, the space before the first word ("dummy
  prefix") and U+2581 in place of spaces: normalizers, in this order.
- Unigram: its pieces and scores. BPE: all ways to make a piece of two others, by score.
- Where no piece goes on after a space, text is cut there, which changes no id and lets `tokenizers`
  remember words.
- Byte fallback: characters without a piece become bytes; without it, one unknown token.
- Control pieces (`<s>`, `</s>`) are control tokens. Symbols that users defined stay pieces that
  always win.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.data.prepare.tokenizers.companions import TOKENIZER_CONFIG_FILE
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, fast_config
from toolkit.data.tokenizer_config import SentencePieceTokenizerConfig
from toolkit.errors import ConfigError, DataError
from toolkit.storage.foreign import read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2


def load_sentencepiece(config: SentencePieceTokenizerConfig) -> Tokenizer:
    """The tokenizer of a SentencePiece model.

    Raises:
        ConfigError: the library is not installed.
        DataError: the file is missing, damaged, or of a kind that `tokenizers` cannot run.
    """
    proto = _read_model(Path(config.path).expanduser())
    where = f"dataset.tokenizer.path: {config.path}"
    kinds = {UNIGRAM: _unigram, BPE: _bpe}
    kind = proto.trainer_spec.model_type
    if kind not in kinds or not proto.pieces:
        raise DataError(f"{where}: not a BPE or unigram model; these two can be read")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise DataError(f"{where}: puts spaces after words, which cannot be converted exactly")
    if any(piece.type == UNUSED for piece in proto.pieces):
        raise DataError(f"{where}: has pieces marked as unused, which cannot be converted exactly")
    backend = kinds[kind](proto)
    _add_text_rules(backend, proto)
    controls = [piece.piece for piece in proto.pieces if piece.type in (CONTROL, UNKNOWN)]
    backend.add_special_tokens(controls)
    spec = proto.trainer_spec
    eos_token = config.eos_token or _piece(proto, spec.eos_id)
    bos_token = config.bos_token or _piece(proto, spec.bos_id)
    settings = {**fast_config(eos_token, bos_token), "unk_token": _piece(proto, spec.unk_id)}
    return Tokenizer(backend, eos_token, {TOKENIZER_CONFIG_FILE: settings}, bos_token=bos_token)


def _read_model(path: Path) -> Any:
    try:
        data = read_bytes(path, DataError)
    except FileNotFoundError:
        raise DataError(
            f"dataset.tokenizer.path: {path}: No such file or directory; give a SentencePiece model"
        ) from None
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ConfigError(
            "dataset.tokenizer: type sentencepiece needs the sentencepiece library; install "
            "toolkit[sentencepiece] (pip install sentencepiece protobuf)"
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

    normal = [piece.score for piece in proto.pieces if piece.type == NORMAL]
    best = max(normal, default=0.0)

    def score(piece: Any) -> float:
        # SentencePiece's own rule, which makes a user's symbol win over any other pieces.
        if piece.type == USER_DEFINED:
            return len(piece.piece.encode()) * best - 0.1
        return piece.score

    vocabulary = [(piece.piece, score(piece)) for piece in proto.pieces]
    model = models.Unigram(
        vocabulary,
        unk_id=proto.trainer_spec.unk_id,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
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

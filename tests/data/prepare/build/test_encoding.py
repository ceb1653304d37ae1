from pathlib import Path

import pytest

from tests.data.prepare.tokenizers.test_tokenizer_sentencepiece import EXACT, train
from toolkit.data.config import SentencePieceTokenizerConfig
from toolkit.data.prepare.build.encoding import TextEncoder
from toolkit.data.prepare.text.cuts import last_cut
from toolkit.data.prepare.text.reading import Piece
from toolkit.data.prepare.tokenizers.converted import load_sentencepiece
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer, Tokenizer

WORDS = "the cat sat on a mat, and  naïve dogs\n\tread größere Bücher.\n" * 20


def cut(text: str, size: int) -> list[Piece]:
    pieces, start = [], 0
    while start < len(text):
        end = start + size
        end = (last_cut(text, start, end) or end) if end < len(text) else len(text)
        pieces.append(Piece("a", text[start:end], starts=start == 0, ends=end == len(text)))
        start = end
    return pieces


def encoded(tokenizer: Tokenizer, pieces: list[Piece]) -> list[int]:
    return [i for found in TextEncoder(tokenizer).encode(pieces) for i in found.ids.tolist()]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "settings",
    [EXACT, {**EXACT, "add_dummy_prefix": False}, {**EXACT, "remove_extra_whitespaces": True}, {}],
    ids=["prefix", "no-prefix", "extra-spaces", "default"],
)
def test_no_space_is_put_between_pieces_of_one_text(
    tmp_path: Path, kind: str, settings: dict
) -> None:
    pytest.importorskip("sentencepiece", reason="trains a model")
    train(tmp_path / "m.model", kind, **{"vocab_size": 420 if settings else 120, **settings})
    tokenizer = load_sentencepiece(SentencePieceTokenizerConfig(path=str(tmp_path / "m.model")))
    whole = tokenizer.encode_batch([WORDS])[0].tolist()
    for size in (40, 41, 77, 300):
        pieces = cut(WORDS, size)
        assert len(pieces) > len(WORDS) / size
        assert encoded(tokenizer, pieces) == whole
    # Within a word tokens may differ, but the text does not.
    hard = [Piece("a", "größ", ends=False), Piece("a", "ere", starts=False)]
    assert tokenizer.decode(encoded(tokenizer, hard)).strip() == "größere"


def test_documents_of_one_piece_and_other_tokenizers_are_encoded_as_they_are() -> None:
    tokenizer = ByteTokenizer({})
    pieces = [Piece("a", "a\n", ends=False), Piece("a", "\nb", starts=False), Piece("b", "c")]
    assert bytes(encoded(tokenizer, pieces)) == b"a\n\nbc"

import io
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from toolkit.data.config import SentencePieceTokenizerConfig
from toolkit.data.prepare.tokenizers.converted import load_sentencepiece
from toolkit.data.prepare.tokenizers.tokenizer import load_tokenizer
from toolkit.errors import ConfigError, DataError

sentencepiece = pytest.importorskip("sentencepiece", reason="compares with the library itself")

EXACT: dict[str, Any] = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
PIECES = [
    " ", "   ", "\n", "\t", "a", "The", "the cat", "é", "e\u0301", "字", "字字", "🙂", "1", "2345",
    "<s>", "</s>", "<unk>", "<0x41>", "x<0x0A>", "\u2581", "ß", "\u3000", "\x00", "sat on",
]  # fmt: skip


def train(path: Path, kind: str, **settings: Any) -> "sentencepiece.SentencePieceProcessor":
    words = "the cat sat on a mat while naïve dogs read größere Bücher </s> (x+1) <html>".split()  # noqa: SIM905
    generator = random.Random(0)
    lines = ["  ".join(generator.choices(words, k=9)) for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=settings.pop("vocab_size", 420),
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def hard_texts(pieces: list[str]) -> list[str]:
    generator = random.Random(1)
    mixed = ["".join(generator.choices(pieces, k=k % 20)) for k in range(2000)]
    return [*pieces, *mixed, "</s>the cat", "the cat</s>"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "settings",
    [
        EXACT,
        {**EXACT, "add_dummy_prefix": False},
        {**EXACT, "split_by_whitespace": False},
        {**EXACT, "user_defined_symbols": ["<html>", "sat"]},
        {**EXACT, "byte_fallback": False},
        {**EXACT, "remove_extra_whitespaces": True},
    ],
    ids=["plain", "no-prefix", "across-spaces", "symbols", "unknown", "extra-spaces"],
)
def test_ids_are_those_of_sentencepiece(kind: str, settings: dict, tmp_path: Path) -> None:
    theirs = train(tmp_path / "m.model", kind, vocab_size=700, **settings)
    ours = load_sentencepiece(SentencePieceTokenizerConfig(path=str(tmp_path / "m.model")))
    # A literal U+2581 is a space to SentencePiece, and it also strips it.
    pieces = [p for p in PIECES if p != "\u2581" or not settings["remove_extra_whitespaces"]]
    texts = hard_texts(pieces)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs.encode(text), repr(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_default_normalization_is_applied(kind: str, tmp_path: Path) -> None:
    theirs = train(tmp_path / "m.model", kind, vocab_size=150)
    ours = load_sentencepiece(SentencePieceTokenizerConfig(path=str(tmp_path / "m.model")))
    texts = [
        "  the\tcat \n sat  ",
        "\ufb01ve ½ ①",
        "Ｔｈｅ cat",
        "e\u0301 größer",
        "\u3000a",
        "   ",
    ]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs.encode(text), repr(text)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_saved_model_loads_here_and_with_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = train(tmp_path / "m.model", kind, vocab_size=700, **EXACT)
    ours = load_sentencepiece(SentencePieceTokenizerConfig(path=str(tmp_path / "m.model")))
    assert (ours.bos_token, ours.bos_id) == ("<s>", theirs.bos_id())
    assert (ours.eos_token, ours.eos_id) == ("</s>", theirs.eos_id())
    assert ours.vocab_size == theirs.get_piece_size()
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    auto = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert (auto.bos_token_id, auto.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in ["the cat sat", "  größere 字 🙂\n", "x"]:
        ids = theirs.encode(text)
        assert again.encode_batch([text])[0].tolist() == ids
        assert auto(text, add_special_tokens=False)["input_ids"] == ids
        assert ours.decode(ids) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_control_pieces_in_text_stay_text(kind: str, tmp_path: Path) -> None:
    train(tmp_path / "m.model", kind, vocab_size=700, **EXACT)
    ours = load_sentencepiece(SentencePieceTokenizerConfig(path=str(tmp_path / "m.model")))
    text = "</s>the <s> cat</s> <0x41>"
    ids = ours.encode_batch([text])[0]
    assert not {ours.bos_id, ours.eos_id, 0}.intersection(ids.tolist())
    assert ours.decode(ids) == text
    [(controlled, offsets)] = ours.encode_offsets([text], special_tokens=True)
    places = [text[a:b] for i, (a, b) in zip(controlled, offsets, strict=True) if i == ours.eos_id]
    assert places == ["</s>", "</s>"]


def test_eos_and_bos_may_be_other_pieces(tmp_path: Path) -> None:
    train(tmp_path / "m.model", "bpe", vocab_size=700, control_symbols=["<end>"], **EXACT)
    config = SentencePieceTokenizerConfig(path=str(tmp_path / "m.model"), eos_token="<end>")
    tokenizer = load_sentencepiece(config)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (3, 1)
    wrong = SentencePieceTokenizerConfig(path=str(tmp_path / "m.model"), bos_token="<begin>")
    with pytest.raises(DataError, match="bos_token: the tokenizer has no token '<begin>'"):
        load_sentencepiece(wrong)


def test_bad_models_are_named(tmp_path: Path) -> None:
    def load(path: Path) -> None:
        load_sentencepiece(SentencePieceTokenizerConfig(path=str(path)))

    with pytest.raises(DataError, match="No such file"):
        load(tmp_path / "absent.model")
    (tmp_path / "text.model").write_text("not a model at all, but text")
    with pytest.raises(DataError, match="not a SentencePiece model, or damaged"):
        load(tmp_path / "text.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(DataError, match="not a BPE or unigram model"):
        load(tmp_path / "empty.model")
    train(tmp_path / "char.model", "char", vocab_size=60)
    with pytest.raises(DataError, match="not a BPE or unigram model"):
        load(tmp_path / "char.model")


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "m.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match=r"install toolkit\[sentencepiece\]"):
        load_sentencepiece(SentencePieceTokenizerConfig(path=str(tmp_path / "m.model")))


def test_a_library_newer_than_its_protobuf_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub(types.ModuleType):
        @property
        def sentencepiece_model_pb2(self) -> None:
            raise RuntimeError("gencode 7, runtime 6")

    (tmp_path / "m.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", Stub("sentencepiece"))
    with pytest.raises(ConfigError, match="gencode 7, runtime 6; install a protobuf"):
        load_sentencepiece(SentencePieceTokenizerConfig(path=str(tmp_path / "m.model")))

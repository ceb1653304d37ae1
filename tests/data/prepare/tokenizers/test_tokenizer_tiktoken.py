import base64
import random
from pathlib import Path

import numpy as np
import pytest

from toolkit.data.config import TiktokenTokenizerConfig
from toolkit.data.prepare.tokenizers.choice import build_tokenizer
from toolkit.data.prepare.tokenizers.converted import PATTERNS, load_tiktoken, read_ranks
from toolkit.data.prepare.tokenizers.fast_bpe import byte_characters
from toolkit.data.prepare.tokenizers.tokenizer import EOS_TOKEN, load_tokenizer, train_bpe
from toolkit.errors import ConfigError, DataError

PIECES = [
    " ", "  ", "\n", "\r\n", "\t", "a", "The", "the cat", "é", "e\u0301", "字", "🙂", "'s", "'LL",
    "ſ", "1", "2345", "<|", EOS_TOKEN, "한글", "ß", "İ", "\u3000", "\xa0", "\u0085", "x/", "/\n",
    "\x00", "\U0010ffff",
]  # fmt: skip


def hard_texts() -> list[str]:
    generator = random.Random(0)
    mixed = ["".join(generator.choices(PIECES, k=k % 30)) for k in range(3000)]
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    return [*mixed, *("".join(every[i : i + 997]) for i in range(0, len(every), 997))]


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranks of a small BPE: 256 bytes and 444 merges."""
    texts = ["the cat sat on the mat, 'tis 1234 times\n  said HE'LL go" * 9, "naïve 한글 한글 🙂🙂"]
    folder = tmp_path_factory.mktemp("ranks")
    backend = train_bpe([*texts, *hard_texts()[:900]], 701)._backend
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary = sorted(backend.get_vocab(with_added_tokens=False).items(), key=lambda e: e[1])
    tokens = [bytes(byte_of[c] for c in text) for text, _ in vocabulary if text != EOS_TOKEN]
    return write_ranks(folder / "small.tiktoken", tokens)


def write_ranks(path: Path, tokens: list[bytes]) -> Path:
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_ids_are_those_of_tiktoken(name: str, rank_file: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="compares with the tiktoken library")
    ours = load_tiktoken(TiktokenTokenizerConfig(path=str(rank_file), pattern=name))
    theirs = tiktoken.Encoding(
        name,
        pat_str=PATTERNS[name],
        mergeable_ranks=read_ranks(rank_file),
        special_tokens={EOS_TOKEN: 700},
    )
    texts = hard_texts()
    expected = theirs.encode_ordinary_batch(texts, num_threads=1)
    for text, ids, wanted in zip(texts, ours.encode_batch(texts), expected, strict=True):
        assert ids.tolist() == wanted, text
        assert ours.decode(ids) == text


def test_ranks_that_no_training_made_are_merged_as_tiktoken_does(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="compares with the tiktoken library")
    generator = random.Random(1)
    more = {"".join(generator.choices("abc", k=generator.randint(2, 6))) for _ in range(60)}
    tokens = [bytes([b]) for b in range(256)] + sorted(t.encode() for t in more)
    path = write_ranks(tmp_path / "odd.tiktoken", generator.sample(tokens, len(tokens)))
    ours = load_tiktoken(TiktokenTokenizerConfig(path=str(path)))
    theirs = tiktoken.Encoding(
        "odd", pat_str=PATTERNS["gpt2"], mergeable_ranks=read_ranks(path), special_tokens={}
    )
    # As many letters as a token has: longer ones may differ where no training made the ranks.
    texts = ["".join(generator.choices("abc", k=k % 6 + 1)) for k in range(500)]
    same = [
        ids.tolist() == theirs.encode_ordinary(text)
        for text, ids in zip(texts, ours.encode_batch(texts), strict=True)
    ]
    assert sum(same) == len(same)


def test_special_tokens_follow_the_last_rank_and_stay_text(rank_file: Path) -> None:
    from transformers import AutoTokenizer

    config = TiktokenTokenizerConfig(
        path=str(rank_file),
        pattern="llama3",
        special_tokens=("<|bos|>", "<|end|>", "stop"),
        eos_token="<|end|>",
        bos_token="<|bos|>",
    )
    tokenizer = build_tokenizer(config)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (700, 701, 703)
    text = "<|bos|>the cat<|end|> stop stop<|end|>"
    ids = tokenizer.encode_batch([text, "stop"])
    assert max(ids[0].max(), ids[1].max()) < 700
    assert tokenizer.decode(ids[0]) == text
    [(with_controls, _)] = tokenizer.encode_offsets([text], special_tokens=True)
    assert np.flatnonzero(with_controls == 701).size == 2
    folder = rank_file.parent / "saved"
    tokenizer.save(folder)
    again, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    assert (again.bos_id, again.eos_id) == (700, 701) == (theirs.bos_token_id, theirs.eos_token_id)
    assert again.fingerprint == tokenizer.fingerprint
    for hard in hard_texts()[:500]:
        expected = tokenizer.encode_batch([hard])[0].tolist()
        assert again.encode_batch([hard])[0].tolist() == expected
        assert theirs(hard, add_special_tokens=False)["input_ids"] == expected


def test_a_regular_expression_may_be_the_pattern(rank_file: Path) -> None:
    config = TiktokenTokenizerConfig(path=str(rank_file), pattern=r"\S|\s")
    tokenizer = load_tiktoken(config)
    assert len(tokenizer.encode_batch(["the cat"])[0]) == 7


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gpt5", r"pattern: no pattern is called 'gpt5'; known: gpt2, cl100k_base"),
        (r"(\S", "pattern: not a regular expression"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_named(pattern: str, message: str, rank_file) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tiktoken(TiktokenTokenizerConfig(path=str(rank_file), pattern=pattern))


def test_a_special_token_that_is_an_ordinary_one_is_refused(rank_file: Path) -> None:
    config = TiktokenTokenizerConfig(
        path=str(rank_file), special_tokens=(EOS_TOKEN, "the"), eos_token=EOS_TOKEN
    )
    with pytest.raises(ConfigError, match="special_tokens: 'the' is an ordinary token"):
        load_tiktoken(config)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"???= 300", r"line 258: not base64 bytes and a rank: '\?\?\?= 300'"),
        (b"dGhl", "line 258: not base64 bytes and a rank"),
        (b"dGhl x", "line 258: not base64 bytes and a rank"),
        (b"dGhl -4", "line 258: an empty token or a negative rank"),
        (b"dGhl 7", r"line 258: token or rank 7 was there before \(line 8\)"),
    ],
)
def test_a_damaged_line_is_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "bad.tiktoken", [bytes([b]) for b in range(256)] + [b"th"])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=message):
        read_ranks(path)


def test_a_rank_file_that_is_cut_off_or_missing_is_an_error(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "short.tiktoken", [bytes([b]) for b in range(200)])
    with pytest.raises(DataError, match=r"56 of the 256 bytes have no rank \(first: 200\)"):
        read_ranks(path)
    with pytest.raises(DataError, match="No such file"):
        read_ranks(tmp_path / "absent")

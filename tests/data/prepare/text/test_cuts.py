"""Pieces of long texts give the tokens of the text in one piece."""

import json
import random
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from tests.data.prepare.text.reading import read_all
from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.text import jsonl, long_documents, long_lines, plain, readers, shards
from toolkit.data.prepare.text.cuts import first_cut, last_cut
from toolkit.data.prepare.text.piece import Piece
from toolkit.data.prepare.tokenizers.bpe import train_bpe
from toolkit.data.prepare.tokenizers.byte import byte_characters
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def chinese(*, line_feeds: bool) -> str:
    """Sentences of a few hundred words of one to three characters, without blanks."""
    draw = random.Random(0)
    words = ["".join(chr(draw.randrange(0x4E00, 0x4F00)) for _ in range(1 + n % 3)) for n in
             range(300)]  # fmt: skip
    ends = "。\n" if line_feeds else "。"
    return "".join(
        "".join(draw.choices(words, k=9)) + draw.choice(["，", ends]) for _ in range(400)
    )


def corpus() -> dict[str, str]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    code = (stdlib / "argparse.py").read_text()
    return {
        "code": code,
        "tabs": code.replace("    ", "\t"),
        "paths": "\n".join(f"{line}\n/usr/{line}" for line in code.split() if line[0] != "'"),
        "prose": (Path(__file__).parents[4] / "README.md").read_text(),
        "chinese": chinese(line_feeds=True),
        "one line": chinese(line_feeds=False),
    }


TEXTS = corpus()


def byte_level(pattern: str | None) -> Tokenizer:
    """BPE over the corpus; words are those of `pattern` (None: GPT-2's)."""
    if pattern is None:
        return train_bpe(TEXTS.values(), 3000)
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=byte_characters(), show_progress=False
    )
    backend.train_from_iterator(TEXTS.values(), trainer)
    return Tokenizer(backend, None, {})


@pytest.fixture(scope="module", params=[None, CL100K, O200K], ids=["gpt2", "cl100k", "o200k"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return byte_level(request.param)


def read(folder: Path, name: str, content: str) -> list[Piece]:
    (folder / name).write_text(content, newline="")
    return read_all(FilesSourceConfig(paths=[str(folder / name)]))


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("way", ["rows", "long lines", "long ascii lines", "files"])
def test_ids_of_pieces_are_those_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, kind: str, way: str
) -> None:
    text = TEXTS[kind]
    for module in (readers, long_lines, long_documents):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 700)
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", 1300)
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 1300)
    monkeypatch.setattr(plain, "PIECE_BYTES", 700)
    if way == "files":
        pieces = read(tmp_path, "a.txt", text)
    else:
        monkeypatch.setattr(jsonl, "LONG_BYTES", 1 << 30 if way == "rows" else 1000)
        line = json.dumps({"text": text}, ensure_ascii=way == "long ascii lines")
        pieces = read(tmp_path, "a.jsonl", line)
    texts = [piece.text for piece in pieces]
    assert "".join(texts) == text
    assert len(texts) > len(text) / 2000
    assert max(map(len, texts)) < 1500
    ids = [token for found in tokenizer.encode_batch(texts) for token in found.tolist()]
    assert ids == tokenizer.encode_batch([text])[0].tolist()


def test_places_are_single_blanks_then_line_feeds_then_points() -> None:
    def places(text: str) -> tuple[int | None, int | None]:
        return first_cut(text, 1), last_cut(text, 0, len(text))

    assert places("one two three") == (3, 7)
    assert places("one  two\u3000 three") == (None, None)
    assert places("one\ntwo\nthree") == (4, 8)
    assert places("one\n two\n\nthree\r\n\tfour\n/five") == (None, None)
    assert places("中文，中文。中文") == (2, 5)
    assert places("中文。”中文") == (None, None)
    assert places("one\ntwo three\nfour") == (7, 7)

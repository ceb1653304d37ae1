"""Pieces of long texts give the tokens of the text in one piece."""

import json
import random
import sysconfig
from pathlib import Path

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from tests.data.corpus import files_config
from tests.data.prepare.text.reading import read_all
from toolkit.data.config import FilesSourceConfig, FiltersConfig
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.prepare.text import cuts, reading, sources
from toolkit.data.prepare.text.cuts import last_cut
from toolkit.data.prepare.text.reading import Counts, Piece
from toolkit.data.prepare.tokenizers.fast_bpe import byte_characters
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, train_bpe

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
@pytest.mark.parametrize("way", ["rows", "ascii rows", "files"])
def test_ids_of_pieces_are_those_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, kind: str, way: str
) -> None:
    text = TEXTS[kind]
    for module in (reading, cuts):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 700)
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 1300)
    monkeypatch.setattr(sources, "MAX_SHARD_BYTES", 1300)
    if way == "files":
        pieces = read(tmp_path, "a.txt", text)
    else:
        line = json.dumps({"text": text}, ensure_ascii=way == "ascii rows")
        pieces = read(tmp_path, "a.jsonl", line)
    texts = [piece.text for piece in pieces]
    assert "".join(texts) == text
    assert len(texts) > len(text) / 2000
    assert max(map(len, texts)) < 1500
    ids = [token for found in tokenizer.encode_batch(texts) for token in found.tolist()]
    assert ids == tokenizer.encode_batch([text])[0].tolist()


def test_places_are_single_blanks_then_line_feeds_then_points() -> None:
    def place(text: str) -> int | None:
        return last_cut(text, 0, len(text))

    assert place("one two three") == 7
    assert place("one  two\u3000 three") is None
    assert place("one\ntwo\nthree") == 8
    assert place("one\n two\n\nthree\r\n\tfour\n/five") is None
    assert place("中文，中文。中文") == 5
    assert place("中文。”中文") is None
    assert place("one\ntwo three\nfour") == 7


LONG_TEXTS = {
    "lines": "words of a line and \u4e2d\u6587\n" * 300,
    "no lines": "\u4e2d\U0001f600x" * 1500,
    "short": "as long as a document may be\n" * 10,
}


@pytest.mark.parametrize("kind", LONG_TEXTS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_a_long_document_becomes_several_which_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    for module in (reading, cuts):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1000)
    text = LONG_TEXTS[kind]
    rows = [{"text": "before"}, {"text": text}, {"text": "after"}]
    if name == "a.txt":
        (tmp_path / name).write_text(text)
    elif name == "a.parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    elif name == "a.json":
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = Counts()
    source = FilesSourceConfig(paths=[str(tmp_path / name)])
    pieces = read_all(source, counts, with_digests=True)
    if name != "a.txt":
        assert (pieces[0].text, pieces[-1].text) == ("before", "after")
        pieces = pieces[1:-1]
    documents: list[str] = []
    for piece in pieces:
        if piece.starts:
            documents.append("")
            assert piece.digest
        documents[-1] += piece.text
    assert "".join(documents) == text
    assert [piece.ends for piece in pieces].count(True) == len(documents)
    assert counts.cut_documents == len(documents) - 1
    assert len(documents) == {"lines": 8, "no lines": 12, "short": 1}[kind]
    sizes = [len(document.encode()) for document in documents]
    assert all(1000 <= size < 1030 for size in sizes[:-1])
    if kind == "lines":
        assert all(document.endswith("\n") for document in documents)
    # Each is a document of its own: what identifies it, and what filters see.
    assert len({piece.identity for piece in pieces if piece.starts}) == len(documents)
    kept = read_all(source, filters=FiltersConfig(max_characters=1010))
    assert len({piece.identity for piece in kept}) >= len(documents)


def test_a_held_out_end_is_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reading, cuts):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text(LONG_TEXTS["lines"])
    counts = Counts()
    pieces = read_all(FilesSourceConfig(paths=[str(tmp_path / "a.txt")]), counts, fraction=0.3)
    assert "".join(piece.text for piece in pieces) == LONG_TEXTS["lines"]
    assert [piece.split for piece in pieces] == ["train"] * 6 + ["val"] * 3
    assert all(piece.starts and piece.ends for piece in pieces)
    assert counts.cut_documents == 7


def test_cut_documents_are_in_the_manifest_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (reading, cuts):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text(LONG_TEXTS["lines"])
    found = prepare_dataset(files_config(tmp_path / "data", tmp_path / "a.txt"))
    assert (found.manifest.cut_documents, found.num_documents("train")) == (7, 8)
    assert "7 documents made by cutting those over 8 MB; an end-of" in capsys.readouterr().err

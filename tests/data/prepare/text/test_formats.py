"""Compressed lines, Arrow files, data sets that `datasets` saved."""

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pytest
import xxhash
import zstandard

from tests.data.corpus import random_text
from tests.data.prepare.text.reading import read_all, texts_of
from toolkit.data.config import DiskSourceConfig, FilesSourceConfig, FiltersConfig
from toolkit.data.prepare.text import cuts, jsonl, long_lines, readers, shards
from toolkit.data.prepare.text.reading import Counts, decode
from toolkit.data.prepare.text.sources import plan_source, source_fingerprint
from toolkit.errors import DataError


def json_lines(number: int) -> bytes:
    rows = ({"text": random_text(5, seed=i)} for i in range(number))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_arrow(path: Path, batches: list[list[str | None]], *, stream: bool) -> Path:
    tables = [pyarrow.record_batch({"id": range(len(b)), "text": b}) for b in batches]
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), tables[0].schema) as writer:
        for table in tables:
            writer.write_batch(table)
    return path


def test_zst_of_one_or_several_frames_is_read(tmp_path: Path) -> None:
    data = json_lines(400)
    compressor = zstandard.ZstdCompressor()
    (tmp_path / "one.jsonl.zst").write_bytes(compressor.compress(data))
    frames = b"".join(compressor.compress(data[i : i + 5000]) for i in range(0, len(data), 5000))
    (tmp_path / "two.jsonl.zst").write_bytes(frames)
    (tmp_path / "plain.jsonl").write_bytes(data)
    expected = texts_of(tmp_path / "plain.jsonl")
    assert len(expected) == 400
    assert texts_of(tmp_path / "one.jsonl.zst") == expected
    assert texts_of(tmp_path / "two.jsonl.zst") == expected
    assert len(texts_of(tmp_path)) == 1200


@pytest.mark.parametrize("cut", [10, 1000, -3])
def test_zst_cut_short_is_an_error(tmp_path: Path, cut: int) -> None:
    data = zstandard.ZstdCompressor().compress(json_lines(300))
    (tmp_path / "a.jsonl.zst").write_bytes(data[:cut])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: damaged zstd file: it ends in the middle"):
        texts_of(tmp_path)
    (tmp_path / "a.jsonl.zst").write_bytes(b"no zstd at all")
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: damaged zstd file"):
        texts_of(tmp_path)


def test_bad_line_of_a_zst_file_is_named(tmp_path: Path) -> None:
    data = b'{"text": "fine"}\n{"text": \n'
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: line 2 \(byte 17\): not valid JSON"):
        texts_of(tmp_path)


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files_of_both_formats_are_read_in_parts(
    tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MIN_SHARD_BYTES", 2000)
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 2000)
    batches = [[random_text(3, seed=10 * b + i) for i in range(4)] for b in range(20)]
    batches[3][1] = None
    path = write_arrow(tmp_path / "a.arrow", batches, stream=stream)
    source = FilesSourceConfig(paths=[str(path)])
    assert len(plan_source(source, 0.0).shards) == 5
    counts = Counts()
    pieces = read_all(source, counts)
    assert [p.text for p in pieces] == [text for batch in batches for text in batch if text]
    assert counts.skipped_documents == 1
    assert pieces[5].identity == "a.arrow:1:1"
    rows = read_all(source, rows=True)
    assert rows[1].row == {"id": 1, "text": batches[0][1]}


def test_damaged_arrow_files_and_wrong_columns_are_named(tmp_path: Path) -> None:
    path = write_arrow(tmp_path / "a.arrow", [["x" * 100] * 50], stream=True)
    with pytest.raises(DataError, match=r"has no column 'body'; its columns: id, text"):
        texts_of(path, text_field="body")
    with pytest.raises(DataError, match="column 'id' holds int64, not text"):
        texts_of(path, text_field="id")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"a\.arrow: damaged, or not an Arrow file"):
        texts_of(path)
    path.write_bytes(b"something else entirely")
    with pytest.raises(DataError, match=r"a\.arrow: damaged, or not an Arrow file"):
        texts_of(path)


def test_saved_data_sets_are_read_with_their_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("toolkit.data.prepare.text.hub.MIN_SHARD_BYTES", 500)
    rows = {"text": [f"row {i} " * 5 for i in range(60)], "label": list(range(60))}
    whole = datasets.Dataset.from_dict(rows)
    whole.save_to_disk(str(tmp_path / "one"))
    source = DiskSourceConfig(path=str(tmp_path / "one"))
    assert len(plan_source(source, 0.0).shards) > 2
    pieces = read_all(source)
    assert [piece.text for piece in pieces] == rows["text"]
    assert len({piece.identity for piece in pieces}) == 60
    halves = datasets.DatasetDict(
        {"train": whole.select(range(40)), "test": whole.select(range(59, 39, -1))}
    )
    halves.save_to_disk(str(tmp_path / "two"))
    test = DiskSourceConfig(path=str(tmp_path / "two"), split="test", text_template="{label}")
    assert [piece.text for piece in read_all(test)] == [str(i) for i in range(59, 39, -1)]
    train = DiskSourceConfig(path=str(tmp_path / "two"))
    assert read_all(train, rows=True)[3].row == {"text": rows["text"][3], "label": 3}
    assert source_fingerprint(train) == plan_source(train, 0.0).fingerprint
    with pytest.raises(DataError, match=r"no column 'body'; its columns: text, label"):
        read_all(DiskSourceConfig(path=str(tmp_path / "one"), text_field="body"))
    with pytest.raises(DataError, match=r"no split 'dev'; it has: train, test|no data set"):
        read_all(DiskSourceConfig(path=str(tmp_path / "two"), split="dev"))
    with pytest.raises(DataError, match=r"dataset\.source\.path: .*no data set that"):
        read_all(DiskSourceConfig(path=str(tmp_path / "three")))


def test_long_documents_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(cuts, "WIDE", 200)
    texts = [random_text(100), "word " * 900, "字" * 3500, "short"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pieces = read_all(FilesSourceConfig(paths=[str(tmp_path)]))
    documents: list[list] = []
    for piece in pieces:
        if piece.starts:
            documents.append([])
        documents[-1].append(piece)
    assert ["".join(p.text for p in document) for document in documents] == texts
    assert [document[-1].ends for document in documents] == [True] * 4
    assert all(len(p.text) <= 1000 for p in pieces)
    lines, words, characters, short = documents
    assert all(p.text[0] == " " and p.text[1] != " " for p in [*lines[1:], *words[1:]])
    assert len(characters) == 4
    assert len(short) == 1


def test_empty_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").touch()
    plan = plan_source(FilesSourceConfig(paths=[str(tmp_path)]), 0.0)
    assert plan.num_empty == 1


LONG_TEXTS = [
    'words and \u00e9\u4e2d\U0001f600 with "quotes", back\\\\slashes\\n and\nlines ' * 40,
    "\u4e2d\u6587" * 900,
    "\U0001f600" * 900,
    "\\" * 3001,
    "\\ud83d" * 700,
    "x" * 2000 + "\U0001f600\n" * 300,
]


@pytest.mark.parametrize("text", LONG_TEXTS)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_long_lines_are_decoded_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, ensure_ascii: bool
) -> None:
    for size in (100, 101, 102, 103, 107):
        monkeypatch.setattr(long_lines, "PIECE_CHARACTERS", size)
        monkeypatch.setattr(cuts, "NARROW", 20)
        monkeypatch.setattr(jsonl, "LONG_BYTES", 1000)
        row = {"before": [1, "x"], "text": text, "after": None}
        line = json.dumps(row, ensure_ascii=ensure_ascii) + "\n"
        (tmp_path / "a.jsonl").write_text(line * 2)
        source = FilesSourceConfig(paths=[str(tmp_path)])
        pieces = read_all(source, with_digests=True, filters=FiltersConfig(min_characters=2))
        assert len(pieces) > 10
        assert "".join(piece.text for piece in pieces) == text * 2
        assert [p.starts for p in pieces].count(True) == 2
        assert [p.ends for p in pieces].count(True) == 2
        first, second = (piece for piece in pieces if piece.starts)
        assert first.digest == second.digest == xxhash.xxh3_128_intdigest(text.encode())
        assert first.num_bytes == len(text.encode())


def test_defects_of_long_lines_are_replaced_slice_by_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    good = [b"some words ", "é中".encode(), "\U0001f600".encode(), b"\\ud83d\\ude00", b"\\n"]
    bad = [b"\xff", b"\x80" * 9, b"\xf0\x9f", b"\xe4\xb8", b"\xe9"]
    asked: list[int] = []

    def counted(data: bytes, *arguments: object) -> str:
        asked.append(len(data))
        return decode(data, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(long_lines, "decode", counted)
    monkeypatch.setattr(jsonl, "decode", counted)
    for size in (100, 101, 102, 103, 107):
        parts = draw.choices(good, k=200) + draw.choices(good + bad, k=300)
        content = b"".join([*parts, b"\x80" * 300])
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + content + b'"}\n')
        found = []
        for limit in (1 << 30, 1000):
            monkeypatch.setattr(jsonl, "LONG_BYTES", limit)
            monkeypatch.setattr(long_lines, "PIECE_CHARACTERS", size)
            asked.clear()
            counts = Counts()
            source = FilesSourceConfig(paths=[str(tmp_path)], encoding_errors="replace")
            text = "".join(piece.text for piece in read_all(source, counts))
            found.append((text, counts.replaced_bytes))
        assert found[0] == found[1]
        assert found[0][1] > 300
        assert 1 < max(asked) <= size + 2


def test_long_lines_with_defects_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_lines, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(jsonl, "LONG_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * 5000 + b'\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: not UTF-8 at byte 5010"):
        texts_of(path)
    assert "".join(texts_of(path, encoding_errors="replace")) == "a" * 5000 + "\ufffd"
    path.write_bytes(b'{"text": "' + b"a" * 5000)
    with pytest.raises(DataError, match=r"a\.jsonl: line 1 \(byte 0\): not valid JSON"):
        texts_of(path)
    path.write_bytes(b'{"body": "' + b"a" * 5000 + b'"}')
    with pytest.raises(DataError, match=r"a\.jsonl: line 1 .*no text under 'text'"):
        texts_of(path)
    path.write_bytes(b'{"text": "' + b"a" * 5000 + b'"}')
    source = FilesSourceConfig(paths=[str(path)])
    counts = Counts()
    assert read_all(source, counts, filters=FiltersConfig(max_repetition=0.5)) == []
    assert read_all(source, counts, filters=FiltersConfig(max_characters=4999)) == []
    assert counts.filtered_documents == {"max_repetition": 1, "max_characters": 1}

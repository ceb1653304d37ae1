"""Compressed lines, Arrow files, data sets that `datasets` saved."""

import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pytest
import xxhash
import zstandard

from tests.data.corpus import random_text
from tests.data.prepare.text.reading import read_all, texts_of
from toolkit.data.config import DiskSourceConfig, FilesSourceConfig, FiltersConfig
from toolkit.data.prepare.text import cuts, reading, sources
from toolkit.data.prepare.text.reading import Counts
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
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 2000)
    monkeypatch.setattr(sources, "MAX_SHARD_BYTES", 2000)
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

    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 500)
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
    for module in (reading, cuts):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 1000)
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
    assert plan.listing.num_empty == 1


def test_defects_of_long_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * 5000 + b'\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: not UTF-8 at byte 5010"):
        texts_of(path)
    assert texts_of(path, encoding_errors="replace") == ["a" * 5000 + "\ufffd"]
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


TEXTS = [
    'words and \u00e9\u4e2d\U0001f600 with "quotes", back\\\\slashes\\n and\nlines ' * 40,
    "\\" * 3001,
    "\\ud83d" * 700,
    "x" * 2000 + "\U0001f600\n" * 300,
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_digests_are_those_of_the_text(tmp_path: Path, text: str, ensure_ascii: bool) -> None:
    row = {"before": [1, "x"], "text": text, "after": None}
    (tmp_path / "a.jsonl").write_text((json.dumps(row, ensure_ascii=ensure_ascii) + "\n") * 2)
    source = FilesSourceConfig(paths=[str(tmp_path)])
    pieces = read_all(source, with_digests=True, filters=FiltersConfig(min_characters=2))
    assert [piece.text for piece in pieces] == [text, text]
    for piece in pieces:
        assert piece.digest == xxhash.xxh3_128_intdigest(text.encode())
        assert piece.num_bytes == len(text.encode())

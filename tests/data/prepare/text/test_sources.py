import gzip
import io
import json
from pathlib import Path

import pytest

from tests.data.corpus import random_text, write_texts
from tests.data.prepare.text.reading import read_all, texts_of
from toolkit.data.config import FilesSourceConfig, HubSourceConfig, PythonStdlibSourceConfig
from toolkit.data.prepare.text import cuts, jsonl, reading, sources
from toolkit.data.prepare.text.reading import Counts
from toolkit.data.prepare.text.sources import Range, plan_source
from toolkit.errors import DataError


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIN_SHARD_BYTES", "MAX_SHARD_BYTES"):
        monkeypatch.setattr(sources, name, 4096)
    for module in (reading, cuts):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 1024)


def test_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write_texts(tmp_path / "b", ["three", "four"])
    write_texts(tmp_path / "a", ["one", "two"])
    (tmp_path / "a" / "notes.md").write_text("not taken from folders")
    assert texts_of(tmp_path) == ["one", "two", "three", "four"]
    assert texts_of(tmp_path / "a" / "notes.md") == ["not taken from folders"]


def test_overlapping_paths_count_once(tmp_path: Path) -> None:
    write_texts(tmp_path, ["one", "two"])
    assert texts_of(tmp_path, tmp_path / "*.txt", tmp_path / "0000.txt") == ["one", "two"]


def test_jsonl_gz_and_parquet_give_their_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"row {i} é", "id": i} for i in range(7)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    table = pyarrow.table({"id": [0, 1, 2], "text": ["x", None, "z"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=2)
    expected = [row["text"] for row in rows]
    assert texts_of(tmp_path) == [*expected, *expected, "x", "z"]


def test_jsonl_cut_into_ranges_loses_and_repeats_nothing(tmp_path: Path, small_shards) -> None:
    rows = [{"text": random_text(i % 7, seed=i) or "x"} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FilesSourceConfig(paths=[str(tmp_path)])
    assert len(plan_source(source, 0.0).shards) > 5
    pieces = read_all(source)
    assert [piece.text for piece in pieces] == [row["text"] for row in rows]
    assert len({piece.identity for piece in pieces}) == len(rows)


def test_long_line_is_read_by_its_own_range_only(
    tmp_path: Path, small_shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    class Counted(io.BufferedReader):
        def readline(self, size: int | None = -1, /) -> bytes:
            nonlocal read
            line = super().readline(size)
            read += len(line)
            return line

    def opened(part: Range) -> io.BufferedReader:
        return Counted(io.FileIO(part.path))

    monkeypatch.setattr(jsonl, "_open", opened)
    monkeypatch.setattr(jsonl, "SKIPPED_BYTES", 512)
    texts = ["a", "x" * 200_000, "b", "c"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for end in ("", "\n\n"):
        (tmp_path / "a.jsonl").write_text(lines.strip() + end)
        source = FilesSourceConfig(paths=[str(tmp_path)])
        num_shards = len(plan_source(source, 0.0).shards)
        assert num_shards == 49
        read = 0
        assert "".join(piece.text for piece in read_all(source)) == "".join(texts)
        assert read < 2 * len(lines) + 512 * num_shards


@pytest.mark.parametrize("text", [random_text(900), "é" * 15_000, "\U0001f600x" * 9_000])
def test_long_text_in_pieces_joins_to_the_original(tmp_path: Path, small_shards, text: str) -> None:
    (tmp_path / "long.txt").write_text(text)
    source = FilesSourceConfig(paths=[str(tmp_path / "long.txt")])
    pieces = read_all(source)
    assert len(pieces) > 10
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_few_text_files_hold_out_their_last_part(tmp_path: Path, small_shards) -> None:
    text = random_text(400)
    (tmp_path / "one.txt").write_text(text)
    pieces = read_all(FilesSourceConfig(paths=[str(tmp_path / "one.txt")]), fraction=0.1)
    train = "".join(piece.text for piece in pieces if piece.split == "train")
    val = "".join(piece.text for piece in pieces if piece.split == "val")
    assert train + val == text
    assert train.endswith("\n")
    assert len(val) / len(text) == pytest.approx(0.1, abs=0.01)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts_of(tmp_path / "a.txt") == ["hello"]


def test_other_bytes_are_named_by_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123\xff5")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 4 \(0xff\).*encoding_errors"):
        texts_of(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl: not UTF-8 at byte 27"):
        texts_of(tmp_path)


def test_replaced_bytes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok \xff\xfe \xf0\x9f end")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "lone \\ud800 \xe9"}\n')
    counts = Counts()
    source = FilesSourceConfig(paths=[str(tmp_path)], encoding_errors="replace")
    first, second = (piece.text for piece in read_all(source, counts))
    assert first == "ok \ufffd\ufffd \ufffd end"
    assert second.startswith("lone \ufffd")
    assert counts.replaced_bytes == 4 + 3 + 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a\.jsonl: line 3 \(byte 34\): not valid JSON"),
        ('{"body": "x"}', r"a\.jsonl: line 3 .*no text under 'text'.*dataset\.source\.text_field"),
        (r'{"text": "a\ud800b"}', r"line 3 .* half of a surrogate pair .*encoding_errors=replace"),
        ('{"text": "b", "n": NaN', r"a\.jsonl: line 3 \(byte 34\): not valid JSON"),
        ('{"text": 5}', r"a\.jsonl: line 3 .*no text under 'text'.*got `int`"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    good = '{"text": "fine"}\n'
    (tmp_path / "a.jsonl").write_text(good + good + line + "\n")
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path)


def test_missing_and_empty_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.source\.paths: .*absent: no such file"):
        texts_of(tmp_path / "absent")
    with pytest.raises(DataError, match="matches no file"):
        texts_of(tmp_path / "*.txt")
    with pytest.raises(DataError, match="no file with text"):
        texts_of(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt: the file is empty"):
        texts_of(tmp_path / "empty.txt")


def test_wrong_parquet_columns_and_files_are_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(DataError, match=r"no column 'text'; its columns: id, body"):
        texts_of(path)
    with pytest.raises(DataError, match="column 'id' holds int64, not text"):
        texts_of(path, text_field="id")
    assert texts_of(path, text_field="body") == ["x"]
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not a parquet file"):
        texts_of(path)


def test_other_compressed_files_are_refused_and_damaged_gzip_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(DataError, match="unpack it first"):
        texts_of(tmp_path / "a.txt.zst")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:30])
    with pytest.raises(DataError, match="damaged gzip file"):
        texts_of(tmp_path / "b.jsonl.gz")


def test_standard_library_is_text_of_the_asked_size() -> None:
    source = PythonStdlibSourceConfig(max_bytes=300_000)
    counts = Counts()
    pieces = read_all(source, counts)
    assert 290_000 < sum(len(piece.text) for piece in pieces) < 1_500_000
    assert not any("site-packages" in piece.identity for piece in pieces)
    names = [piece.identity for piece in pieces]
    assert names == [piece.identity for piece in read_all(source)]
    assert names != sorted(names)


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_library_source_reads_a_local_folder(
    tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"row {i}"} for i in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = HubSourceConfig(name=str(folder), streaming=streaming)
    assert [piece.text for piece in read_all(source)] == [row["text"] for row in rows]
    with pytest.raises(DataError, match=r"dataset\.source\.text_field: .*its columns: text"):
        read_all(HubSourceConfig(name=str(folder), streaming=streaming, text_field="body"))


def test_unknown_hub_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dataset\.source: .*cannot be loaded") as caught:
        read_all(HubSourceConfig(name=str(tmp_path / "nothing-here")))
    assert "\n" not in str(caught.value)

import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import xxhash

from tests.data.corpus import random_text
from tests.data.prepare.text.reading import read_all
from toolkit.data.config import FilesSourceConfig, FiltersConfig
from toolkit.data.prepare.text.reading import Counts, Reading, read_shard
from toolkit.data.prepare.text.sources import plan_source
from toolkit.errors import DataError


def write(path: Path, table: pyarrow.Table) -> FilesSourceConfig:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return FilesSourceConfig(paths=[str(path)])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("rows", [True, False])
def test_memory_holds_one_row_however_many_there_are(tmp_path: Path, name: str, rows: bool) -> None:
    texts = [f"{i} " * 100_000 for i in range(100, 200)]
    source = write(tmp_path / name, pyarrow.table({"text": texts}))
    (shard,) = plan_source(source, 0.0).shards
    reading, count = Reading(source=source, rows=rows), 0
    tracemalloc.start()
    try:
        for piece in read_shard(shard, reading, Counts()):
            count += piece.ends
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 100
    assert peak < 10 * len(texts[0]) < sum(map(len, texts)) / 9


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_text_of_every_type_is_read(tmp_path: Path, kind: str) -> None:
    texts = [random_text(60), "short", None, "é中\U0001f600" * 400, "", "say " * 500]
    column = pyarrow.array(texts, getattr(pyarrow, kind)())
    name = "a.arrow" if kind == "string_view" else "a.parquet"
    source = write(tmp_path / name, pyarrow.table({"text": column}))
    counts = Counts()
    pieces = read_all(source, counts, with_digests=True)
    kept = [text for text in texts if text]
    assert [piece.text for piece in pieces] == kept
    assert counts.skipped_documents == 2
    assert [p.digest for p in pieces] == [xxhash.xxh3_128_intdigest(t.encode()) for t in kept]
    limited = read_all(source, counts, filters=FiltersConfig(max_characters=1200))
    assert [piece.text for piece in limited] == ["short", texts[3]]
    assert counts.filtered_documents == {"max_characters": 2}


def test_foreign_bytes_are_named_or_replaced(tmp_path: Path) -> None:
    values = [b"fine", "é".encode() * 800 + b"\xe9 end", b"\xff"]
    column = pyarrow.array(values, pyarrow.binary()).cast(pyarrow.string(), safe=False)
    source = write(tmp_path / "a.parquet", pyarrow.table({"text": column}))
    with pytest.raises(DataError, match=r"a\.parquet: row group 0, row 1: not UTF-8 at byte 1600 "):
        read_all(source)
    lenient = FilesSourceConfig(paths=source.paths, encoding_errors="replace")
    counts = Counts()
    assert [piece.text for piece in read_all(lenient, counts)] == [
        "fine",
        "é" * 800 + "\ufffd end",
        "\ufffd",
    ]
    assert counts.replaced_bytes == 2

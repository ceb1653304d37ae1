import json
from pathlib import Path

import pytest

from tests.data.prepare.text.reading import read_all, texts_of
from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.text.columns import row_texts
from toolkit.errors import DataError


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_template_joins_columns_and_null_is_no_text(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl",
        {"title": "One", "body": "first", "n": 3},
        {"title": None, "body": "{second}", "n": 0.5},
    )
    texts = texts_of(path, text_template="# {title}\n{body} {{{n}}}")
    assert texts == ["# One\nfirst {3}", "# \n{second} {0.5}"]


def test_template_over_parquet_reads_its_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"x": ["a", "b"], "y": [1, 2], "z": ["unused", None]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert texts_of(tmp_path / "t.parquet", text_template="{y}:{x}") == ["1:a", "2:b"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{title", r"text_template: expected '}'.*write \{column\}"),
        ("title}", r"text_template: Single '}'"),
        ("{}", "between braces stands the name of a column and nothing else"),
        ("{title:>10}", "the name of a column and nothing else"),
        ("{title!r}", "the name of a column and nothing else"),
        ("no column", "names no column"),
        ("{titel}", r"text_template: .* has no column 'titel'; its columns: title, body"),
        ("{title.x}", r"has no column 'title\.x'"),
        ("{body}", r"column 'body' holds list, not text"),
    ],
)
def test_templates_that_cannot_be_used_are_named(
    tmp_path: Path, template: str, message: str
) -> None:
    path = lines(tmp_path / "a.jsonl", {"title": "One", "body": ["a", "list"]})
    with pytest.raises(DataError, match=message) as caught:
        texts_of(path, text_template=template)
    assert "\n" not in str(caught.value)


def test_rows_are_whole_and_plain(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "hé"}], "id": 7, "tags": None}
    path = lines(tmp_path / "a.jsonl", row)
    (piece,) = read_all(FilesSourceConfig(paths=[str(path)]), rows=True)
    assert piece.row == row
    assert piece.text == ""
    assert list(row_texts(piece.row)) == ["user", "hé"]


def test_rows_are_found_by_the_place_in_messages(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": "one"}, {"q": "two"}]
    lines(tmp_path / "a.jsonl", *rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    pieces = read_all(FilesSourceConfig(paths=[str(tmp_path)]), rows=True)
    assert [piece.identity for piece in pieces] == [
        "a.jsonl:0", "a.jsonl:13", "b.parquet:0:0", "b.parquet:0:1",
    ]  # fmt: skip
    assert str(pieces[1].place) == f"{tmp_path}/a.jsonl: line 2 (byte 13)"
    assert pieces[3].place == f"{tmp_path}/b.parquet: row group 0, row 1"
    wanted = r"text_template: /.*/a\.jsonl: line 1 \(byte 0\) has no column 'x'"
    with pytest.raises(DataError, match=wanted):
        texts_of(tmp_path / "a.jsonl", text_template="{x}")


def test_plain_text_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt: plain text has no rows for dataset\.instruct"):
        read_all(FilesSourceConfig(paths=[str(tmp_path)]), rows=True)

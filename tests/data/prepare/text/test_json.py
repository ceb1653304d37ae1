"""JSON as programs write it: lists of rows, NaN, keys that stand twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import files_config
from toolkit.data.config import InstructionsConfig
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.prepare.text import sources
from toolkit.data.tokens.prepared import PreparedDataset
from toolkit.errors import DataError


def prepared(path: Path, data: str | bytes, **changes: Any) -> PreparedDataset:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return prepare_dataset(files_config(path.parent / "data", path, **changes), progress=False)


def texts(found: PreparedDataset) -> list[str]:
    """What byte-level documents say."""
    ids = found.tokens("train").tolist()
    text = "".join("\0" if i == 256 else chr(i) for i in ids)
    return text.removesuffix("\0").split("\0")


NUMBERS = '{"score": NaN, "text": "ab", "high": -Infinity, "large": 1e999}\n{"text": "cd"}\n'


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_numbers_that_json_does_not_have_stop_nothing_that_does_not_use_them(
    name: str, tmp_path: Path
) -> None:
    assert texts(prepared(tmp_path / name, NUMBERS)) == ["ab", "cd"]


def test_such_numbers_in_a_column_that_is_used(tmp_path: Path) -> None:
    found = prepared(tmp_path / "a.jsonl", '{"text": NaN}\n{"text": "cd"}\n')
    assert (texts(found), found.manifest.skipped_documents) == (["cd"], 1)
    template = {"text_template": "{text}/{score}"}
    lines = '{"text": "a", "score": NaN}\n{"text": "b", "score": 0.5}\n'
    found = prepared(tmp_path / "b.jsonl", lines, source=template, dataset_name="b")
    assert texts(found) == ["a/", "b/0.5"]


def test_what_is_no_json_is_still_an_error(tmp_path: Path) -> None:
    for line, what in (
        ('{"text": "a", "score": nan}', "line 1 .byte 0.: not valid JSON"),
        ('{"text": "\\ud800", "score": NaN}', "half of a surrogate pair"),
        (
            '{"text": "a", "deep": ' + "[" * 100_000,
            "line 1 .byte 0.: nested deeper than 100 levels",
        ),
    ):
        with pytest.raises(DataError, match=what):
            prepared(tmp_path / "a.jsonl", line + "\n")


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "first", "text": "second"}',
        '{"text" : "first", "id": 1, "text" : "second"}',
        '{"text": "first \\":", "text" : "second"}',
    ],
)
def test_a_key_that_stands_twice_is_an_error(line: str, tmp_path: Path) -> None:
    lines = '{"text": "ok"}\n' + line + "\n"
    with pytest.raises(DataError, match=r"line 2 .byte 15.: the key 'text' stands twice"):
        prepared(tmp_path / "a.jsonl", lines)
    with pytest.raises(DataError, match=r"line 2 .byte 15.: the key 'text' stands twice"):
        prepared(tmp_path / "a.jsonl", lines, source={"text_template": "{text}"})


def test_long_lines_have_each_key_once(tmp_path: Path) -> None:
    line = json.dumps({"text": "a " * (5 << 20)})
    with pytest.raises(DataError, match="the key 'text' stands twice"):
        prepared(tmp_path / "a.jsonl", line[:-1] + ', "text": "b"}\n')


def test_a_key_that_stands_twice_in_a_conversation_is_an_error(tmp_path: Path) -> None:
    for line, key in (
        ('{"prompt": "a", "completion": "b", "completion": "c"}', "completion"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "content"),
    ):
        with pytest.raises(DataError, match=f"line 1 .*the key '{key}' stands twice"):
            prepared(tmp_path / "a.jsonl", line + "\n", instructions=InstructionsConfig())


def test_keys_that_only_look_as_if_they_stood_twice(tmp_path: Path) -> None:
    lines = [
        {"text": "a", "meta": {"text": "other"}, "key": "text"},
        {"text": 'say "text": "text"', "more": [{"text": 1}, {"text": 2}]},
    ]
    found = prepared(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert texts(found) == ["a", 'say "text": "text"']
    rows = '{"prompt": "a\\":\\": ", "completion" : "b", "meta": {"prompt": {"prompt": 1}}}\n'
    config = {"instructions": InstructionsConfig(), "dataset_name": "rows"}
    assert texts(prepared(tmp_path / "b.jsonl", rows, **config)) == ['a":": b']


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_objects_is_rows(indent: int | None, tmp_path: Path) -> None:
    rows = [{"text": "ab"}, {"text": "c]d,", "n": [1, {"x": None}]}, {"text": ""}]
    found = prepared(tmp_path / "rows.JSON", "\ufeff " + json.dumps(rows, indent=indent) + "\n")
    assert texts(found) == ["ab", "c]d,"]
    assert found.manifest.skipped_documents == 1


def test_an_object_a_line_is_rows_whatever_the_file_is_called(tmp_path: Path) -> None:
    assert texts(prepared(tmp_path / "a.json", '{"text": "ab"}\n{"text": "cd"}\n')) == ["ab", "cd"]


def test_files_of_json_are_documents_where_that_is_asked_for(tmp_path: Path) -> None:
    text = '{\n "name": "package"\n}\n'
    with pytest.raises(DataError, match=r"neither a list.*dataset\.source\.json_files=text"):
        prepared(tmp_path / "a.json", text)
    assert texts(prepared(tmp_path / "a.json", text, source={"json_files": "text"})) == [text]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[{"text": "a"}, 7]', "element 1: no text under 'text': Expected `object`"),
        ('[{"text": "a"} {"text": "b"}]', "element 0: no comma or ] follows"),
        ('[{"text": "a"}, {"text": }]', "element 1: not valid JSON"),
        ('[{"text": "a"}', "no comma or ] follows"),
        ('[{"text": "a"}] x', "text follows the list"),
        ('[{"text": "a"}, {"other": "b"}]', "element 1: no text under 'text'"),
        ('[{"text": "a", "text": "b"}]', "element 0: the key 'text' stands twice"),
        ("[]", "gave no training text"),
    ],
)
def test_lists_that_are_wrong_name_the_element(data: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message.replace("]", r"\]")):
        prepared(tmp_path / "a.json", data)


def test_a_list_that_is_too_large_says_how_to_convert_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_JSON_BYTES", 10)
    with pytest.raises(DataError, match=r"jq -c '\.\[\]' LIST\.json > ROWS\.jsonl"):
        prepared(tmp_path / "a.json", '[{"text": "ab"}]')

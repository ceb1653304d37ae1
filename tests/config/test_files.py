"""JSON files are read whole or refused with the place of the mistake."""

from pathlib import Path

import pytest

from toolkit.config import read_json_mapping
from toolkit.config.yaml_text import dump_yaml
from toolkit.errors import ConfigError


def message(path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_json_mapping(path)
    return str(error.value)


def test_a_syntax_mistake_names_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text('{\n  "seed": 1,\n  "run": {"name" "x"}\n}')
    assert message(path) == f"{path}:3:18: not valid JSON: expecting ':' delimiter"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[1]", "expected a mapping {...} of config sections at the top"),
        (b'{"seed": 1, "seed": 2}', "not valid JSON: the key 'seed' stands twice in one mapping"),
        (b'{"seed": NaN}', "not valid JSON: NaN is not a JSON number"),
        (b'{"seed": "\xff"}', "not UTF-8 text (byte 10)"),
        (b"", "1:1: not valid JSON: the file is empty"),
    ],
)
def test_other_mistakes_name_the_file(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "my.json"
    path.write_bytes(content)
    assert message(path) in (f"{path}: {expected}", f"{path}:{expected}")


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_bytes(b'\xef\xbb\xbf{"seed": 1}')
    assert read_json_mapping(path) == {"seed": 1}


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert message(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"seed": 1,\n}', "1:11: not valid JSON: a comma before the closing bracket; take it out"),
        ('{"a": [1, 2,],\n"b": 1}',
         "1:12: not valid JSON: a comma before the closing bracket; take it out"),
        ('{"seed": 1, # mine\n}',
         "1:13: not valid JSON: a comment begins with //, or stands in /* */"),
        ('{"seed": 1 /* x }', "1:12: not valid JSON: a comment that does not end; it ends with */"),
        ('{ /* two\n lines */ "seed" 1}', "2:18: not valid JSON: expecting ':' delimiter"),
        ("{'seed': 1}", '1:2: not valid JSON: text stands in double quotes, "like this"'),
        ('{"a": True}', "1:7: not valid JSON: JSON writes true, false and null"),
        ("seed: 1", "1:1: not valid JSON: expecting value; a config is a mapping {...} in JSON, "),
        ("[" * 3000, " not valid JSON: nested more than 100 levels deep"),
    ],
)  # fmt: skip
def test_what_json_does_not_take_is_explained(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text(content)
    assert message(path).startswith(f"{path}:{expected}")


def test_comments_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text('{ // mine\n"seed": 1, /* {"a": \n */ "run": {"mirror": "s3://a/*b*/"}}')
    assert read_json_mapping(path) == {"seed": 1, "run": {"mirror": "s3://a/*b*/"}}


YAML = """# mine
seed: 7
run: {name: no, root: ~}
description: |
  1
train_module:
  optim:
    lr: 6e-3
    betas: [0.9, .95]
"""


def test_yaml_is_read_by_the_core_schema(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(YAML)
    assert read_json_mapping(path) == {
        "seed": 7,
        "run": {"name": "no", "root": None},
        "description": "1\n",
        "train_module": {"optim": {"lr": 6e-3, "betas": [0.9, 0.95]}},
    }


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("seed: 1\nrun: [", "2:7: not valid YAML: "),
        ("seed: 1\nseed: 2", "2:1: not valid YAML: the key 'seed' stands twice in one mapping"),
        ("a: &x 1\nb: *x", "1:4: not valid YAML: anchors and aliases are not taken (&x)"),
        ("a: !!python/name:os.system x", "1:4: not valid YAML: tags are not taken ("),
        ("a: 1\n---\nb: 2", "2:1: not valid YAML: expected a single document in the stream, but "),
        ("- 1", " expected a mapping {...} of config sections at the top"),
        ("", " expected a mapping {...} of config sections at the top"),
        ("a: " + "[" * 3000, " not valid YAML: nested more than 100 levels deep"),
    ],
)
def test_mistakes_of_yaml_name_line_and_column(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "my.yml"
    path.write_text(content)
    assert message(path).startswith(f"{path}:{expected}")


def test_yaml_that_is_written_reads_back_the_same(tmp_path: Path) -> None:
    texts = [
        "6e-3",
        "no",
        "1_000",
        "~",
        "",
        "0x10",
        "2024-01-01",
        "true",
        "a: b",
        "ä\n",
        "- x",
        "1.e3",
        "a\x85b",
        "\u2028",
        "a\rb",
    ]
    data = {"texts": texts, "numbers": [1e-5, 1e20, 3, True, None], "empty": {}, "none": []}
    path = tmp_path / "my.yaml"
    path.write_text(dump_yaml(data), encoding="utf-8")
    assert read_json_mapping(path) == data


def test_the_schema_of_an_editor_is_no_value(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text('{"$schema": "schema.json", "seed": 1}')
    assert read_json_mapping(path) == {"seed": 1}

"""JSON files are read whole or refused with the place of the mistake."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.config import read_json_mapping
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
        ('{\n  // mine\n  "a": 1}', "2:3: not valid JSON: a comment, which JSON does not take; "),
        ('{"seed": 1, # mine\n}', "1:13: not valid JSON: a comment, which JSON does not take; "),
        ('{"seed": 1 /* x */}', "1:12: not valid JSON: a comment, which JSON does not take; "),
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


def test_yaml_is_answered_with_the_command_that_makes_json_of_it(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("seed: 7\nrun: {name: a}\n")
    said = message(path)
    assert said.startswith(f"{path}: YAML is not read; make JSON of it: python -c '")
    command = said.partition("of it: ")[2].partition(", then give")[0]
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert read_json_mapping(tmp_path / "my.json") == {"seed": 7, "run": {"name": "a"}}


def test_the_schema_of_an_editor_is_no_value(tmp_path: Path) -> None:
    path = tmp_path / "my.json"
    path.write_text('{"$schema": "schema.json", "seed": 1}')
    assert read_json_mapping(path) == {"seed": 1}

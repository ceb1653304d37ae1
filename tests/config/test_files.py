"""JSON files are read whole or refused with the place of the mistake."""

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

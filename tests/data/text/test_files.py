from pathlib import Path

import pytest

from tests.data.corpus import write_texts
from toolkit.data.text.files import find_files


def names(*paths: object) -> list[str]:
    return [file.name for file in find_files([str(path) for path in paths], (".txt",)).files]


def test_names_of_a_pattern_stay_when_documents_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "sp" / "a", ["one", "two"])
    pattern = tmp_path / "sp" / "*" / "*.txt"
    assert names(pattern) == ["a/0000.txt", "a/0001.txt"]
    write_texts(tmp_path / "sp" / "b", ["three"])
    assert names(pattern) == ["a/0000.txt", "a/0001.txt", "b/0000.txt"]
    assert names(tmp_path / "sp" / "a" / "000?.txt") == ["0000.txt", "0001.txt"]
    assert names(tmp_path / "sp" / "[b]" / "0000.txt") == ["b/0000.txt"]
    monkeypatch.chdir(tmp_path)
    assert names("sp/**/*.txt") == ["a/0000.txt", "a/0001.txt", "b/0000.txt"]
    assert names("*/b/*.txt") == ["sp/b/0000.txt"]

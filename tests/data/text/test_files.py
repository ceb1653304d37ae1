from pathlib import Path

import pytest

from tests.data.corpus import write_texts
from tests.data.text.reading import read_all
from toolkit.data.config import FilesSourceConfig
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


def test_linked_folders_are_read_once_and_without_loops(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    write_texts(elsewhere / "deep", ["linked"])
    write_texts(folder / "real", ["own"])
    (folder / "link").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "real")
    (elsewhere / "deep" / "back").symlink_to(folder)
    (folder / "self").symlink_to(".")
    assert names(folder) == ["link/deep/0000.txt", "real/0000.txt"]
    pieces = read_all(FilesSourceConfig(paths=[str(folder)]))
    assert [piece.text for piece in pieces] == ["linked", "own"]
    (tmp_path / "whole").symlink_to(folder)
    assert names(tmp_path / "whole") == names(folder)

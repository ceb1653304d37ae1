from pathlib import Path

import pytest

from tests.data.corpus import files_config, write_texts
from tests.data.prepare.text.reading import read_all
from toolkit.data.config import FilesSourceConfig
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.prepare.text.files import find_files, list_files
from toolkit.data.prepare.text.sources import plan_source
from toolkit.errors import DataError


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


def test_files_left_out_for_their_endings_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.md", "b.txt", "c.TXT", "deep/d.md", "deep/e.rst", "LICENSE"):
        (folder / name).write_text("some text")
    plan = plan_source(FilesSourceConfig(paths=[str(folder)]), 0.0)
    assert [file.name for file in plan.listing.files] == ["b.txt", "c.TXT"]
    assert plan.listing.left_out == {".md": 2, ".rst": 1, "without ending": 1}
    # One that another path names is not left out.
    plan = plan_source(FilesSourceConfig(paths=[str(folder), str(folder / "a.md")]), 0.0)
    assert plan.listing.left_out == {".md": 1, ".rst": 1, "without ending": 1}

    found = prepare_dataset(files_config(tmp_path / "data", folder))
    assert found.manifest.left_out_files == {".md": 2, ".rst": 1, "without ending": 1}
    line = "4 files of folders left out for their endings: 2 .md, 1 .rst, 1 without ending ("
    assert line in capsys.readouterr().err


def test_endings_that_no_file_has_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    source = FilesSourceConfig(paths=[str(tmp_path)], suffixes=(".md", ".rst"))
    assert plan_source(source, 0.0).listing.notes() == [
        "dataset.source.suffixes: no file ends in .rst"
    ]
    assert plan_source(FilesSourceConfig(paths=[str(tmp_path / "a.md")]), 0.0).listing.notes() == []


def test_a_folder_that_gives_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one" / "a.txt").write_text("text")
    paths = [str(tmp_path / "one"), str(tmp_path / "two")]
    with pytest.raises(DataError, match=r"two: no file with text"):
        list_files(FilesSourceConfig(paths=paths))
    (tmp_path / "two" / "b.md").write_text("text")
    with pytest.raises(DataError, match=r"two: no file with text .*; 1 file of folders left out"):
        list_files(FilesSourceConfig(paths=paths))


@pytest.mark.parametrize("column", [{"text_field": "body"}, {"text_template": "{text}"}])
def test_a_column_of_plain_text_is_an_error(tmp_path: Path, column: dict[str, str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=f"{next(iter(column))}: names a column, but .* plain text"):
        plan_source(FilesSourceConfig(paths=[str(tmp_path)], **column), 0.0)  # type: ignore[arg-type]

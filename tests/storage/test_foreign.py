"""Files from elsewhere: every failure is one line, whatever the file is."""

import os
from pathlib import Path

import pytest

from toolkit.errors import DataError
from toolkit.storage.foreign import guard, read_bytes, read_json, read_lines


def message(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_json(path, DataError)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_a_file_that_is_there_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    assert read_json(tmp_path / "a.json", DataError) == {"a": [1, None]}


def test_a_file_that_is_missing_is_the_callers_to_answer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file"):
        read_json(tmp_path / "a.json", DataError)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[" * 5000, "not the JSON that belongs there"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "cannot be read: nested too deeply"),
        ('{"a": "é"}'.encode("utf-16"), "not the JSON that belongs there"),
        (b'{"a": NaN}', "not the JSON that belongs there"),
        (b'{"a": 1' + b"0" * 6000 + b"}", "not the JSON that belongs there"),
        (b"[1]", "not the JSON that belongs there: Expected `object`, got `array`"),
        (b"", "not the JSON that belongs there"),
    ],
)
def test_content_that_does_not_belong_there(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert message(tmp_path / "a.json").startswith(expected)


def test_pipes_folders_devices_and_loops_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    assert message(tmp_path / "pipe") == "cannot be read: a pipe or a device, no file"
    assert message(tmp_path / "zero") == "cannot be read: a pipe or a device, no file"
    assert message(tmp_path) == "cannot be read: Is a directory"
    assert "symbolic links" in message(tmp_path / "loop")


def test_a_file_of_any_size_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"has 1,099,511,627,776 bytes; .* more than 1,000"):
        read_bytes(tmp_path / "a", DataError, max_bytes=1000)


def test_a_panic_of_native_code_is_caught_and_an_interrupt_is_not() -> None:
    class PanicException(BaseException):  # as pyo3 calls it
        pass

    line = r"^a: cannot be read: index out of range; get it again$"
    with pytest.raises(DataError, match=line), guard("a", DataError, "get it again"):
        raise PanicException("index out of\nrange")
    with pytest.raises(KeyboardInterrupt), guard("a", DataError):
        raise KeyboardInterrupt
    with pytest.raises(DataError, match=r"^own$"), guard("a", DataError):
        raise DataError("own")


def test_lines_are_read_one_by_one_and_none_without_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert list(read_lines(path, DataError)) == []
    path.write_bytes(b"one\ntwo")
    assert list(read_lines(path, DataError)) == [b"one\n", b"two"]
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"a\.jsonl: has a line of more than 1,000 bytes"):
        list(read_lines(path, DataError, max_bytes=1000))
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="a pipe or a device"):
        list(read_lines(path, DataError))

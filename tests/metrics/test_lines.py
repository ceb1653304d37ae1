"""trim_jsonl: later steps and damaged lines go, all else stays."""

import os

import pytest

from toolkit.metrics.lines import TrimResult, trim_jsonl


@pytest.fixture
def path(tmp_path):
    return tmp_path / "train.jsonl"


def test_later_steps_and_a_torn_last_line_go(path):
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"step":3}\n{"step":4}\n{"step":5,"lo')
    assert trim_jsonl(path, last_step=2) == TrimResult(dropped=2, damaged=1)
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'
    assert os.listdir(path.parent) == [path.name]


def test_only_a_torn_line(path):
    path.write_bytes(b'{"step":1}\n{"step":2}\n{"st')
    assert trim_jsonl(path, last_step=10) == TrimResult(0, 1)
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'


def test_whole_last_line_without_its_newline_stays(path):
    path.write_bytes(b'{"step":1}\n{"step":2}')
    assert trim_jsonl(path, last_step=10) == TrimResult(0, 0)
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'


def test_a_good_file_is_not_touched(path):
    path.write_bytes(b'{"step":1,"loss":"nan"}\n{"other":[1]}\n')
    os.utime(path, (5, 5))
    inode = path.stat().st_ino
    assert trim_jsonl(path, last_step=1) == TrimResult(0, 0)
    assert (path.stat().st_ino, path.stat().st_mtime) == (inode, 5)


def test_lines_without_a_step_and_several_of_one_step_stay(path):
    lines = b'{"step":1,"name":"a"}\n{"step":1,"name":"b"}\n{"note":"x"}\n'
    path.write_bytes(lines + b'{"step":2}\n')
    assert trim_jsonl(path, last_step=1) == TrimResult(1, 0)
    assert path.read_bytes() == lines


@pytest.mark.parametrize("damage", [b"\0" * 40, b"\xff\xfe{}", b'{"step":"one"}', b"[]", b""])
def test_damaged_lines_at_the_end_go(path, damage):
    path.write_bytes(b'{"step":1}\n' + damage + b'\n{"step":9}\n')
    assert trim_jsonl(path, last_step=5) == TrimResult(1, 1)
    assert path.read_bytes() == b'{"step":1}\n'


@pytest.mark.parametrize("kept", [0, 1, 500, 5000])
def test_lines_longer_than_a_block_and_files_of_many_blocks(path, kept):
    lines = [b'{"step":%d,"pad":"%s"}\n' % (n, b"x" * (n % 3) * 40_000) for n in range(1, 20)]
    path.write_bytes(b'{"step":0}\n' * kept + b"".join(lines))
    assert trim_jsonl(path, last_step=4) == TrimResult(15, 0)
    assert path.read_bytes() == b'{"step":0}\n' * kept + b"".join(lines[:4])


def test_missing_and_empty_files(path):
    assert trim_jsonl(path, last_step=5) == TrimResult(0, 0)
    assert not path.exists()
    path.touch()
    assert trim_jsonl(path, last_step=5) == TrimResult(0, 0)

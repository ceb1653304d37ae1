"""A file is there whole or not at all."""

import errno
import json
import os
import stat
import sys

import pytest

from toolkit.storage.atomic import (
    create_json,
    fsync_tree,
    hash_file,
    new_folder,
    open_atomic,
    remove_tree,
    reserve_space,
    start_writing,
    write_atomic,
    write_json_atomic,
)


def test_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_atomic(path, b"a longer first version")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_write_that_fails_keeps_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")
    with pytest.raises(TypeError), open_atomic(path) as file:
        file.writelines([b"new", None])
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_json_is_indented_and_ends_with_a_newline(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"x": [1, 2.5], "y": None})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"x": [1, 2.5], "y": None}
    assert text.startswith('{\n  "x"')
    assert text.endswith("}\n")


def test_remove_tree_removes_all_and_accepts_a_missing_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    remove_tree(tmp_path / "a")
    remove_tree(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_fsync_tree_reaches_every_file(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    (tmp_path / "d").write_text("y")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    fsync_tree(tmp_path)
    expected = {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"}
    assert set(synced) == {str(p) for p in expected | {tmp_path / "d"}}
    assert synced[-1] == str(tmp_path)  # names last, when what they name is safe


@pytest.mark.parametrize("size", [0, 1, 1000, 70_000])
def test_hash_streams_to_the_hash_of_the_whole(tmp_path, size):
    import xxhash

    data = bytes(i * 7 % 251 for i in range(size))
    (tmp_path / "a").write_bytes(data)
    assert hash_file(tmp_path / "a", chunk_size=4096) == xxhash.xxh3_64_hexdigest(data)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (write_json_atomic, create_json):
        with pytest.raises(OSError, match="No space left") as caught:
            write(tmp_path / "status.json", {})
        assert caught.value.filename == str(tmp_path / "status.json")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("unfinished", [None, "growing"])
def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path, unfinished):
    place = None if unfinished is None else tmp_path / unfinished
    if place is not None:  # of a process that was killed
        place.mkdir()
        (place / "old").touch()
    with pytest.raises(TypeError), new_folder(tmp_path / "a", unfinished=place) as folder:
        (folder / "x").write_text(1)
    assert os.listdir(tmp_path) == []
    (tmp_path / "a").mkdir()
    with new_folder(tmp_path / "a", unfinished=place) as folder:
        (folder / "x").write_text("1")
        assert os.listdir(tmp_path / "a") == []
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["a", "a/x"]


def test_space_that_a_disk_does_not_have_is_refused_at_once(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        reserve_space(file.fileno(), 1 << 20)
        start_writing(file.fileno(), 0, 1 << 20)
        if sys.platform == "linux":
            with pytest.raises(OSError, match=r"File too large|No space left"):
                reserve_space(file.fileno(), 1 << 60)
    assert (tmp_path / "a").stat().st_size == 0

"""Data files that lie about themselves: their memory is not read, their bombs do not go off."""

import gzip
import json
import os
import struct
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard

from toolkit.data.config import DatasetConfig, DiskSourceConfig, FilesSourceConfig
from toolkit.data.prepare.build.settings import settings_of
from toolkit.data.prepare.text.reading import Counts, Reading, read_shard
from toolkit.data.prepare.text.sources import plan_source
from toolkit.errors import DataError

TEXTS = ["hello world", "abc", "defg"]
OFFSETS = struct.pack("<4i", 0, 11, 14, 18)


def texts(source: FilesSourceConfig | DiskSourceConfig, *, rows: bool = False) -> list[str]:
    reading = Reading(source=source, rows=rows)
    plan = plan_source(source, 0.0, rows=rows)
    return [p.text for shard in plan.shards for p in read_shard(shard, reading, Counts())]


def files(path: Path, **changes: object) -> FilesSourceConfig:
    return FilesSourceConfig(paths=[str(path)], **changes)  # type: ignore[arg-type]


def damage(path: Path, *, number: int, by: int) -> None:
    """Add to one of the offsets of the texts."""
    raw = bytearray(path.read_bytes())
    place = raw.index(OFFSETS) + 4 * number
    (old,) = struct.unpack_from("<i", raw, place)
    struct.pack_into("<i", raw, place, old + by)
    path.write_bytes(bytes(raw))


def write_arrow(path: Path, *, stream: bool) -> Path:
    batch = pa.record_batch({"text": TEXTS})
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, batch.schema) as writer:
        writer.write(batch)
    return path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("number", "by"), [(3, 60_000), (1, 60_000), (2, -13), (1, -50)])
def test_offsets_outside_of_an_arrow_batch_are_named(
    tmp_path: Path, stream: bool, number: int, by: int
) -> None:
    path = write_arrow(tmp_path / "a.arrow", stream=stream)
    assert texts(files(path)) == TEXTS
    damage(path, number=number, by=by)
    for errors in ("strict", "replace"):
        with pytest.raises(DataError, match=r"a\.arrow: batch 0: column 'text' is damaged: .*"):
            texts(files(path, encoding_errors=errors))


def test_offsets_outside_of_a_saved_set_are_named(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "set")
    source = DiskSourceConfig(path=str(tmp_path / "set"))
    assert texts(source) == TEXTS
    damage(next((tmp_path / "set").glob("*.arrow")), number=1, by=60_000)
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow: batch 0: column 'text'"):
        texts(source)


def test_nested_columns_are_checked_and_texts_that_are_no_utf8_are_not_refused(
    tmp_path: Path,
) -> None:
    from toolkit.data.prepare.text.tables import checked_batch

    latin = pa.array([{"a": [b"caf\xe9"]}]).view(pa.struct([("a", pa.list_(pa.string()))]))
    batch = pa.record_batch({"x": latin})
    assert checked_batch(batch, "here") is batch
    offsets = pa.array([0, 500, 2], pa.int32()).buffers()[1]
    kind, inside = pa.list_(pa.string()), pa.array(["a", "b"])
    broken = pa.Array.from_buffers(kind, 2, [None, offsets], children=[inside])
    with pytest.raises(DataError, match=r"^here: column 'x' is damaged: "):
        checked_batch(pa.record_batch({"x": broken}), "here")


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_packed_lines_are_read_in_little_memory(tmp_path: Path, packed: str) -> None:
    line = json.dumps({"text": "a" * 77}).encode() + b"\n"
    lines = line * 1_000_000
    path = tmp_path / f"a.jsonl.{packed}"
    path.write_bytes(gzip.compress(lines, 6) if packed == "gz" else zstandard.compress(lines))
    num_bytes = len(lines)
    del lines
    assert path.stat().st_size < num_bytes / 200
    source = files(path)
    reading = Reading(source=source)
    (shard,) = plan_source(source, 0.0).shards
    tracemalloc.start()
    try:
        for number, _ in enumerate(read_shard(shard, reading, Counts())):
            if number == 200_000:
                break
        assert tracemalloc.get_traced_memory()[1] < num_bytes / 3
    finally:
        tracemalloc.stop()


def test_frames_of_zstd_are_read_whatever_their_number_and_size(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{n} " + "x" * (n % 50)}).encode() + b"\n" for n in range(3000)]
    small = b"".join(zstandard.compress(line) for line in lines)
    large = zstandard.compress(b"".join(lines) * 20)
    (tmp_path / "a.jsonl.zst").write_bytes(small + large + small)
    found = texts(files(tmp_path / "a.jsonl.zst"))
    assert len(found) == 22 * 3000
    assert found[:3] == ["0 ", "1 x", "2 xx"]
    (tmp_path / "b.jsonl.zst").write_bytes(small + large[:-9])
    with pytest.raises(DataError, match="damaged zstd file: it ends in the middle"):
        texts(files(tmp_path / "b.jsonl.zst"))


def test_a_line_longer_than_allowed_is_named(tmp_path: Path) -> None:
    lines = [{"text": "a"}, {"text": "b" * (9 << 20)}]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    assert len(texts(files(path))) > 1
    message = r"the line at byte 14 has more than 9,000,000 bytes; cut it, or set .*max_line_bytes"
    with pytest.raises(DataError, match=message):
        texts(files(path, max_line_bytes=9_000_000))
    with pytest.raises(DataError, match="the line at byte 0 has more than 13 bytes"):
        texts(files(path, max_line_bytes=13))
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n' * 2)
    assert texts(files(tmp_path / "b.jsonl", max_line_bytes=14)) == ["a", "a"]


def test_the_longest_line_does_not_decide_what_token_files_hold() -> None:
    one, other = (
        settings_of(DatasetConfig(source=FilesSourceConfig(paths=["a"], **kw)))  # type: ignore[arg-type]
        for kw in ({}, {"max_line_bytes": 5})
    )
    assert one == other
    assert "max_line_bytes" not in one["source"]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("depth", [101, 5000])
def test_a_deep_line_is_named(tmp_path: Path, rows: bool, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "x": ' + deep + "}\n")
    if depth == 101 and not rows:
        assert texts(files(tmp_path / "a.jsonl")) == ["a", "b"]
        return
    with pytest.raises(DataError, match=r"line 2 \(byte 14\): nested deeper than 100 levels"):
        texts(files(tmp_path / "a.jsonl"), rows=rows)


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("nothing")
    with pytest.raises(DataError, match=r"b\.txt: cannot be read: No such file"):
        texts(files(tmp_path))
    (tmp_path / "b.txt").unlink()
    os.mkfifo(tmp_path / "b.txt")
    assert texts(files(tmp_path)) == ["a"]

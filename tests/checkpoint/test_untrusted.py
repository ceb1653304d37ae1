"""Checkpoints that someone made: descriptions that do not fit, and files that ask for memory."""

import io
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from toolkit.checkpoint.commit import save_checkpoint
from toolkit.checkpoint.coverage import _is_tiled
from toolkit.checkpoint.find import find_checkpoint
from toolkit.checkpoint.folder import METADATA_FILE, FileEntry, encode_metadata, read_metadata
from toolkit.checkpoint.load import load_rank_state
from toolkit.checkpoint.tensors import iterate_tensors, load_tensors
from toolkit.checkpoint.untrusted import Archive, check_pickle
from toolkit.commands.verify import check_checkpoint
from toolkit.errors import CheckpointError
from toolkit.hf.source import find_source
from toolkit.storage.atomic import hash_file

NAME = "model.a"
NINE_BYTES = bytes.fromhex("80024e72ffffff0f2e")


def save(root: Path, step: int = 1) -> Path:
    return save_checkpoint(
        root, step=step, tokens=0, tensors={NAME: torch.arange(24.0).view(4, 6)},
        rank_state={"step": step, "rng": torch.arange(5), "x": [1.5, None, "é", 1 << 70]},
        engine="single", rank=0, group=None,
    )  # fmt: skip


def replace(checkpoint: Path, name: str, raw: bytes) -> None:
    """A file, and the manifest that it has to agree with."""
    (checkpoint / name).write_bytes(raw)
    metadata = read_metadata(checkpoint)
    entry = FileEntry(len(raw), hash_file(checkpoint / name))
    changed = structs.replace(metadata, files={**metadata.files, name: entry})
    (checkpoint / METADATA_FILE).write_bytes(encode_metadata(changed))


def chunk(*box: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box[:2]), torch.Size(box[2:]))


def info(metadata: Metadata) -> Any:
    return metadata.storage_data[MetadataIndex(NAME, (0, 0))]


def cut(metadata: Metadata, *boxes: tuple[int, ...]) -> None:
    """As if the tensor lay in these boxes, each with enough bytes."""
    old = info(metadata)
    metadata.state_dict_metadata[NAME].chunks = [chunk(*box) for box in boxes]  # type: ignore[union-attr]
    metadata.storage_data = {
        MetadataIndex(NAME, box[:2]): _StorageInfo(old.relative_path, old.offset + 200 * n, 200)
        for n, box in enumerate(boxes)
    }


def entry(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata[NAME]


GAP = "its chunks do not make up the tensor exactly once"
CRAFTED: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "no chunk": (lambda m: entry(m).chunks.clear(), GAP),
    "a row less": (lambda m: cut(m, (0, 0, 3, 6)), GAP),
    "an empty chunk": (lambda m: cut(m, (0, 0, 0, 6)), GAP),
    "outside": (lambda m: cut(m, (0, 0, 4, 6), (4, 0, 1, 6)), GAP),
    "twice": (lambda m: cut(m, (0, 0, 3, 6), (2, 0, 1, 6)), GAP),
    "a gap and an overlap": (lambda m: cut(m, (0, 0, 2, 6), (1, 0, 2, 6)), GAP),
    "a larger tensor": (lambda m: setattr(entry(m), "size", torch.Size((40000, 60000))), GAP),
    "negative": (lambda m: setattr(entry(m), "size", torch.Size((-4, -6))), GAP),
    "another number of dimensions": (
        lambda m: setattr(entry(m), "size", torch.Size((24,))), "is no tensor"),
    "no type": (lambda m: setattr(entry(m).properties, "dtype", "float32"), "is no tensor"),
    "no tensors": (lambda m: m.state_dict_metadata.clear(), "holds no tensors"),
    "a list": (lambda m: setattr(m, "state_dict_metadata", []), "holds no tensors"),
    "no places": (lambda m: setattr(m, "storage_data", None), "holds no tensors"),
    "a chunk that no tensor has": (
        lambda m: m.storage_data.update({MetadataIndex("b", (0,)): info(m)}),
        "names chunks that no tensor has"),
    "unknown file": (
        lambda m: setattr(info(m), "relative_path", "__7_0.distcp"), "outside the files"),
    "file elsewhere": (
        lambda m: setattr(info(m), "relative_path", "../train/rank0.pt"), "outside its folder"),
    "past the end": (lambda m: setattr(info(m), "length", 10**9), "outside the files"),
    "before the beginning": (lambda m: setattr(info(m), "offset", -1), "outside the files"),
    "few bytes": (lambda m: setattr(info(m), "length", 50), "fewer bytes than numbers"),
    "no number": (lambda m: setattr(info(m), "offset", "0"), "outside the files"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_tensor_that_its_chunks_do_not_make_up_is_refused_everywhere(
    kind: str, tmp_path: Path
) -> None:
    older, checkpoint = save(tmp_path, 1), save(tmp_path, 2)
    folder = checkpoint / "model_and_optim"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change, message = CRAFTED[kind]
    change(metadata)
    replace(checkpoint, "model_and_optim/.metadata", pickle.dumps(metadata))
    assert find_checkpoint(tmp_path).checkpoint == older
    assert find_checkpoint(tmp_path, quick=True).checkpoint == older
    report = check_checkpoint(checkpoint)
    assert report.problem is not None
    assert not report.is_leftover
    for read in (
        lambda: load_tensors(folder, {NAME: torch.zeros(4, 6)}, None),
        lambda: list(iterate_tensors(folder, "model.")),
        lambda: find_source(checkpoint),
    ):
        with pytest.raises(CheckpointError, match=message):
            read()


def test_two_chunks_may_not_share_bytes(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    path = checkpoint / "model_and_optim" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    cut(metadata, (0, 0, 2, 6), (2, 0, 2, 6))
    metadata.storage_data[MetadataIndex(NAME, (2, 0))].offset -= 100
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"uses bytes of __0_0\.distcp twice"):
        load_tensors(path.parent, {NAME: torch.zeros(4, 6)}, None)


@pytest.mark.parametrize(
    ("size", "boxes", "expected"),
    [
        ((), [((), ())], True),
        ((), [], False),
        ((0, 3), [], True),
        ((4, 6), [((0, 0), (4, 3)), ((0, 3), (4, 3))], True),
        # the pieces of a flat range: two rows cut, one whole between them
        ((3, 4), [((0, 0), (1, 2)), ((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 4))], True),
        ((3, 3), [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((1, 0), (2, 1)), ((2, 1), (1, 2)),
                  ((1, 1), (1, 1))], True),
        ((3, 3), [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((1, 0), (2, 1)), ((2, 1), (1, 2)),
                  ((0, 0), (1, 1))], False),
        ((2, 2, 2), [((0, 0, 0), (1, 2, 2)), ((1, 0, 0), (1, 2, 1)), ((1, 0, 1), (1, 2, 1))], True),
    ],
)  # fmt: skip
def test_boxes_tile_a_tensor_or_do_not(size: Any, boxes: Any, expected: bool) -> None:
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(shape)) for at, shape in boxes]
    assert _is_tiled(torch.Size(size), chunks) is expected
    assert _is_tiled(torch.Size(size), chunks[::-1]) is expected


@pytest.mark.parametrize("files", [{}, {"train/rank0.pt"}, {"model_and_optim/.metadata"}])
def test_a_manifest_without_state_is_not_valid(files: set[str], tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    metadata = read_metadata(checkpoint)
    kept = {name: metadata.files[name] for name in files}
    (checkpoint / METADATA_FILE).write_bytes(encode_metadata(structs.replace(metadata, files=kept)))
    with pytest.raises(CheckpointError, match="is missing in its manifest"):
        find_checkpoint(checkpoint)
    assert "is missing in its manifest" in str(check_checkpoint(checkpoint).problem)


BOMBS = {
    "memo": (NINE_BYTES, "asks for more memory than its size says"),
    "text": (b"\x80\x04X\xff\xff\xff\x7fabc.", "a length in it is larger than the file"),
    "text of eight bytes": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc.", "has no place in it"),
    "byte array": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7fabc.", "has no place in it"),
    "frame": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.", "a length in it is larger"),
    "dicts": (b"\x80\x04(" + b"}" * 100_000 + b"t.", "builds far more than its size says"),
    "lists": (b"\x80\x04(" + b"]" * 100_000 + b"t.", "builds far more than its size says"),
    "sets": (b"\x80\x04(" + b"\x8f" * 100_000 + b"t.", "has no place in it"),
    "code": (b"cposix\nsystem\n(U\x02lstR.", r"names posix\.system, which no checkpoint needs"),
    "cut": (b"\x80\x04N", "cut short"),
    "nothing": (b"", "cut short"),
    "a value": (b"\x80\x04N.", "holds no checkpoint metadata"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_description_that_asks_for_more_than_it_is_costs_one_line(
    kind: str, tmp_path: Path
) -> None:
    checkpoint = save(tmp_path)
    raw, message = BOMBS[kind]
    replace(checkpoint, "model_and_optim/.metadata", raw)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            find_checkpoint(checkpoint)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_large_real_descriptions_pass(protocol: int) -> None:
    metadata = {
        MetadataIndex(f"model.{n}", torch.Size((n, 0)), n): _StorageInfo("__0_0.distcp", n, 9)
        for n in range(3000)
    }
    check_pickle(pickle.dumps(metadata, protocol=protocol))


def archive_of(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rewritten(raw: bytes, compression: int, **changes: bytes) -> bytes:
    """The same archive, with other records (`data_pkl` for data.pkl)."""
    before, after = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    with zipfile.ZipFile(after, "w", compression) as file:
        for name in before.namelist():
            key = name.partition("/")[2].replace(".", "_").replace("/", "_")
            file.writestr(name, changes.get(key, before.read(name)))
    return after.getvalue()


def test_what_torch_saves_is_read_back() -> None:
    value: dict[str, Any] = {
        "a": torch.arange(6.0).view(2, 3).t(), "b": [1, -5, 2.5, True, None, "é", (), 1 << 70],
        "c": torch.zeros(0), "d": torch.tensor(7, dtype=torch.uint8), "e": {"f": {}},
    }  # fmt: skip
    raw = archive_of(value)
    found = Archive(io.BytesIO(raw), len(raw)).load()
    assert torch.equal(found["a"], value["a"])
    assert found["d"].item() == 7
    assert (found["b"], found["e"], found["c"].numel()) == (value["b"], value["e"], 0)


def test_a_rank_file_that_unpacks_or_lies_is_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path)
    path = checkpoint / "train" / "rank0.pt"
    assert load_rank_state(checkpoint, 0)["x"] == [1.5, None, "é", 1 << 70]
    raw = archive_of({"a": torch.zeros(4)})
    pickled = zipfile.ZipFile(io.BytesIO(raw)).read("archive/data.pkl")
    storage = b"K\x04"  # numel, shape
    assert storage in pickled
    larger = pickled.replace(storage, b"M\xff\xff", 1)
    for content, message in (
        (rewritten(raw, zipfile.ZIP_DEFLATED), "record 'archive/data.pkl' is compressed"),
        (rewritten(raw, zipfile.ZIP_STORED, data_0=b"1234"), "record 'data/0' is no 4 numbers"),
        (rewritten(raw, zipfile.ZIP_STORED, data_pkl=larger), "is no 65535 numbers"),
        (rewritten(raw, zipfile.ZIP_STORED, data_pkl=NINE_BYTES), "asks for more memory"),
        (raw[:-40], "cannot be read"),
        (b"PK", "cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_rank_state(checkpoint, 0)
        assert "\n" not in str(caught.value)
